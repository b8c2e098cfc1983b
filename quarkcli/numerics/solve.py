"""Runs the GPTQ column loop, independent of the number format (arXiv 2210.17323).

`factorize` turns the second moment of a linear's inputs into a triangular factor, once per input; `solve_values` rounds
the columns of any number of rows with it. Rows do not influence each other, so the weights of several linears that read
the same input may be concatenated.

The loop is written as Babai's nearest plane, which it equals (arXiv 2507.18553): with H = V V^T, V upper triangular,
and t the target, column j is rounded to q_j as c_j = t_j + sum over i < j of (t_i - q_i) V_ij / V_jj. No inverse is
formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from quarkcli.errors import DataError
from quarkcli.numerics.formats import codec
from quarkcli.numerics.grid import Grid
from quarkcli.numerics.products import add_product_
from quarkcli.numerics.rows import cpu_rows
from quarkcli.threads import limited

ActOrder = bool | Literal["group"]
# Rows of a strictly upper F [N, N], in the factor's order, from the diagonal of the first on.
Feed = Callable[[slice], Tensor]
# Damping grows by this factor after a failed factorization, from at least this fraction of the mean diagonal.
_DAMP_GROWTH = 10.0
_DAMP_FLOOR = 1e-6
_CHOLESKY = 128  # rows of a factor that are found at once on a CPU
_PANEL = 256  # rows of a square matrix that are moved at once
RUN = 16  # columns that are rounded one by one before the others of their block hear of them


@dataclass
class Factor:
    """V with V V^T = H + lam I, columns in the order they are rounded.

    upper     V, float32 [N, N], upper triangular
    order     column rounded at step i, int64 [N], or None for the given order
    dead      inputs that were always zero, or next to it, bool [N], in the given order; nothing is known of them, so
              their weights are rounded to nearest and take no part in the loss
    damp      lam divided by the mean live diagonal, as used
    attempts  how many dampings were tried
    ridge     lam itself
    """

    upper: Tensor
    order: Tensor | None
    dead: Tensor
    damp: float
    attempts: int
    ridge: float = 0.0


def factorize(
    gram: Tensor, *, damp: float = 0.01, act_order: ActOrder = True, group: int | None = None, max_attempts: int = 6
) -> Factor | None:
    """Returns the factor of H = `gram` (float32 [N, N], symmetric, positive semidefinite).

    Any positive multiple of H will do.

    Each damping is tried in float32, then in float64; then it grows tenfold. None when `max_attempts` dampings failed.
    act_order   the columns with the largest diagonal first; `group`: sorted inside the groups of `group` columns, and
                these by their largest (arXiv 2505.14638)
    DataError when `gram` is not finite.
    """
    diagonal = gram.diagonal()
    if not bool(torch.isfinite(gram.sum())) and not bool(torch.isfinite(gram).all()):
        raise DataError(
            "the second moment of the inputs is not finite",
            hint="look for NaN or inf in the calibration",
            kind="E-NONFINITE-ACTIVATION",
        )
    dead = dead_inputs(gram)
    live = diagonal[~dead].double()
    mean = float(live.mean()) if live.numel() else 1.0
    order = _order(diagonal, act_order, group)
    for attempt in range(max_attempts):
        for dtype in (torch.float32, torch.float64):
            upper = _factor(gram, order, dead, mean, damp, dtype)
            if upper is not None:
                return Factor(upper, order, dead, damp, attempt + 1, damp * mean)
        damp = max(damp, _DAMP_FLOOR) * _DAMP_GROWTH
    return None


def _order(diagonal: Tensor, act_order: ActOrder, group: int | None) -> Tensor | None:
    if act_order != "group" or group is None:
        return torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    groups = diagonal.view(-1, group)
    inside = torch.argsort(groups, descending=True, stable=True)
    first = torch.argsort(groups.amax(1), descending=True, stable=True)
    return (inside + torch.arange(len(groups), device=diagonal.device)[:, None] * group)[first].flatten()


def dead_inputs(gram: Tensor) -> Tensor:
    """Returns inputs without a second moment, bool [N]: zero, or too small for float32, alone or beside the others'."""
    diagonal = gram.diagonal()
    live = diagonal[diagonal > 0].double()
    floor = float(live.mean()) * torch.finfo(torch.float32).eps ** 2 if live.numel() else 0.0
    return diagonal <= max(floor, torch.finfo(torch.float32).tiny)


