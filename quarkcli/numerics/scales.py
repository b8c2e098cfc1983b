"""Turns the largest magnitude of a group (amax) into the stored scale, and that into a float32 multiplier.

All arithmetic is float32; exponents are read from the float32 bit fields, because a floating log2 is off by one near
powers of two. Sources: OCP Microscaling Formats v1.0 (e8m0), NVIDIA's NVFP4 (e4m3 blocks under a float32 scale), AMD
Quark (e5m3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quarkcli.errors import ConfigError
from quarkcli.numerics.formats import minifloat
from quarkcli.spec import E4M3_MAX, E5M3_MAX, ELEMENTS, Element, ScaleSpec, TensorSpec

# The scale of an all-zero group where a plain float is stored; any value would do, this one is AMD Quark's.
ZERO_GROUP_SCALE = 2.0**-23
# Smallest positive e4m3 block scale. It keeps a non-zero block from vanishing.
E4M3_MIN = 2.0**-9
# `four_over_six` multiplies a block scale by 1.5, so it leaves room above: 256 * 1.5 <= 448.
FOUR_OVER_SIX_MAX = 256.0

_F32_MAX = torch.finfo(torch.float32).max
_MANTISSA = 23
_MANTISSA_FIELD = (1 << _MANTISSA) - 1
_E8M0_MAX_BYTE = 254
_PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "pow2": torch.float32}
_PLAIN_RULES = ("half_range", "absmax")
# Mantissa field of the largest float32 below the square root of two: above it the logarithm rounds up.
_SQRT_2 = 0x3504F3
_HALF = 1 << 22  # mantissa field of 1.5: above it the upper of two powers of two is nearer
# Bits of rounding that the `even` rule of mxint8 assumes (AMD Quark); floats take their own mantissa.
_EVEN_BITS_OF_INTEGERS = 8


@dataclass
class Range:
    """The range of the values behind every scale, float32: the largest magnitude, and where needed both ends."""

    amax: Tensor
    low: Tensor | None = None
    high: Tensor | None = None

    def scaled(self, factor: float) -> Range:
        """Returns the same range, shrunk or stretched."""
        ends = (None, None) if self.low is None or self.high is None else (self.low * factor, self.high * factor)
        return Range(self.amax * factor, *ends)


def divisor(element: Element, rule: str) -> float:
    """Returns the magnitude that amax maps to: (qmax - qmin) / 2 for `half_range`, else qmax."""
    return (element.maximum - element.minimum) / 2 if rule == "half_range" else element.maximum


def divided(values: Tensor, number: float) -> Tensor:
    """Returns values / number (float32), rounded once.

    On CUDA torch would multiply by the inverse of a plain number.
    """
    return values / torch.full((), number, dtype=torch.float32, device=values.device)


def plain_scale(range_: Range, spec: TensorSpec, model: torch.dtype) -> Tensor:
    """Returns amax / divisor rounded to the stored dtype, or the range over all codes where there is a zero point.

    A group whose range is empty gets 2^-23. Same shape as `range_.amax`.
    """
    assert spec.scale is not None
    element, scale = spec.format, spec.scale
    if scale.rule not in _PLAIN_RULES:
        raise ConfigError(
            f"the rule {scale.rule!r} does not give a {scale.dtype} scale",
            hint=f"use one of {', '.join(_PLAIN_RULES)}",
            kind="E-FORMAT-IMPOSSIBLE",
        )
    dtype = _PLAIN.get(scale.dtype, model)
    real = _real_scale(range_, spec, divisor(element, scale.rule))
    if scale.dtype == "pow2":
        real = nearest_power(real)
    if scale.minimum is not None:
        real = real.clamp_min(scale.minimum)
    stored = real.clamp_max_(largest_scale(element, dtype, scale.dtype == "pow2")).to(dtype)
    return torch.where(stored == 0, ZERO_GROUP_SCALE, stored)


def nearest_plain(real: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """Returns float32 scales of either sign in the dtype they are stored in; 2^-23 for those that round to zero."""
    assert spec.scale is not None
    most = largest_scale(spec.format, dtype)
    stored = real.clamp(-most, most).to(dtype)
    if spec.scale.minimum is not None:
        stored = torch.where(stored.abs() < spec.scale.minimum, spec.scale.minimum, stored)
    return torch.where(stored == 0, ZERO_GROUP_SCALE, stored)


def nearest_stored(real: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """Returns the stored scales nearest to float32 ones, which are divided by a global scale where there is one.

    Only plain scales may be negative; others fall to the smallest there is.
    """
    assert spec.scale is not None
    match spec.scale.dtype:
        case "e8m0":
            exponent, mantissa = _fields(real.clamp_min(torch.finfo(torch.float32).tiny).contiguous())
            return (exponent + (mantissa > _HALF)).clamp_(0, _E8M0_MAX_BYTE).to(torch.uint8)
        case "e4m3":
            return real.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
        case "e5m3":
            return e5m3_bytes(real).clamp_min_(1)
    return nearest_plain(nearest_power(real) if spec.scale.dtype == "pow2" else real, spec, dtype)


@cache
def largest_scale(element: Element, dtype: torch.dtype, power: bool = False) -> float:
    """Returns the largest scale of a dtype with which every code is a finite float32."""
    limit = min(_F32_MAX / max(-element.minimum, element.maximum), torch.finfo(dtype).max)
    mantissa, exponent = math.frexp(limit)
    steps = 2.0 if power else 2.0 / torch.finfo(dtype).eps
    return math.ldexp(math.floor(mantissa * steps) / steps, exponent)


def _real_scale(range_: Range, spec: TensorSpec, divisor_: float) -> Tensor:
    element = spec.format
    if spec.symmetric:
        return divided(range_.amax, divisor_)
    low, high = _ends(range_, spec)
    # Divided first: the range of values near the float32 maximum does not fit a float32.
    codes = element.maximum - element.minimum
    scale = torch.where((high - low).isfinite(), divided(high - low, codes), divided(high, codes) - divided(low, codes))
    if spec.zero_point == "float":  # AMD Quark: a constant group keeps its value in the zero point
        return torch.where(scale <= ZERO_GROUP_SCALE, 1.0, scale)
    return scale


def _ends(range_: Range, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Returns both ends of the range; zero is part of it where the zero point is a code."""
    assert range_.low is not None and range_.high is not None
    # Codes beyond the ends, by half a step, must still be finite float32.
    codes = spec.format.maximum - spec.format.minimum
    most = _F32_MAX * codes / (codes + 2)
    low, high = range_.low.clamp_min(-most), range_.high.clamp_max(most)
    return (low, high) if spec.zero_point == "float" else (low.clamp_max_(0.0), high.clamp_min_(0.0))


