"""Codes small floats (fp4, fp6, fp8), in one implementation for every eXmY without infinities in its codes.

Rounding is to the nearest value, ties to the even *code*; finite values saturate; the sign of zero is kept. Sources:
OCP Microscaling Formats v1.0 (fp4, fp6) and the OFP8 specification (fp8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quarkcli.spec import Element

_F32_MANTISSA = 23
_F32_BIAS = 127
_F16_EXPONENT, _F16_MANTISSA, _F16_BIAS = 5, 10, 15
_EXPONENT_FIELD = 0x7F800000
_SIGN = -(1 << 31)

# The 8-bit floats torch stores natively, by (exponent, mantissa) bits.
_NATIVE = {(4, 3): torch.float8_e4m3fn, (5, 2): torch.float8_e5m2}


def code_dtype(element: Element) -> torch.dtype:
    """Returns the dtype of a code tensor: torch's own type for fp8, uint8 bit patterns for the rest."""
    return _NATIVE.get((element.exponent, element.mantissa), torch.uint8)


def round_(y: Tensor, element: Element, scratch: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """Replaces every value of `y` (float32, already divided by its scale) by the nearest value of `element`.

    In place; returns `y`. NaN stays NaN, infinities saturate. `scratch`: int32 [2, *y.shape] to save allocations.
    """
    sign, binade = _scratch(y, scratch)
    bits = y.view(torch.int32)
    y.clamp_(element.minimum, element.maximum)
    torch.bitwise_and(bits, _SIGN, out=sign)
    # Adding 1.5 * 2^k pushes everything below one unit of the code grid out of the float32 mantissa, for both signs,
    # and the processor rounds ties to even while doing so; subtracting it again leaves the rounded value.
    _binade(bits, element, binade).add_(_grid_shift(element) + (1 << (_F32_MANTISSA - 1)))
    magic = binade.view(torch.float32)
    y.add_(magic).sub_(magic)
    bits.bitwise_or_(sign)  # a negative value that became zero keeps its sign
    return y


def encode_(
    y: Tensor, element: Element, out: Tensor, scratch: Tensor | None = None, zero: Tensor | None = None
) -> None:
    """Writes the codes of `y` (float32, already divided by its scale) to `out` of dtype `code_dtype`. Destroys `y`."""
    if out.dtype in _NATIVE.values():
        out.copy_(y.clamp_(element.minimum, element.maximum))  # torch's cast saturates differently per device
    else:
        encode_bits_(y, element, out, scratch)


def encode_bits_(y: Tensor, element: Element, out: Tensor, scratch: Tensor | None = None) -> None:
    """The generic encoder: bit patterns of `y` to the uint8 tensor `out`. Destroys `y`; no NaN allowed."""
    base, binade = _scratch(y, scratch)
    bits = y.view(torch.int32)
    torch.bitwise_right_shift(bits, 32 - element.bits, out=base)
    sign = base.to(torch.uint8).bitwise_and_(1 << (element.bits - 1))
    y.abs_().clamp_max_(element.maximum)
    _binade(bits, element, binade)
    drop = _F32_MANTISSA - element.mantissa
    torch.bitwise_right_shift(binade, drop, out=base)
    # code = q + base - first, q = |y| in units of its binade's grid. Adding 2^(23 - m) binades puts q into the low
    # mantissa bits (rounded, ties to even). The constant rides along in the same low bits: it is even, so ties stay
    # right, and counting modulo 256 is enough for a code of at most 8 bits.
    first = _first_binade(element) >> drop
    binade.add_(_grid_shift(element) + (-first & 0xFF))
    y.add_(binade.view(torch.float32))
    bits.add_(base)
    out.copy_(bits)  # int32 -> uint8 keeps the low byte
    out.bitwise_or_(sign)


def decode_(codes: Tensor, element: Element, out: Tensor, zero: Tensor | None = None) -> Tensor:
    """Writes the values of codes as `encode_` makes them to `out` (float32). Ignores bits above the code's width."""
    if codes.dtype in _NATIVE.values() and (codes.device.type != "cpu" or _has_nan(codes, element)):
        return out.copy_(codes)
    # Every format here sits inside float16 with its binades moved by a power of two, subnormals included. torch's own
    # conversion from float8 on a CPU is up to fifty times slower than the one from float16.
    half = codes.view(torch.uint8).to(torch.int16).bitwise_left_shift_(16 - element.bits)
    if more := _F16_EXPONENT - element.exponent:  # bits of the exponent; the sign comes down into them
        half.bitwise_right_shift_(more).bitwise_and_(~(((1 << more) - 1) << (15 - more)))
    return out.copy_(half.view(torch.float16)).mul_(2.0 ** (_F16_BIAS - element.bias))


def _scratch(y: Tensor, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns two int32 tensors of the shape of `y`."""
    if scratch is None:
        scratch = torch.empty((2, *y.shape), dtype=torch.int32, device=y.device)
    return scratch[0], scratch[1]


def _has_nan(codes: Tensor, element: Element) -> bool:
    """True when a code with an all-ones exponent and mantissa is present, which float16 would read as a number."""
    if codes.numel() == 0 or element.exponent >= _F16_EXPONENT:
        return False
    return int((codes.view(torch.uint8) & 0x7F).max()) == 0x7F


def _first_binade(element: Element) -> int:
    """Returns float32 bits of the smallest normal value of `element`; below it the grid stays the same."""
    return (_F32_BIAS + 1 - element.bias) << _F32_MANTISSA


def _binade(bits: Tensor, element: Element, out: Tensor) -> Tensor:
    """Writes the float32 exponent field of every value, not below the element's first binade, to `out` (int32)."""
    return torch.bitwise_and(bits, _EXPONENT_FIELD, out=out).clamp_min_(_first_binade(element))


def _grid_shift(element: Element) -> int:
    """Returns the number to add to a float32 exponent field to make one unit of the last place one step of the grid."""
    return (_F32_MANTISSA - element.mantissa) << _F32_MANTISSA
