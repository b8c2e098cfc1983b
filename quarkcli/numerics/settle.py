"""Solves one problem: scales, damping, column loop, refinement, each choice checked on held-out tokens.

All weights of a problem share one factor, and their rows are independent: choices are made on a sample of rows, then
every row is solved, so many at a time as stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from quarkcli.numerics.grid import decode_matrix, encode_matrix, grid
from quarkcli.numerics.products import through_onednn
from quarkcli.numerics.quantize import Quantized, decode_grid, encode
from quarkcli.numerics.refine import Rows, refine
from quarkcli.numerics.shift import Drift, corrected, feeds, first_rule, least_squares
from quarkcli.numerics.solve import ActOrder, Factor, Rounding, codes_of, factorize, solve_together
from quarkcli.numerics.task import Task, cut, required
from quarkcli.spec import PerGroup

Result = TypeVar("Result")
Steps = Generator[Rounding, tuple[Tensor, float], Result]
# Dampings to choose from. The search starts where tokens per input suggest, and goes the way the held-out loss falls.
DAMPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
STARTS = ((32.0, 0.03), (0.0, 0.1))  # at least so many tokens per input -> damping
# What held-out losses differ by from one choice of rows to another. A neighbour must gain more to be taken; where it
# neither gains nor loses more, it lies on the floor of the curve, and no other is tried.
NOISE = 0.01


class Aim(NamedTuple):
    """The target of a column loop, other than the weights W themselves: a share of the way to what makes W s.

    drift  between the two streams; None: the target is W
    feed   the loop starts from W, and columns hand on what their inputs have lost (GPTAQ); refinement goes for the
           target. Else the loop goes for the target, and the column rounded first is chosen by `shift.first_rule`
    """

    drift: Drift | None = None
    share: float = 0.0
    feed: bool = False

    def times(self, strength: float) -> Aim:
        return self._replace(share=self.share * strength)


@dataclass(frozen=True)
class Choices:
    """The choices that a solver leaves open.

    damps      dampings; one: given
    strengths  of the aim, in the order they are tried; one: given
    sweeps     of refinement
    act_order  see `factorize`
    tokens     that the second moment is the mean of
    """

    damps: tuple[float, ...]
    strengths: tuple[float, ...]
    sweeps: int
    act_order: ActOrder
    tokens: int


class Objective:
    """The loss of quantized weights over some tokens.

    gram   E[x x^T], float32 [N, N], of what they read
    cross  E[x s^T], float32 [N, N], where they go for W s instead of W x
    """

    def __init__(self, gram: Tensor, cross: Tensor | None = None) -> None:
        self.gram, self.cross = gram, cross
        self._pull: Tensor | None = None

    def loss(self, weight: Tensor, quantized: Tensor) -> Tensor:
        """Returns ||W x - Q x||^2 of every row, float32 [R]; of ||W s - Q x||^2 what a choice of Q changes.

        With Q = W + E that is tr(E H E^T) + 2 tr(E (H - C) W^T), C = E[x s^T].
        """
        error = quantized - weight
        with through_onednn():
            pull = error @ self.gram
        more = self._pull if self._pull is not None else self._pulled(weight)
        if more is not None:
            pull -= more
        return pull.mul_(error).sum(1)

    def of(self, weight: Tensor) -> None:
        """Is of these weights from now on; C, which is as large as H, is forgotten."""
        self._pull, self.cross = self._pulled(weight), None

    def _pulled(self, weight: Tensor) -> Tensor | None:
        if self.cross is None:
            return None
        nothing_dead = torch.zeros(len(self.gram), dtype=torch.bool, device=weight.device)
        return Drift(self.gram, self.cross, nothing_dead).under(weight).mul_(2)

    def energy(self, weight: Tensor) -> Tensor:
        """Returns ||W x||^2 of every row, float32 [R]."""
        with through_onednn():
            return (weight @ self.gram).mul_(weight).sum(1)


@dataclass
class Settled:
    """Codes and scales of every weight, and how they were chosen.

    damp, strength, sweeps   as used
    attempts                 dampings that the factorization took
    before, after            objective of rounding to nearest with the same scales, and of the result, on the tokens
                             that were solved on: the mean over weights of what a sample of their rows loses of their
                             output; `held_before`, `held_after`: on held-out tokens
    nearest                  rounded to nearest with the same scales, which loses less on held-out tokens
    """

    quantized: list[Quantized]
    damp: float
    strength: float
    sweeps: int
    attempts: int
    before: float
    after: float
    held_before: float | None
    held_after: float | None
    nearest: bool = False


def together(all_steps: Sequence[Steps[Settled | None]]) -> list[Settled | None]:
    """Returns the solutions of problems whose loops over columns are run together where they are alike."""
    found: list[Settled | None] = [None] * len(all_steps)
    waiting: dict[int, Rounding] = {}

    def go_on(number: int, *answer: tuple[Tensor, float]) -> None:
        try:
            waiting[number] = all_steps[number].send(*answer) if answer else next(all_steps[number])
        except StopIteration as end:
            found[number] = end.value

    for number in range(len(all_steps)):
        go_on(number)
    while waiting:
        first = next(iter(waiting.values())).alike()
        numbers = [number for number, job in waiting.items() if job.alike() == first]
        answers = solve_together([waiting.pop(number) for number in numbers])
        for number in numbers:
            go_on(number, answers.pop(0))
    return found


def steps(
    task: Task,
    gram: Tensor,
    choices: Choices,
    aim: Callable[[Factor, float], Aim],
    held: Objective | None,
) -> Steps[Settled | None]:
    """Returns the solution of a problem; None where the second moment has no factor.

    It yields every loop over columns that is to be run, and is sent its result.

    gram   second moment of the inputs, float32 [N, N]; its diagonal is raised for a while, and put back
    aim    what the loop steers for, of a factor and a strength
    held   objective on held-out tokens, which will be of some rows alone; None: there are none, and the first of the
           choices is taken
    """
    trial = _Trial(task, gram, choices, aim, held)
    if not trial.start():
        return None
    if held is not None:
        yield from trial.choose_damp()
        yield from trial.choose_strength()
        if trial.strength != choices.strengths[0]:
            yield from trial.choose_damp()  # the best damping depends on what is aimed for
    quantized = yield from _all_rows(task, trial)
    before, after = trial.objectives(quantized)
    result = Settled(
        quantized, trial.factor.damp, trial.strength, trial.sweeps, trial.factor.attempts,
        before[0], after[0], before[1], after[1],
    )  # fmt: skip
    if result.held_before is not None and result.held_after is not None and result.held_before < result.held_after:
        return _to_nearest(task, result)
    return result


def _to_nearest(task: Task, result: Settled) -> Settled:
    """Returns the rounding to nearest that lost less than a result: with the scales that it was judged with."""
    pairs = zip(task.weights, task.params, strict=True)
    quantized = [Quantized(encode(weight, task.spec, params), params) for weight, params in pairs]
    return replace(result, quantized=quantized, after=result.before, held_after=result.held_before, nearest=True)


class _Trial:
    """One problem on its sample of rows, with the choices so far.

    Losses are shares of the outputs of the weights that they are of, so that every weight counts alike: a transform
    that makes one of them larger changes no choice.
    """

    def __init__(
        self,
        task: Task,
        gram: Tensor,
        choices: Choices,
        aim: Callable[[Factor, float], Aim],
        held: Objective | None,
    ) -> None:
        self.task, self.gram, self.choices, self.held = task, gram, choices, held
        self.sample = task.sample()
        if held is not None:
            held.of(task.rows(self.sample).weight)
        self._aim = aim
        self.seen = Objective(gram)
        self._shares: dict[Objective, Tensor] = {}
        self.strength = choices.strengths[0]
        self.sweeps = choices.sweeps
        self.factor: Factor
        self.aimed: Aim
        self.at = self._start()  # the damping, where it is chosen
        self.least: float | None = None  # the held-out objective of the choices so far, where it is known

    def start(self) -> bool:
        damps = self.choices.damps
        found = self._factorize(DAMPS[self.at] if len(damps) > 1 else damps[0])
        if found is None:
            return False
        self._take(found, self.strength)
        return True

    def choose_damp(self) -> Steps[None]:
        """Goes from the damping it has to the neighbours in the list, as long as the held-out objective falls."""
        if len(self.choices.damps) == 1:
            return
        first = least = yield from self._held_loss()
        for direction in (1, -1):
            while 0 <= self.at + direction < len(DAMPS):
                loss = yield from self._try_damp(DAMPS[self.at + direction], least - NOISE * abs(least))
                if loss is None or loss > least + NOISE * abs(least):
                    break
                if loss >= least - NOISE * abs(least):
                    self.least = least
                    return
                least = loss
                self.at += direction
            if least < first:
                break
        self.least = least

    def _try_damp(self, damp: float, below: float) -> Steps[float | None]:
        """Takes a damping if the held-out objective falls below this; returns that objective.

        None where the damping has no factor. At most two factors are held.
        """
        kept = self.factor, self.aimed
        found = self._factorize(damp)
        if found is None:
            return None
        self._take(found, self.strength)
        loss = yield from self._held_loss()
        if loss >= below:
            self.factor, self.aimed = kept
        return loss

    def _start(self) -> int:
        """Returns the place in the list that the search starts from."""
        each = self.choices.tokens / len(self.gram)
        return DAMPS.index(next(damp for limit, damp in STARTS if each >= limit))

    def choose_strength(self) -> Steps[None]:
        """Goes through the strengths in their order as long as the held-out objective falls."""
        if len(self.choices.strengths) == 1:
            return
        if self.least is None:
            self.least = yield from self._held_loss()
        for strength in self.choices.strengths[1:]:
            kept = self.strength, self.aimed
            self._take(self.factor, strength)
            loss = yield from self._held_loss()
            if loss >= self.least:
                self.strength, self.aimed = kept
                break
            self.least = loss

    def run(self, rows: Rows, sweeps: int, last: bool = False) -> Steps[Rows]:
        """Chooses the codes of rows, and their scales anew when they are refined.

        last   no loop over columns comes after this one: the factor goes before they are refined
        """
        source = rows.weight
        rows.values, _ = yield self._rounding(rows, moved=bool(sweeps))
        if last:
            self.factor.upper, self.aimed = self.factor.upper.new_empty(0), Aim()
        if sweeps:
            with _Raised(self.gram, self.factor.ridge):
                refine(rows, self.task.spec, self.gram, sweeps)
        rows.weight = source
        return rows

    def _rounding(self, rows: Rows, moved: bool) -> Rounding:
        """Returns the loop over columns that goes to the target.

        moved   the weights of rows are to be the target afterwards, whether the loop asks for that or not
        """
        drift, share, feed = self.aimed
        source, factor = rows.weight, self.factor
        if drift is None:
            return Rounding(source, factor, rows.grid())
        if moved or not feed:
            rows.weight = least_squares(source, drift, factor).mul_(share).add_(source)
        if feed:
            return Rounding(source, factor, rows.grid(), lambda part: feeds(drift, factor, part).mul_(share))
        first = corrected(source, first_rule(drift, factor) * share, factor)
        return Rounding(rows.weight, factor, rows.grid(), first=first)

    def objectives(self, chosen: Sequence[Quantized]) -> tuple[tuple[float, float | None], tuple[float, float | None]]:
        """Returns the objective, and that on held-out tokens, of rounding to nearest, and of what was chosen."""
        rows = self.task.rows(self.sample)
        source, spec = rows.weight, self.task.spec
        done = []
        for index, part in self.sample:
            quantized = chosen[index]
            at = grid(quantized.params, spec, quantized.codes.shape)
            own = replace(at, scale=at.scale[part], zero=cut(at.zero, part))
            done.append(decode_matrix(quantized.codes[part], own))
        result = []
        for made in (_nearest(rows), torch.cat(done)):
            held = self._loss(self.held, source, made) if self.held is not None else None
            result.append((self._loss(self.seen, source, made), held))
        return result[0], result[1]

    def _loss(self, objective: Objective, weight: Tensor, quantized: Tensor) -> float:
        """Returns the mean over weights of the share of its output that each loses, of its rows in the sample."""
        if objective not in self._shares:
            counts = [len(self.task.weights[index][part]) for index, part in self.sample]
            energies = [own.sum() for own in objective.energy(weight).split(counts)]
            each = torch.stack(energies).clamp_min(torch.finfo(torch.float32).tiny).reciprocal() / len(energies)
            self._shares[objective] = each.repeat_interleave(torch.tensor(counts, device=each.device))
        return float(objective.loss(weight, quantized) @ self._shares[objective])

    def _factorize(self, damp: float) -> Factor | None:
        granularity = self.task.spec.granularity
        group = granularity.size if isinstance(granularity, PerGroup) else None
        return factorize(self.gram, damp=damp, act_order=self.choices.act_order, group=group)

    def _take(self, factor: Factor, strength: float) -> None:
        self.factor, self.strength = factor, strength
        self.aimed = self._aim(factor, strength)

    def _held_loss(self) -> Steps[float]:
        assert self.held is not None
        rows = yield from self.run(self.task.rows(self.sample), 0)
        return self._loss(self.held, rows.weight, rows.decoded())


def _all_rows(task: Task, trial: _Trial) -> Steps[list[Quantized]]:
    codes: list[Tensor | None] = [None] * len(task.weights)
    params = [replace(p, scale=p.scale.clone() if p.scale is not None else None) for p in task.params]
    pieces = list(task.pieces())
    for number, run in enumerate(pieces, 1):
        rows = yield from trial.run(task.rows(run), trial.sweeps, number == len(pieces))
        found = codes_of(rows.values, rows.grid())
        start = 0
        for index, part in run:
            stop = start + part.stop - part.start
            whole = codes[index]
            if whole is None:
                whole = codes[index] = torch.empty(task.weights[index].shape, dtype=found.dtype, device=found.device)
            whole[part] = found[start:stop]
            if rows.stored is not None:
                required(params[index].scale)[part] = rows.stored[start:stop]
            start = stop
    return [Quantized(required(code), own) for code, own in zip(codes, params, strict=True)]


def _nearest(rows: Rows) -> Tensor:
    """Returns rows rounded to the nearest values of their scales."""
    codes = encode_matrix(rows.weight, rows.grid())
    zero = rows.wide_zero()
    values = decode_grid(codes, rows.element) if zero is None else codes.float() - zero
    return values * rows.wide()


class _Raised:
    """Adds a ridge to the diagonal of a matrix for a while."""

    def __init__(self, matrix: Tensor, ridge: float) -> None:
        self.diagonal, self.ridge = matrix.diagonal(), ridge
        self.kept = self.diagonal.clone()

    def __enter__(self) -> None:
        self.diagonal.add_(self.ridge)

    def __exit__(self, *_: object) -> None:
        self.diagonal.copy_(self.kept)
