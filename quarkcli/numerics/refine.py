"""Lowers the loss of codes that a solver has chosen, by coordinate descent, with scales that stay legal.

With G = (Q - W) H the loss is J = tr((Q - W) H (Q - W)^T). In one sweep every group's scale is refitted with its codes
fixed (TSGO, arXiv 2602.02126), then every column is rounded again with all others fixed (CDQuant, arXiv 2406.17542).
Each step lowers J or is not taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quarkcli.numerics import scales
from quarkcli.numerics.formats import codec
from quarkcli.numerics.grid import Grid
from quarkcli.spec import Element, TensorSpec


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

    def decoded(self) -> Tensor:
        """Returns the quantized weight, float32 [R, N]."""
        return self.values * self.wide()

    def wide(self) -> Tensor:
        """Returns the multiplier of every value, float32 [R, N] or broadcasting like it."""
        return _spread(self.real, self.size, self.values.shape[1])


def refine(rows: Rows, spec: TensorSpec, gram: Tensor, order: Tensor, sweeps: int, columns: int = 128) -> None:
    """Improves `rows` in place.

    gram   the moment that the loss is measured by, damped, float32 [N, N]
    order  the order in which columns are rounded again
    """
    pull = rows.decoded().sub_(rows.weight) @ gram
    for _ in range(sweeps):
        if rows.stored is not None:
            _refit(rows, spec, gram, pull)
        if not _descend(rows, gram, order, pull, columns):
            break


def _refit(rows: Rows, spec: TensorSpec, gram: Tensor, pull: Tensor) -> None:
    """Moves every group's scale to the best legal one for its codes, group by group; `pull` follows."""
    assert rows.stored is not None
    size = rows.size
    for group in range(rows.real.shape[1]):
        part = slice(group * size, (group + 1) * size)
        values = rows.values[:, part]
        slope = (pull[:, part] * values).sum(1)
        curve = (values * (values @ gram[part, part])).sum(1)
        wanted = rows.real[:, group] - slope / curve.clamp_min(torch.finfo(torch.float32).tiny)
        stored, real = _nearest(wanted, rows, spec, group)
        step = real - rows.real[:, group]
        better = 2 * step * slope + step * step * curve < 0
        step = torch.where(better, step, 0.0)
        rows.stored[:, group] = _chosen(better, stored, rows.stored[:, group])
        rows.real[:, group] = torch.where(better, real, rows.real[:, group])
        if bool(better.any()):
            pull.addmm_(values * step[:, None], gram[part])


def _nearest(wanted: Tensor, rows: Rows, spec: TensorSpec, group: int) -> tuple[Tensor, Tensor]:
    """Returns the legal scale nearest to `wanted` (float32 [R]), as stored and as a multiplier."""
    assert rows.stored is not None and spec.scale is not None
    outer = rows.outer[:, 0] if rows.outer is not None else None
    stored = scales.nearest_stored(wanted if outer is None else wanted / outer, spec, rows.stored.dtype)
    real = scales.decode_scale(stored, spec.scale.dtype)
    return stored, real if outer is None else real * outer


def _descend(rows: Rows, gram: Tensor, order: Tensor, pull: Tensor, columns: int) -> bool:
    """Rounds every column again in `order`, all others fixed; `pull` follows. Returns whether any code changed."""
    diagonal = gram.diagonal()
    changed = False
    wide = rows.wide()
    for start in range(0, len(order), columns):
        index = order[start : start + columns]
        moment = gram.index_select(0, index)
        couplings = moment.index_select(1, index)
        own_pull = pull.index_select(1, index).t().contiguous()
        values = rows.values.index_select(1, index).t().contiguous()
        scale = wide.index_select(1, index).t().contiguous() if wide.shape[1] > 1 else wide.t().expand(len(index), -1)
        zero = None if rows.zero is None else rows.zero[:, index // rows.size].t().contiguous()
        steps = _descend_block(own_pull, values, scale, zero, couplings, diagonal[index], rows.element)
        if bool(steps.any()):
            changed = True
            rows.values.index_copy_(1, index, values.t())
            pull.addmm_(steps.t(), moment)
    return changed


def _descend_block(
    pull: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    couplings: Tensor,
    diagonal: Tensor,
    element: Element,
) -> Tensor:
    """Rounds the columns of a block again; overwrites `values` [B, R]. Returns their steps in weights [B, R]."""
    round_ = codec(element).round_
    steps = torch.empty_like(values)
    earlier = steps.t()
    scratch = torch.empty(2, values.shape[1], dtype=torch.int32, device=values.device)
    zeros = [None] * len(values) if zero is None else zero.unbind()
    inverse = diagonal.reciprocal().tolist()
    goal = torch.empty_like(values[0])
    loop = zip(
        pull.unbind(),
        values.unbind(),
        scale.unbind(),
        steps.unbind(),
        couplings.t().unbind(),
        zeros,
        inverse,
        strict=True,
    )
    for i, (own, value, factor, step, coupling, below, share) in enumerate(loop):
        if i:
            own.addmv_(earlier[:, :i], coupling[:i])
        torch.div(own, factor, out=goal).mul_(-share).add_(value)
        round_(goal, element, scratch, below)
        torch.sub(goal, value, out=step).mul_(factor)
        value.copy_(goal)
    return steps


def _spread(per_group: Tensor, size: int, columns: int) -> Tensor:
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(size, 1)[:, :columns]


def _chosen(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    bits = torch.uint8 if old.element_size() == 1 else old.dtype
    return torch.where(better, new.view(bits), old.view(bits)).view(old.dtype)
