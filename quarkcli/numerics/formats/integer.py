"""Integer codes: values <-> codes, nearest with ties to even, saturating. No zero points: value = code * scale."""

from __future__ import annotations

import torch
from torch import Tensor

from quarkcli.spec import Element


def code_dtype(element: Element) -> torch.dtype:
    """int8 holding the value itself for signed integers, uint8 for unsigned ones."""
    return torch.int8 if element.minimum < 0 else torch.uint8


def round_(y: Tensor, element: Element, scratch: Tensor | None = None) -> Tensor:
    """Replace every value of `y` (float32, already divided by its scale) by the nearest code. In place; returns `y`.

    `scratch` is not needed here; it keeps the signature of the float formats.
    """
    return y.round_().clamp_(element.minimum, element.maximum)


def encode_(y: Tensor, element: Element, out: Tensor, scratch: Tensor | None = None) -> None:
    """Write the codes of `y` (float32, already divided by its scale) to `out`. Destroys `y`; no NaN allowed."""
    out.copy_(round_(y, element))


def decode_(codes: Tensor, element: Element, out: Tensor) -> Tensor:
    """Write the values of the codes to `out` (float32)."""
    return out.copy_(codes)