def zero_points(range_: Range, scale: Tensor, spec: TensorSpec) -> Tensor | None:
    """Returns zero points for decoded `scale` (float32).

    They are codes in the element's dtype or real float32 numbers; None if symmetric.
    """
    if spec.symmetric:
        return None
    element = spec.format
    low, _ = _ends(range_, spec)
    if spec.zero_point == "float":
        return element.minimum - low / scale
    codes = (element.minimum - (low / scale).round_()).clamp_(element.minimum, element.maximum)
    return codes.to(torch.int8 if element.minimum < 0 else torch.uint8)


def global_scale(amax: Tensor, element: Element, scale: ScaleSpec) -> Tensor:
    """Returns the float32 multiplier over 8-bit block scales: amax / (divisor * their maximum).

    It is 1 for an all-zero tensor. Otherwise it is at least the smallest normal float32, so that block scale times
    global scale is never zero.
    """
    largest = {"e4m3": E4M3_MAX, "e5m3": E5M3.maximum}[scale.dtype]
    if scale.rule == "four_over_six":
        largest = FOUR_OVER_SIX_MAX
    whole = divisor(element, scale.rule) * largest
    most = _F32_MAX / whole * (1 - 2.0**-22)  # the largest code of the largest block scale stays a finite float32
    real = divided(amax, whole).clamp_(torch.finfo(torch.float32).tiny, most)
    if scale.global_scale is not None and scale.global_scale.minimum is not None:
        real = real.clamp_min_(scale.global_scale.minimum)
    return torch.where(amax == 0, 1.0, real)


