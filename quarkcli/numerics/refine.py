"""Lowers the loss of codes that a solver has chosen, by coordinate descent, with scales that stay legal.

With G = (Q - W) H the loss is J = tr((Q - W) H (Q - W)^T). In one sweep, block of columns by block, every group's scale
is refitted with its codes fixed (TSGO, arXiv 2602.02126), then every column is rounded again with all others fixed
(CDQuant, arXiv 2406.17542). Each step lowers J or is not taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quarkcli.numerics import scales
from quarkcli.numerics.chunks import by_group
from quarkcli.numerics.formats import codec
from quarkcli.numerics.grid import Grid
from quarkcli.numerics.products import through_onednn
from quarkcli.spec import Element, TensorSpec
from quarkcli.threads import limited

COLUMNS = 128  # of a block, at most; groups are never cut unless they are wider
RUN = 16  # columns of one scale that are rounded one by one before the others of their block hear of them


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
        values, scale = by_group(self.values, self.real, self.size)
        return (values * scale).view(self.values.shape)

    def wide(self) -> Tensor:
        """Returns the multiplier of every value, float32 [R, N] or broadcasting like it."""
        return _spread(self.real, self.size, self.values.shape[1])


def refine(rows: Rows, spec: TensorSpec, gram: Tensor, sweeps: int) -> None:
    """Improves `rows` in place, block of columns by block, each with the errors of all others as they are by then.

    One thread works inside a block: steps are short, and beside other work threads would wait for each other in each.

    gram   the moment that the loss is measured by, damped, float32 [N, N]
    """
    at = Columns.of(rows)
    whole = at.stored is not None and at.size > COLUMNS
    width = at.size if at.size <= COLUMNS else COLUMNS
    width *= max(1, COLUMNS // width)
    for _ in range(sweeps):
        if whole:
            _refit_whole(at, spec, gram)
        changed = False
        for start in range(0, len(gram), width):
            part = slice(start, min(start + width, len(gram)))
            moment = gram[part, part]
            with through_onednn():
                pull = gram[part] @ at.error
            with limited(1):
                if at.stored is not None and not whole:
                    _refit(at, spec, moment, pull, part)
                _descend(at, moment, pull, part)
                changed = at.update(part) or changed
        if not changed:
            break
    at.put_back(rows)


@dataclass
class Columns:
    """`Rows` on their side, so that what a column of all rows is lies in one piece: weight, values and error [N, R].

    Scales and zero points are [n, R]; error is the quantized weight less the weight.
    """

    weight: Tensor
    values: Tensor
    error: Tensor
    stored: Tensor | None
    outer: Tensor | None
    real: Tensor
    zero: Tensor | None
    size: int
    element: Element

    @classmethod
    def of(cls, rows: Rows) -> Columns:
        """Takes over the rows' values, which are the columns' from now on."""
        weight, values, real = (each.t().contiguous() for each in (rows.weight, rows.values, rows.real))
        rows.values = values.t()
        stored = None if rows.stored is None else _turned(rows.stored)
        zero = None if rows.zero is None else rows.zero.t().contiguous()
        outer = None if rows.outer is None else rows.outer[:, 0]
        at = cls(weight, values, torch.empty_like(weight), stored, outer, real, zero, rows.size, rows.element)
        for group in range(len(real)):
            inside = slice(group * at.size, (group + 1) * at.size)
            torch.mul(values[inside], real[group], out=at.error[inside]).sub_(weight[inside])
        return at

    def put_back(self, rows: Rows) -> None:
        rows.real = self.real.t().contiguous()
        if self.stored is not None:
            rows.stored = _turned(self.stored)

    def update(self, part: slice) -> bool:
        """Finds the error of some columns anew. Returns whether it is another."""
        new = torch.empty_like(self.error[part])
        for group, inside in self.groups(part):
            at = slice(inside.start - part.start, inside.stop - part.start)
            torch.mul(self.values[inside], self.real[group], out=new[at]).sub_(self.weight[inside])
        changed = not torch.equal(new, self.error[part])
        self.error[part] = new
        return changed

    def groups(self, part: slice) -> Iterator[tuple[int, slice]]:
        """Yields the groups that some columns lie in, each with its columns among them."""
        for group in range(part.start // self.size, (part.stop - 1) // self.size + 1):
            start = max(part.start, group * self.size)
            yield group, slice(start, min(part.stop, (group + 1) * self.size))


def _refit(at: Columns, spec: TensorSpec, moment: Tensor, pull: Tensor, part: slice) -> None:
    """Moves the scales of the groups in some columns to the best legal ones for their codes; `pull` [B, R] follows."""
    for group, columns in at.groups(part):
        inside = slice(columns.start - part.start, columns.stop - part.start)
        values = at.values[columns]
        with through_onednn():
            reach = moment[:, inside] @ values
        step = _move(at, spec, group, _dot(pull[inside], values), _dot(reach[inside], values))
        pull.addcmul_(reach, step)


def _refit_whole(at: Columns, spec: TensorSpec, gram: Tensor) -> None:
    """Does as `_refit` for groups wider than a block; errors follow."""
    for group in range(len(at.real)):
        part = slice(group * at.size, (group + 1) * at.size)
        values = at.values[part]
        with through_onednn():
            reach = gram[:, part] @ values
        step = _move(at, spec, group, _dot(at.error, reach), _dot(values, reach[part]))
        at.error[part].addcmul_(values, step)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(0)


def _move(at: Columns, spec: TensorSpec, group: int, slope: Tensor, curve: Tensor) -> Tensor:
    """Takes the legal scale nearest to the best one for a group where the loss falls. Returns steps [R].

    A scale keeps its sign, which whoever fitted it has chosen: codes of a group of zeros are anything, and the best
    scale for them as well.
    """
    assert at.stored is not None
    wanted = at.real[group] - slope / curve.clamp_min(torch.finfo(torch.float32).tiny)
    stored, real = _nearest(wanted, at, spec)
    step = real - at.real[group]
    better = (2 * step * slope + step * step * curve < 0) & (real.signbit() == at.real[group].signbit())
    at.stored[group] = _chosen(better, stored, at.stored[group])
    at.real[group] = torch.where(better, real, at.real[group])
    return torch.where(better, step, 0.0)


def _nearest(wanted: Tensor, at: Columns, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Returns the legal scale nearest to `wanted` (float32 [R]), as stored and as a multiplier."""
    assert at.stored is not None and spec.scale is not None
    stored = scales.nearest_stored(wanted if at.outer is None else wanted / at.outer, spec, at.stored.dtype)
    real = scales.decode_scale(stored, spec.scale.dtype)
    return stored, real if at.outer is None else real * at.outer