def largest_share(gram: Tensor, steps: int = 30) -> float:
    """Returns the largest eigenvalue of `gram` as a multiple of its mean live diagonal, by power iteration."""
    live = gram.diagonal()[~dead_inputs(gram)].double()
    if not live.numel():
        return 1.0
    mean = float(live.mean())
    vector = torch.ones_like(gram[0])
    for _ in range(steps):
        vector = gram @ (vector / vector.norm())
    return float(vector.norm()) / mean


def solve_values(
    weight: Tensor,
    factor: Factor,
    at: Grid,
    *,
    columns: int = 128,
    feed: Feed | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Returns codes less their zero points, float32 [R, N] on a unit scale, and the loss.

    at          where the codes lie; concatenated along the rows like the weights, fixed beforehand
    columns     columns per lazy block; changes the order of the sums only
    feed        column i, before it is rounded, adds its product with row i of F V^-1 to the columns after it (GPTAQ)
    first       float32 [R], what the first column is rounded from, instead of its target (Qronos' correction)
    """
    return solve_together([Rounding(weight, factor, at, feed, first)], columns=columns)[0]


@dataclass
class Rounding:
    """Weights to be rounded column by column, see `solve_values`."""

    weight: Tensor
    factor: Factor
    at: Grid
    feed: Feed | None = None
    first: Tensor | None = None

    def alike(self) -> object:
        """Returns a key that is equal for those that may go through the columns together."""
        zeros = None if self.at.zero is None else self.at.zero.shape
        kind = self.at.element, self.at.size, self.at.scale.shape, zeros, self.feed is None, self.first is None
        return kind, self.weight.shape, self.weight.device


def solve_together(jobs: Sequence[Rounding], *, columns: int = 128) -> list[tuple[Tensor, float]]:
    """Returns what `solve_values` does, of each; all are alike. None depends on the others, not by a bit.

    On a CPU as many at once as stay in its cache.
    """
    rows, cols = jobs[0].weight.shape
    on_cpu = jobs[0].weight.device.type == "cpu"
    at_once = max(1, cpu_rows(cols) // max(1, rows)) if on_cpu else len(jobs)
    found: list[tuple[Tensor, float]] = []
    for start in range(0, len(jobs), at_once):
        found += _solve_jobs(jobs[start : start + at_once], columns)
    return found


def _solve_jobs(jobs: Sequence[Rounding], columns: int) -> list[tuple[Tensor, float]]:
    rows, cols = jobs[0].weight.shape
    device = jobs[0].weight.device
    every = torch.arange(cols, device=device)
    orders = [job.factor.order if job.factor.order is not None else every for job in jobs]
    grid = torch.empty(cols, len(jobs), rows, dtype=torch.float32, device=device)
    losses = [0.0] * len(jobs)
    step = cpu_rows(cols) if device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        found = _solve_rows(jobs, orders, part, columns, grid[:, :, part])
        losses = [before + more for before, more in zip(losses, found, strict=True)]
    return [(_rows_of(grid[:, i], order), loss) for i, (order, loss) in enumerate(zip(orders, losses, strict=True))]


def _columns_in(order: Tensor, weight: Tensor) -> Tensor:
    """Returns the columns of a weight [R, N] in an order, each contiguous, [N, R]."""
    found = torch.empty(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    for start in range(0, len(weight), _PANEL):
        part = slice(start, start + _PANEL)
        found[:, part] = weight[part].index_select(1, order).t()
    return found


def _rows_of(columns: Tensor, order: Tensor) -> Tensor:
    """Returns the matrix [R, N] whose columns in an order are `columns` [N, R]."""
    found = torch.empty(columns.shape[1], columns.shape[0], dtype=columns.dtype, device=columns.device)
    for start in range(0, len(found), _PANEL):
        part = slice(start, start + _PANEL)
        found[part] = torch.empty_like(columns[:, part]).index_copy_(0, order, columns[:, part]).t()
    return found


def codes_of(values: Tensor, at: Grid) -> Tensor:
    """Returns codes of values (code - zero) on a unit scale [R, N]; overwrites them."""
    # A value less its float zero point may lie an ulp beside the code it came from.
    element = replace(at.element, rounding="half_even")
    codes = torch.empty(values.shape, dtype=codec(element).code_dtype(element), device=values.device)
    zero = at.zero
    if zero is not None and zero.shape[1] > 1:
        zero = zero.repeat_interleave(at.size, 1)[:, : values.shape[1]]
    codec(element).encode_(values, element, codes, None, zero)
    return codes


def _factor(
    gram: Tensor, order: Tensor | None, dead: Tensor, mean: float, damp: float, dtype: torch.dtype
) -> Tensor | None:
    """Returns V for one damping, in float32, computed in `dtype`; None when H is not positive definite there.

    With the order reversed, Hd = L L^T; reversing L back gives V.
    """
    size = len(gram)
    backwards = torch.arange(size - 1, -1, -1, device=gram.device) if order is None else order.flip(0)
    damped = torch.empty(size, size, dtype=dtype, device=gram.device)
    for start in range(0, size, _PANEL):
        damped[start : start + _PANEL] = gram.index_select(0, backwards[start : start + _PANEL]).index_select(
            1, backwards
        )
    gone = dead[backwards]
    damped[gone] = 0.0
    damped[:, gone] = 0.0
    # Decoupled, so any positive number gives the same result elsewhere; this one has the unit of H.
    damped.diagonal()[gone] = mean
    damped.diagonal().add_(damp * mean)
    if not _cholesky_(damped):
        return None
    _turn_around(damped)
    upper = damped.mT.to(torch.float32)
    pivots = upper.diagonal()
    return upper if bool(torch.isfinite(pivots).all() & (pivots > 0).all()) else None


def _cholesky_(matrix: Tensor) -> bool:
    """Makes of a symmetric matrix A the upper triangular U with U^T U = A; its upper half is enough. False: it cannot.

    On a CPU in steps: LAPACK takes more than twice as long, and its bits depend on the number of threads. Rows behind a
    corner are multiplied with its inverse, which is as exact here as solving for them: corners are small.
    """
    step = _CHOLESKY if matrix.device.type == "cpu" else len(matrix)
    kept = matrix.new_empty(min(step, len(matrix)), len(matrix))  # one stride for all: oneDNN keeps a kernel for each
    for start in range(0, len(matrix), step):
        part, above, behind = slice(start, start + step), slice(0, start), slice(start + step, len(matrix))
        if start:
            add_product_(matrix[part, start:], matrix[above, part], matrix[above, start:], matrix.dtype, -1)
        corner = matrix[part, part].mT  # of a symmetric matrix, and as LAPACK has its columns: where it lies, if whole
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(corner, out=(corner, info))
        if int(info) != 0:
            return False
        if behind.start < len(matrix):
            eye = torch.eye(step, dtype=matrix.dtype, device=matrix.device)
            inverse = torch.linalg.solve_triangular(corner, eye, upper=False)
            rows = kept[:, behind].copy_(matrix[part, behind])
            add_product_(matrix[part, behind], inverse.T, rows, matrix.dtype, fresh=True)
            matrix[behind, part] = 0.0
    return True


def _turn_around(matrix: Tensor) -> None:
    """Reverses the order of rows and columns of a square matrix, where it lies."""
    size = len(matrix)
    for start in range(0, size // 2, _PANEL):
        stop = min(start + _PANEL, size // 2)
        first, last = matrix[start:stop], matrix[size - stop : size - start]
        kept = first.flip(0, 1)
        first.copy_(last.flip(0, 1))
        last.copy_(kept)
    if size % 2:
        matrix[size // 2] = matrix[size // 2].flip(0)


def _solve_rows(
    jobs: Sequence[Rounding], orders: Sequence[Tensor], part: slice, columns: int, grid: Tensor
) -> list[float]:
    """Rounds the columns of some rows of each job in its order; writes grid values to `grid` [N, jobs, R].

    Returns sum(e^2), e_j = (c_j - q_j) V_jj, over the columns that are live. Dead ones are coupled to no other.

    Until a column is rounded, its place in `grid` holds sum (t_i - q_i) V_ij + c_i F_ij over the columns rounded
    before: what c_i F V^-1 adds to a target, times V.
    """
    cols, size = len(grid), jobs[0].at.size
    targets = torch.empty(grid.shape, dtype=torch.float32, device=grid.device)
    for i, job in enumerate(jobs):
        targets[:, i] = _columns_in(orders[i], job.weight[part])
    scales = [job.at.scale[part].t().contiguous() for job in jobs]
    zeros = [None if job.at.zero is None else job.at.zero[part].t().contiguous() for job in jobs]
    groups = [(order // size).clamp_max_(len(scale) - 1) for order, scale in zip(orders, scales, strict=True)]
    uppers = [job.factor.upper for job in jobs]
    grid.zero_()
    losses = [0.0] * len(jobs)
    for first in range(0, cols, columns):
        last = min(first + columns, cols)
        inside, behind = slice(first, last), slice(last, cols)
        pivots = torch.stack([upper.diagonal()[inside] for upper in uppers], 1).unsqueeze(2)
        couplings = _stacked([upper[inside, inside] for upper in uppers], pivots)
        feds = [job.feed(inside) for job in jobs if job.feed is not None]
        feeds = _stacked([fed[:, : last - first] for fed in feds], pivots) if feds else None
        scale = torch.stack([scale[group[inside]] for scale, group in zip(scales, groups, strict=True)], 1)
        zero = [zero[group[inside]] for zero, group in zip(zeros, groups, strict=True) if zero is not None]
        wanted = targets[inside]
        current = (grid[inside] / pivots).add_(wanted)
        for i, job in enumerate(jobs):
            if job.first is not None and not first:
                current[0, i] = job.first[part]
        own = Grid(jobs[0].at.element, scale, size, torch.stack(zero, 1) if zero else None)
        with limited(1):  # steps are short: beside other work threads would wait for each other in each
            values, differences = _solve_block(wanted, current, couplings, own, feeds)
        grid[inside] = values
        if last < cols:
            for i, upper in enumerate(uppers):
                add_product_(grid[behind, i], upper[inside, behind], differences[:, i], grid.dtype)
            for i, fed in enumerate(feds):
                add_product_(grid[behind, i], fed[:, last - first :], current[:, i], grid.dtype)
        left = current.sub_(values.mul_(scale))
        if not first:
            left[0] = differences[0]
        left.mul_(pivots)
        for i, job in enumerate(jobs):
            live = ~job.factor.dead[orders[i][inside]]
            losses[i] += float(left[live, i].square_().sum(dtype=torch.float64))
    return losses


def _stacked(blocks: Sequence[Tensor], pivots: Tensor) -> Tensor:
    """Returns blocks [B, B] divided by the pivots [B, jobs, 1] of their columns, transposed, as [B, jobs, B]."""
    return torch.stack([block.t() for block in blocks], 1).div_(pivots)


def _solve_block(
    targets: Tensor, current: Tensor, couplings: Tensor, at: Grid, feeds: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns grid values and differences t - q [B, jobs, R] of one block of columns.

    targets   t [B, jobs, R]
    current   c [B, jobs, R] as all columns before the block leave it; becomes what each was when it was rounded
    couplings  [B, jobs, B], place j: how the differences of columns before it in the block reach column j; `feeds`: how
               what they were when they were rounded does
    at        a scale (and zero point) for every column: [B, jobs, R]

    Columns go in runs of `RUN`: those of a run hear of each other one by one, those behind it once it is done.
    """
    values, differences = torch.empty_like(targets), torch.zeros_like(targets)
    links = [(couplings, differences)]
    if feeds is not None:
        links.append((feeds, torch.zeros_like(current)))
    for first in range(0, len(targets), RUN):
        run, behind = slice(first, min(first + RUN, len(targets))), slice(first + RUN, len(targets))
        zero = None if at.zero is None else at.zero[run]
        own = [(link[run, :, run], moved[run]) for link, moved in links]
        here = Grid(at.element, at.scale[run], at.size, zero)
        _solve_run(targets[run], current[run], own, here, values[run])
        if behind.start >= len(targets):
            break
        for job in range(targets.shape[1]):
            for link, moved in links:
                current[behind, job].addmm_(link[behind, job, run], moved[run, job])
    return values, differences


def _solve_run(targets: Tensor, current: Tensor, links: list[tuple[Tensor, Tensor]], at: Grid, values: Tensor) -> None:
    """Rounds a run of columns, as `_solve_block` does a block.

    links   of what moves other columns: how it does so [B, jobs, B], and what it was [B, jobs, R]: the differences, and
            where inputs are fed, what the columns were rounded from; zero until a column is rounded

    A column takes all before it in one product when its turn comes: with the whole run, those behind it being zero. On
    a CPU the loop is bound by the cost of a torch call, on a GPU by launches, which is why jobs go through it together.
    """
    round_, element = codec(at.element).round_, at.element
    scratch = torch.empty(2, *targets.shape[1:], dtype=torch.int32, device=targets.device)
    zeros = [None] * len(targets) if at.zero is None else at.zero.unbind()
    links_of = zip(*(link.unsqueeze(2).unbind() for link, _ in links), strict=True)
    moved_of = zip(*(moved.unbind() for _, moved in links), strict=True)
    all_moved = [moved.transpose(0, 1) for _, moved in links]
    columns = (targets, current, at.scale, values, current.unsqueeze(2))
    loop = zip(*(each.unbind() for each in columns), zeros, links_of, moved_of, strict=True)
    for target, column, scale, value, sums, zero, how, (difference, *before) in loop:
        for link, moved in zip(how, all_moved, strict=True):
            sums.baddbmm_(link, moved)
        round_(torch.div(column, scale, out=value), element, scratch, zero)
        torch.addcmul(target, value, scale, value=-1, out=difference)
        for own in before:
            own.copy_(column)