def e4m3_scale(amax: Tensor, element: Element, rule: str, outer: Tensor | None) -> Tensor:
    """Returns block scales e4m3(clamp(amax / (divisor * outer), 2^-9, 448)); 1 for an all-zero block."""
    number = divisor(element, rule)
    scale = divided(amax, number) if outer is None else amax / (number * outer)
    scale = scale.clamp_(E4M3_MIN, E4M3_MAX)
    return torch.where(amax == 0, 1.0, scale).to(torch.float8_e4m3fn)


# The unsigned scale format of amdfp4 (AMD Quark): exponent 31 is an ordinary binade, 255 is NaN.
E5M3 = Element("e5m3", "float", 8, 0.0, E5M3_MAX, 5, 3, 15)
_E5M3_ONE = 15 << 3


def e5m3_bytes(values: Tensor) -> Tensor:
    """Returns the codes (uint8) nearest to float32 values, ties to the even code, saturating at 0 and the maximum."""
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    # The format has no sign: -0.0 must not set its bit.
    minifloat.encode_bits_(values.clamp(E5M3.minimum, E5M3.maximum).abs_().contiguous(), E5M3, codes)
    return codes


def e5m3_scale(amax: Tensor, element: Element, rule: str, outer: Tensor | None) -> Tensor:
    """Returns bytes e5m3(amax / divisor / outer), at least 1, so that no block vanishes; 1.0 for an all-zero block."""
    scale = divided(amax, divisor(element, rule))
    if outer is not None:
        scale = scale / outer
    return torch.where(amax == 0, _E5M3_ONE, e5m3_bytes(scale).clamp_min_(1))


def e8m0_scale(range_: Range, element: Element, rule: str) -> Tensor:
    """Returns exponent bytes (uint8, exponent + 127, 0..254) of power-of-two scales under an exponent rule."""
    if rule not in _EXPONENT_RULES:
        raise ConfigError(
            f"the rule {rule!r} gives no exponent",
            hint=f"use one of {', '.join(_EXPONENT_RULES)} with e8m0",
            kind="E-FORMAT-IMPOSSIBLE",
        )
    range_ = Range(range_.amax.contiguous(), range_.low, range_.high)
    return _EXPONENT_RULES[rule](range_, element).clamp_(0, _E8M0_MAX_BYTE).to(torch.uint8)


def stored_scale(range_: Range, spec: TensorSpec, model: torch.dtype, outer: Tensor | None) -> Tensor:
    """Returns the scales of ranges as stored. `model` is the dtype that `model` stands for, `outer` a global scale."""
    assert spec.scale is not None
    element, scale = spec.format, spec.scale
    match scale.dtype:
        case "e8m0":
            return e8m0_scale(range_, element, scale.rule)
        case "e4m3":
            return e4m3_scale(range_.amax, element, scale.rule, outer)
        case "e5m3":
            return e5m3_scale(range_.amax, element, scale.rule, outer)
    return plain_scale(range_, spec, model)


def decode_scale(stored: Tensor, dtype: str) -> Tensor:
    """Returns stored scales of a `ScaleSpec.dtype` as float32. Byte 255 of e8m0 and e5m3 is NaN."""
    if dtype == "e8m0":
        return stored.view(torch.float8_e8m0fnu).float()
    if dtype == "e5m3":
        return _e5m3_values().to(stored.device)[stored.int()]
    if stored.dtype == torch.float8_e4m3fn:
        return minifloat.decode_(stored, ELEMENTS["fp8_e4m3"], torch.empty_like(stored, dtype=torch.float32))
    return stored.float()