def _descend(at: Columns, moment: Tensor, pull: Tensor, part: slice) -> None:
    """Rounds some columns again, group by group those of the largest activations first, all others fixed.

    Those of one scale are divided by it and go one by one, a few of them before the rest of the block hears of it.
    """
    order, runs = _runs(at, moment, part)
    values, pull, couplings = at.values[part][order], pull[order], moment[order][:, order]
    for group, run in runs:
        zero = None if at.zero is None else at.zero[group]
        steps = _descend_run(pull[run].div_(at.real[group]), values[run], couplings[run, run], zero, at.element)
        behind = slice(run.stop, len(order))
        if len(order) > run.stop:
            pull[behind].addmm_(couplings[behind, run], steps.mul_(at.real[group]))
    at.values[part].index_copy_(0, order, values)


def _runs(at: Columns, moment: Tensor, part: slice) -> tuple[Tensor, list[tuple[int, slice]]]:
    """Returns the order of some columns, and the runs in that order, each with its group."""
    orders, runs, start = [], [], 0
    for group, columns in at.groups(part):
        inside = slice(columns.start - part.start, columns.stop - part.start)
        orders.append(torch.argsort(moment.diagonal()[inside], descending=True, stable=True) + inside.start)
        for first in range(start, start + len(orders[-1]), RUN):
            runs.append((group, slice(first, min(first + RUN, start + len(orders[-1])))))
        start += len(orders[-1])
    return torch.cat(orders), runs


def _descend_run(pull: Tensor, values: Tensor, couplings: Tensor, zero: Tensor | None, element: Element) -> Tensor:
    """Rounds columns of one scale again, one after the other; overwrites `values` and `pull`, both [B, R].

    pull   of the errors of all columns, divided by the scale
    Returns how far the values moved.
    """
    round_ = codec(element).round_
    steps, goals = torch.zeros_like(values), torch.empty_like(values)
    earlier = steps.t()  # columns that are not rounded yet moved by nothing
    scratch = torch.empty(2, values.shape[1], dtype=torch.int32, device=values.device)
    shares = couplings.diagonal().reciprocal().neg_().tolist()
    columns = (pull, values, goals, steps, couplings)
    for own, value, goal, step, coupling, share in zip(*(each.unbind() for each in columns), shares, strict=True):
        own.addmv_(earlier, coupling)
        round_(torch.add(value, own, alpha=share, out=goal), element, scratch, zero)
        torch.sub(goal, value, out=step)
    values.copy_(goals)
    return steps


def _spread(per_group: Tensor, size: int, columns: int) -> Tensor:
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(size, 1)[:, :columns]


def _turned(scales: Tensor) -> Tensor:
    """Returns the transpose, in one piece. Float8 is turned by its bits: torch copies it slowly."""
    bits = torch.uint8 if scales.element_size() == 1 else scales.dtype
    return scales.view(bits).t().contiguous().view(scales.dtype)


def _chosen(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    bits = torch.uint8 if old.element_size() == 1 else old.dtype
    return torch.where(better, new.view(bits), old.view(bits)).view(old.dtype)
