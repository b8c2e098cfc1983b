"""Lowers the loss of codes that a solver has chosen, by coordinate descent, with scales that stay legal.

With G = (Q - W) H the loss is J = tr((Q - W) H (Q - W)^T). In one sweep, block of columns by block, every group's scale
is refitted with its codes fixed (TSGO, arXiv 2602.02126), then every column is rounded again with all others fixed
(CDQuant, arXiv 2406.17542). Each step lowers J or is not taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quarkcli.numerics import scales
from quarkcli.numerics.chunks import by_group
from quarkcli.numerics.formats import codec
from quarkcli.numerics.grid import Grid
from quarkcli.spec import Element, TensorSpec

COLUMNS = 128  # of a block, at most; groups are never cut unless they are wider


@dataclass
class Rows:
    """Rows of a problem on their way: weights, and what they are quantized to.

    weight  float32 [R, N], the target
    values  float32 [R, N], codes less their zero points, on a unit scale
    stored  the scales as stored [R, n], or None where they are not to be changed
    outer   float32 [R, 1], the global scale above them, or None
    real    float32 [R, n], the multipliers of the values
    zero    zero points [R, n], or None
    size    columns per scale
    """

    weight: Tensor
    values: Tensor
    stored: Tensor | None
    outer: Tensor | None
    real: Tensor
    zero: Tensor | None
    size: int
    element: Element

    def grid(self) -> Grid:
        return Grid(self.element, self.real, self.size, self.zero)

    def wide_zero(self) -> Tensor | None:
        return None if self.zero is None else _spread(self.zero, self.size, self.weight.shape[1])

    def decoded(self, part: slice | None = None) -> Tensor:
        """Returns the quantized weight, float32 [R, N], or some columns of it."""
        if part is None:
            values, scale = by_group(self.values, self.real, self.size)
            return (values * scale).view(self.values.shape)
        return self.values[:, part] * _across(self.real, self.size, part)

    def wide(self) -> Tensor:
        """Returns the multiplier of every value, float32 [R, N] or broadcasting like it."""
        return _spread(self.real, self.size, self.values.shape[1])


def refine(rows: Rows, spec: TensorSpec, gram: Tensor, sweeps: int) -> None:
    """Improves `rows` in place, block of columns by block, each with the errors of all others as they are by then.

    gram   the moment that the loss is measured by, damped, float32 [N, N]
    """
    error = rows.decoded().sub_(rows.weight)
    whole = rows.stored is not None and rows.size > COLUMNS
    width = rows.size if rows.size <= COLUMNS else COLUMNS
    width *= max(1, COLUMNS // width)
    for _ in range(sweeps):
        if whole:
            _refit_whole(rows, spec, gram, error)
        changed = False
        for start in range(0, len(gram), width):
            part = slice(start, min(start + width, len(gram)))
            moment = gram[part, part]
            pull = error @ gram[:, part]
            if rows.stored is not None and not whole:
                _refit(rows, spec, moment, pull, part)
            _descend(rows, moment, pull, part)
            before = error[:, part].clone()
            error[:, part] = rows.decoded(part).sub_(rows.weight[:, part])
            changed = changed or not torch.equal(before, error[:, part])
        if not changed:
            return


def _refit(rows: Rows, spec: TensorSpec, moment: Tensor, pull: Tensor, part: slice) -> None:
    """Moves the scales of the groups in some columns to the best legal ones for their codes; `pull` [R, B] follows."""
    size = rows.size
    for first in range(0, part.stop - part.start, size):
        inside = slice(first, min(first + size, part.stop - part.start))
        values = rows.values[:, part.start + inside.start : part.start + inside.stop]
        slope = (pull[:, inside] * values).sum(1)
        curve = (values * (values @ moment[inside, inside])).sum(1)
        step = _move(rows, spec, (part.start + first) // size, slope, curve)
        pull.addmm_(values * step[:, None], moment[inside])


def _refit_whole(rows: Rows, spec: TensorSpec, gram: Tensor, error: Tensor) -> None:
    """Does as `_refit` for groups wider than a block; `error` [R, N] follows."""
    for group in range(rows.real.shape[1]):
        part = slice(group * rows.size, (group + 1) * rows.size)
        values = rows.values[:, part]
        reach = values @ gram[part]
        step = _move(rows, spec, group, (error * reach).sum(1), (values * reach[:, part]).sum(1))
        error[:, part].addcmul_(values, step[:, None])


def _move(rows: Rows, spec: TensorSpec, group: int, slope: Tensor, curve: Tensor) -> Tensor:
    """Takes the legal scale nearest to the best one for a group where the loss falls. Returns steps [R]."""
    assert rows.stored is not None
    wanted = rows.real[:, group] - slope / curve.clamp_min(torch.finfo(torch.float32).tiny)
    stored, real = _nearest(wanted, rows, spec, group)
    step = real - rows.real[:, group]
    better = 2 * step * slope + step * step * curve < 0
    rows.stored[:, group] = _chosen(better, stored, rows.stored[:, group])
    rows.real[:, group] = torch.where(better, real, rows.real[:, group])
    return torch.where(better, step, 0.0)


def _nearest(wanted: Tensor, rows: Rows, spec: TensorSpec, group: int) -> tuple[Tensor, Tensor]:
    """Returns the legal scale nearest to `wanted` (float32 [R]), as stored and as a multiplier."""
    assert rows.stored is not None and spec.scale is not None
    outer = rows.outer[:, 0] if rows.outer is not None else None
    stored = scales.nearest_stored(wanted if outer is None else wanted / outer, spec, rows.stored.dtype)
    real = scales.decode_scale(stored, spec.scale.dtype)
    return stored, real if outer is None else real * outer


def _descend(rows: Rows, moment: Tensor, pull: Tensor, part: slice) -> None:
    """Rounds some columns again, those of the largest activations first, all others fixed."""
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    values = rows.values[:, part].t()[order]
    scale = _across(rows.real, rows.size, part).t().expand(len(order), -1)[order]
    zero = None if rows.zero is None else _across(rows.zero, rows.size, part).t().expand(len(order), -1)[order]
    couplings = moment[order][:, order]
    _descend_block(pull.t()[order], values, scale, zero, couplings, rows.element)
    rows.values[:, part] = torch.empty_like(values).index_copy_(0, order, values).t()


def _descend_block(
    pull: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, couplings: Tensor, element: Element
) -> None:
    """Rounds the columns of a block again, one after the other; overwrites `values` and `pull`, both [B, R]."""
    round_ = codec(element).round_
    steps = torch.empty_like(values)
    earlier = steps.t()
    scratch = torch.empty(2, values.shape[1], dtype=torch.int32, device=values.device)
    zeros = [None] * len(values) if zero is None else zero.unbind()
    shares = couplings.diagonal().reciprocal().neg_().tolist()
    columns = (pull, values, scale, steps, couplings.t())
    goal = torch.empty_like(values[0])
    loop = zip(*(each.unbind() for each in columns), zeros, shares, strict=True)
    for i, (own, value, factor, step, coupling, below, share) in enumerate(loop):
        if i:
            own.addmv_(earlier[:, :i], coupling[:i])
        torch.div(own, factor, out=goal).mul_(share).add_(value)
        round_(goal, element, scratch, below)
        torch.sub(goal, value, out=step).mul_(factor)
        value.copy_(goal)


def _across(per_group: Tensor, size: int, part: slice) -> Tensor:
    """Returns the scales (or zero points) of some columns, [R, B] or [R, 1]."""
    if per_group.shape[1] == 1:
        return per_group
    index = torch.arange(part.start, part.stop, device=per_group.device) // size
    return per_group.index_select(1, index.clamp_max_(per_group.shape[1] - 1))


def _spread(per_group: Tensor, size: int, columns: int) -> Tensor:
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(size, 1)[:, :columns]


def _chosen(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    bits = torch.uint8 if old.element_size() == 1 else old.dtype
    return torch.where(better, new.view(bits), old.view(bits)).view(old.dtype)
