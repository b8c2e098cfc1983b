"""Scales: from the largest magnitude of a group (amax) to the stored scale, and back to a float32 multiplier.

All arithmetic is float32; exponents are read from the float32 bit fields, because a floating log2 is off by one near
powers of two. Sources: OCP Microscaling Formats v1.0 (e8m0), NVIDIA's NVFP4 (e4m3 blocks under a float32 scale).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quarkcli.errors import ConfigError
from quarkcli.numerics.formats import minifloat
from quarkcli.spec import ELEMENTS, Element, ScaleSpec

# The scale of an all-zero group where a plain float is stored; any value would do, this one is AMD Quark's.
ZERO_GROUP_SCALE = 2.0**-23
# Smallest and largest positive e4m3 block scale. The smallest keeps a non-zero block from vanishing.
E4M3_MIN = 2.0**-9
E4M3_MAX = 448.0

_MANTISSA = 23
_MANTISSA_FIELD = (1 << _MANTISSA) - 1
_E8M0_MAX_BYTE = 254
_PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_PLAIN_RULES = ("half_range", "absmax")


def divisor(element: Element, rule: str) -> float:
    """The code magnitude that amax maps to: (qmax - qmin) / 2 for `half_range`, else qmax."""
    return (element.maximum - element.minimum) / 2 if rule == "half_range" else element.maximum


def plain_scale(amax: Tensor, element: Element, rule: str, dtype: torch.dtype) -> Tensor:
    """amax / divisor rounded to `dtype`; an all-zero group gets 2^-23. Same shape as `amax` (float32)."""
    if rule not in _PLAIN_RULES:
        raise ConfigError(
            f"the rule {rule!r} gives an e8m0 exponent, not a float scale",
            hint=f"use one of {', '.join(_PLAIN_RULES)}, or the scale dtype e8m0",
        )
    scale = (amax / divisor(element, rule)).clamp_max_(torch.finfo(dtype).max).to(dtype)
    return torch.where(scale == 0, ZERO_GROUP_SCALE, scale)


def global_scale(amax: Tensor, element: Element, rule: str) -> Tensor:
    """The float32 multiplier over e4m3 block scales: amax / (divisor * 448); 1 for an all-zero tensor.

    Kept at or above the smallest normal float32, so that block scale times global scale is never zero.
    """
    scale = (amax / (divisor(element, rule) * E4M3_MAX)).clamp_min_(torch.finfo(torch.float32).tiny)
    return torch.where(amax == 0, 1.0, scale)


def e4m3_scale(amax: Tensor, element: Element, rule: str, outer: Tensor | None) -> Tensor:
    """Block scales e4m3(clamp(amax / (divisor * outer), 2^-9, 448)); 1 for an all-zero block."""
    unit = divisor(element, rule) if outer is None else divisor(element, rule) * outer
    scale = (amax / unit).clamp_(E4M3_MIN, E4M3_MAX)
    return torch.where(amax == 0, 1.0, scale).to(torch.float8_e4m3fn)


def e8m0_scale(amax: Tensor, element: Element, rule: str) -> Tensor:
    """Exponent bytes (uint8, exponent + 127, 0..254) of the power-of-two scales of `amax` under an MX rule."""
    if rule not in _EXPONENT_RULES or element.kind != "float":
        raise ConfigError(
            f"no e8m0 scale is defined for {element.name} under the rule {rule!r}",
            hint=f"e8m0 takes a float element and one of the rules {', '.join(_EXPONENT_RULES)}",
        )
    return _EXPONENT_RULES[rule](amax.contiguous(), element).clamp_(0, _E8M0_MAX_BYTE).to(torch.uint8)


def stored_scale(amax: Tensor, element: Element, scale: ScaleSpec, model: torch.dtype, outer: Tensor | None) -> Tensor:
    """The scale of `amax` (float32) as stored. `model` is the dtype that `model` stands for, `outer` a global scale."""
    if scale.dtype == "e8m0":
        return e8m0_scale(amax, element, scale.rule)
    if scale.dtype == "e4m3":
        return e4m3_scale(amax, element, scale.rule, outer)
    return plain_scale(amax, element, scale.rule, _PLAIN.get(scale.dtype, model))


def decode_scale(stored: Tensor) -> Tensor:
    """Stored scales as float32: bytes are e8m0 (255 is NaN), floats are themselves."""
    if stored.dtype == torch.uint8:
        return stored.view(torch.float8_e8m0fnu).float()
    if stored.dtype == torch.float8_e4m3fn:
        return minifloat.decode_(stored, ELEMENTS["fp8_e4m3"], torch.empty_like(stored, dtype=torch.float32))
    return stored.float()


def _fields(values: Tensor) -> tuple[Tensor, Tensor]:
    """Biased exponent and mantissa (int32) of non-negative float32 values."""
    bits = values.view(torch.int32)
    return bits >> _MANTISSA, bits & _MANTISSA_FIELD


def _floor(amax: Tensor, element: Element) -> Tensor:
    exponent, _ = _fields(amax)
    return exponent - element.max_exponent


def _ceil(amax: Tensor, element: Element) -> Tensor:
    # A subnormal amax is rounded up to 2^-126 here; every float element has max_exponent >= 2, so its byte is 0 anyway.
    exponent, mantissa = _fields(amax)
    return exponent + (mantissa > 0) - element.max_exponent


def _even(amax: Tensor, element: Element) -> Tensor:
    half_step = 1 << (_MANTISSA - 1 - element.mantissa)
    return ((amax.view(torch.int32) + half_step) >> _MANTISSA) - element.max_exponent


def _rceil(amax: Tensor, element: Element) -> Tensor:
    exponent, mantissa = _fields(amax / element.maximum)
    # Among subnormals only those above 2^-127, the value of byte 0, need byte 1.
    exact = torch.where(exponent == 0, 1 << (_MANTISSA - 1), 0)
    return exponent + (mantissa > exact)


_EXPONENT_RULES: dict[str, Callable[[Tensor, Element], Tensor]] = {
    "even": _even,
    "floor": _floor,
    "ceil": _ceil,
    "rceil": _rceil,
}
