"""Finds NaN and infinity in tensors of any dtype that files hold."""

from __future__ import annotations

import torch
from torch import Tensor

# A float8 value is not finite from this magnitude of its bits on; e8m0 has no sign, and only NaN.
_FLOAT8 = {
    torch.float8_e4m3fn: (0x7F, 0x7F),
    torch.float8_e5m2: (0x7F, 0x7C),
    torch.float8_e8m0fnu: (0xFF, 0xFF),
}
_NEGATIVE_ZERO = {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}  # the bits of -0 stand for NaN


def is_finite(x: Tensor) -> bool:
    """True when no value of `x` is NaN or infinite; one pass and no copy. Integers always are."""
    if not x.numel():
        return True
    if x.dtype.is_floating_point and x.element_size() > 1:
        return all(bool(torch.isfinite(end)) for end in x.aminmax())
    return not bool(bad_values(x).any())


def bad_values(x: Tensor) -> Tensor:
    """Returns a bool mask, of the shape of `x`, of its NaN and infinite values."""
    if x.dtype in _FLOAT8:
        mask, first = _FLOAT8[x.dtype]
        return x.view(torch.uint8) & mask >= first
    if x.dtype in _NEGATIVE_ZERO:
        return x.view(torch.uint8) == 0x80
    return ~torch.isfinite(x)
