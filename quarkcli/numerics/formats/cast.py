"""Casts to torch's own fp16 and bf16, saturating and without a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from quarkcli.spec import Element

_DTYPES = {5: torch.float16, 8: torch.bfloat16}


def code_dtype(element: Element) -> torch.dtype:
    return _DTYPES[element.exponent]


def round_(y: Tensor, element: Element, scratch: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """Replaces every value of `y` (float32) by the nearest of `element`, ties to even. In place; returns `y`."""
    return y.copy_(_clamped(y, element).to(code_dtype(element)))


def encode_(
    y: Tensor, element: Element, out: Tensor, scratch: Tensor | None = None, zero: Tensor | None = None
) -> None:
    """Writes `y` (float32) to `out` in the element's own dtype. Destroys `y`."""
    out.copy_(_clamped(y, element))


def decode_(codes: Tensor, element: Element, out: Tensor, zero: Tensor | None = None) -> Tensor:
    """Writes the values of the codes to `out` (float32)."""
    return out.copy_(codes)


def _clamped(y: Tensor, element: Element) -> Tensor:
    return y.clamp_(element.minimum, element.maximum)
