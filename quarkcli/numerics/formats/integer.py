"""Codes integers, also behind a point: value = (code - zero point) * 2^-fraction, saturating."""

from __future__ import annotations

import torch
from torch import Tensor

from quarkcli.spec import Element


def code_dtype(element: Element) -> torch.dtype:
    """Returns int8, which holds the value itself, for signed integers, and uint8 for unsigned ones."""
    return torch.int8 if element.minimum < 0 else torch.uint8


def round_(y: Tensor, element: Element, scratch: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """Replaces values of `y` (float32, already divided by its scale) by those of their codes. In place; returns `y`."""
    if zero is None and not element.fraction and element.rounding == "half_even":  # solvers ask for a column at a time
        return y.round_().clamp_(element.minimum, element.maximum)
    _to_codes(y, element, zero)
    return _from_codes(y, element, zero)


def encode_(
    y: Tensor, element: Element, out: Tensor, scratch: Tensor | None = None, zero: Tensor | None = None
) -> None:
    """Writes the codes of `y` (float32, already divided by its scale) to `out`. Destroys `y`; no NaN allowed."""
    out.copy_(_to_codes(y, element, zero))


def decode_(codes: Tensor, element: Element, out: Tensor, zero: Tensor | None = None) -> Tensor:
    """Writes the values of the codes to `out` (float32)."""
    return _from_codes(out.copy_(codes), element, zero)


def _to_codes(y: Tensor, element: Element, zero: Tensor | None) -> Tensor:
    if element.fraction:
        y.mul_(2.0**element.fraction)
    if zero is None:
        _whole(y, element)
    elif torch.is_floating_point(zero):
        _whole(y.add_(zero), element)
    else:
        _whole(y, element).add_(zero)  # rounded before the shift: a tie must not depend on the zero point
    step = 2.0**element.fraction
    return y.clamp_(element.minimum * step, element.maximum * step)


def _from_codes(y: Tensor, element: Element, zero: Tensor | None) -> Tensor:
    if zero is not None:
        y.sub_(zero)
    return y.mul_(2.0**-element.fraction) if element.fraction else y


def _whole(y: Tensor, element: Element) -> Tensor:
    match element.rounding:
        case "floor":
            return y.floor_()
        case "round":  # away from zero; the largest float32 below one half must not reach one
            magnitude = y.abs()
            up = magnitude - magnitude.floor() >= 0.5
            return y.copy_((magnitude.floor_() + up).copysign_(y))
    return y.round_()