@cache
def _e5m3_values() -> Tensor:
    """Returns the value of every code, float32 [256]."""
    code = torch.arange(256)
    exponent, fraction = code >> E5M3.mantissa, (code & 7).double() / 8
    normal = torch.ldexp(1 + fraction, exponent - E5M3.bias)
    subnormal = torch.ldexp(fraction, torch.tensor(1 - E5M3.bias))
    values = torch.where(exponent == 0, subnormal, normal)
    values[255] = torch.nan
    return values.float()


def shift_bits(pairs: Tensor, stored: Tensor) -> Tensor:
    """Returns shift bits (uint8 0 or 1) of sub-blocks.

    A bit is 1 where every element lies at least one binade below its group's.

    pairs    largest magnitude of every sub-block, float32 [rows, sub-blocks]
    stored   exponent bytes of the groups, [rows, groups]
    """
    exponent, _ = _fields(pairs)
    runs = exponent.view(*stored.shape, -1)
    return (runs < stored.unsqueeze(-1)).to(torch.uint8).flatten(1)


def _fields(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns biased exponent and mantissa (int32) of non-negative float32 values."""
    bits = values.view(torch.int32)
    return bits >> _MANTISSA, bits & _MANTISSA_FIELD


def _floor(range_: Range, element: Element) -> Tensor:
    exponent, _ = _fields(range_.amax)
    return exponent - element.max_exponent


def _ceil(range_: Range, element: Element) -> Tensor:
    exponent, mantissa = _fields(range_.amax)
    # Among subnormals only those above 2^-127, the value of byte 0, need byte 1.
    exact = torch.where(exponent == 0, 1 << (_MANTISSA - 1), 0)
    return exponent + (mantissa > exact) - element.max_exponent


def _even(range_: Range, element: Element) -> Tensor:
    bits = element.mantissa if element.kind == "float" else _EVEN_BITS_OF_INTEGERS
    half_step = 1 << (_MANTISSA - 1 - bits)
    return ((range_.amax.view(torch.int32) + half_step) >> _MANTISSA) - element.max_exponent


def _rceil(range_: Range, element: Element) -> Tensor:
    exponent, mantissa = _fields(divided(range_.amax, element.maximum))
    # Among subnormals only those above 2^-127, the value of byte 0, need byte 1.
    exact = torch.where(exponent == 0, 1 << (_MANTISSA - 1), 0)
    return exponent + (mantissa > exact)


def _fit(range_: Range, element: Element) -> Tensor:
    """Returns the exponents of `floor`, plus one where the code of an end does not fit. Source: AMD Quark's bfp16."""
    byte = _floor(range_, element).clamp_(0, _E8M0_MAX_BYTE)
    low = -range_.amax if range_.low is None else range_.low
    high = range_.amax if range_.high is None else range_.high
    unit, step = decode_scale(byte.to(torch.uint8), "e8m0"), 2.0**element.fraction
    over = (high / unit * step).round_() > element.maximum * step
    under = (low / unit * step).round_() < element.minimum * step
    return byte + (over | under)


def nearest_exponent(values: Tensor) -> Tensor:
    """Returns the exponent bytes (uint8) of the powers of two nearest to positive float32 values in the logarithm."""
    exponent, mantissa = _fields(values.contiguous())
    return (exponent + (mantissa > _SQRT_2)).clamp_(0, _E8M0_MAX_BYTE).to(torch.uint8)


def nearest_power(values: Tensor) -> Tensor:
    """Returns the power of two nearest to positive float32 values in the logarithm; 0 stays 0."""
    exponent, mantissa = _fields(values.contiguous())
    raised = (exponent + (mantissa > _SQRT_2)).clamp_(1, _E8M0_MAX_BYTE) << _MANTISSA
    return torch.where(values == 0, 0.0, raised.view(torch.float32))


_EXPONENT_RULES: dict[str, Callable[[Range, Element], Tensor]] = {
    "even": _even,
    "floor": _floor,
    "ceil": _ceil,
    "rceil": _rceil,
    "fit": _fit,
}
