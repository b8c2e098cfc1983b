"""Locates 2-D weights inside file tensors. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quarkcli.family.schema import FusedModel


@dataclass(frozen=True)
class WeightView:
    """Locates one 2-D weight [out, in] inside a file tensor.

    tensor     name in the source file
    expert     index into the leading axis, or None
    transpose  the file stores [in, out]
    rows       (start, stop, step) over the output rows *after* the transposition, or None for all
    stack      number of experts whose matrices lie one above the other in a 2-D tensor, or None
    """

    tensor: str
    expert: int | None = None
    transpose: bool = False
    rows: tuple[int, int, int] | None = None
    stack: int | None = None

    def of(self, tensor: Any) -> Any:
        """Returns the weight [out, in] inside `tensor`; shares memory with it (torch tensors and numpy arrays)."""
        if self.stack is not None:
            tensor = tensor.reshape(self.stack, -1, tensor.shape[-1])
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transpose:
            tensor = tensor.T
        if self.rows is not None:
            start, stop, step = self.rows
            tensor = tensor[start:stop:step]
        return tensor


def view_shape(view: WeightView, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the shape (out, in) of a view of a file tensor of this shape."""
    if view.stack is not None:
        shape = (view.stack, shape[0] // view.stack, shape[1])
    if view.expert is not None:
        shape = shape[1:]
    out, inner = (shape[1], shape[0]) if view.transpose else (shape[0], shape[1])
    if view.rows is not None:
        out = len(range(*view.rows))
    return out, inner


def fused_views(
    fused: FusedModel, tensor: str, shape: tuple[int, ...], expert: int, experts: int | None = None
) -> Iterable[tuple[str, WeightView]]:
    """Yields (leaf name, view) of each projection of one expert in a fused tensor.

    shape    [experts, out, in], [experts, in, out] when transposed; stacked ones have the first two joined. An open
             `transpose` is read as [out, in], which every class that reads both kinds takes as it is
    experts  how many there are; only stacked tensors need it
    """
    stack = experts if fused.stacked else None
    _, rows, columns = (stack, shape[0] // stack, shape[1]) if stack else shape
    out = columns if fused.transpose is True else rows
    count = len(fused.targets)
    for position, target in enumerate(fused.targets):
        if count == 1:
            part = None
        elif fused.split == "interleaved":
            part = (position, out, count)
        else:
            part = (position * out // count, (position + 1) * out // count, 1)
        yield target, WeightView(tensor, expert, fused.transpose is True, part, stack)


def fused_shape(fused: FusedModel, experts: int, single: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the fused tensor for projections of shape (out, in).

    An open `transpose` is read as [out, in].
    """
    out, inner = single[0] * len(fused.targets), single[1]
    rows, columns = (inner, out) if fused.transpose is True else (out, inner)
    return (experts * rows, columns) if fused.stacked else (experts, rows, columns)
