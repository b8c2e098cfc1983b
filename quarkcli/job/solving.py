"""Runs solvers and refiners on the weights of a part, problem by problem."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import takewhile
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from quarkcli.algorithms.base import Assignment, Moment, Needs, Outcome, Problem, Refiner, Solver
from quarkcli.algorithms.rtn import RoundToNearest
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.weights import WeightSource
from quarkcli.errors import DataError, QuarkError
from quarkcli.forward.group import Group
from quarkcli.forward.joining import hand_over
from quarkcli.forward.statistics import Statistics
from quarkcli.job.problems import alike, average_size, in_order, owners, problems, runs, stacks
from quarkcli.numerics import exact, stacked
from quarkcli.numerics.finite import is_finite
from quarkcli.numerics.observers import weight_amax
from quarkcli.numerics.quantize import Quantized, dequantize, tensor_amax
from quarkcli.numerics.ranges import known_range
from quarkcli.numerics.solve import dead_inputs
from quarkcli.plan.model import Plan, QuantizedTarget
from quarkcli.threads import Workers

Solved = tuple[QuantizedTarget, Tensor, Quantized]  # with the source weight
Work = Callable[[], Iterator[Solved]]
Weights = Callable[[QuantizedTarget], Tensor]


class Solving:
    """The solvers and refiners of a run.

    source        where weights come from that have codes already
    skip          round to nearest where statistics or results are not finite; else they are an error
    workers       do what needs no statistics

    dead_inputs   weight -> how many of its inputs were always zero in calibration, of the part last solved
    exact         weight that no solver was asked for, because its format holds it -> how many blocks were rounded, of
                  the part last solved
    seconds       weight -> what solving took; what is solved together shares it evenly
    skipped       weight that was rounded to nearest instead -> what was not finite, of the part last solved
    """

    def __init__(
        self,
        plan: Plan,
        steps: Iterable[Assignment],
        warn: Callable[[str], None],
        source: WeightSource | None = None,
        skip: bool = False,
        workers: Workers | None = None,
        group: Group | None = None,
    ) -> None:
        steps = list(steps)
        self.plan, self.source = plan, source
        self.solvers = [(s, s.algorithm, s.needs(plan)) for s in steps if isinstance(s.algorithm, Solver)]
        self.refiners = [(s, s.algorithm) for s in steps if isinstance(s.algorithm, Refiner)]
        self.one_by_one = False
        self.is_data_free = not self.refiners and not any(needs for _, _, needs in self.solvers)
        self.staged = any(solver.staged for _, solver, _ in self.solvers)
        self.warn, self.skip = warn, skip
        self.workers = workers or Workers()
        self.group = group or Group()
        self.dead_inputs: dict[str, int] = {}
        self.exact: dict[str, int] = {}
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._outcomes: dict[str, Outcome] = {}

    def begin(self) -> None:
        """Forgets what the last part left behind."""
        self.dead_inputs, self.exact, self.skipped, self.seconds, self._outcomes = {}, {}, {}, {}, {}

    def report(self) -> dict[str, dict[str, Any]]:
        """Returns the outcome of every weight's problem, of the part last solved."""
        return {name: outcome._asdict() for name, outcome in self._outcomes.items()}

    def tuned(self, before: Iterable[Solved], rows: Mapping[str, Solved]) -> None:
        """Notes whose codes or scales tuners changed: what their solver measured holds no more."""
        moved = {target.name for target, _, quantized in before if rows[target.name][2] is not quantized}
        self._outcomes |= {n: o._replace(tuned=True) for n, o in self._outcomes.items() if n in moved}

    def solved(
        self,
        targets: list[QuantizedTarget],
        tensors: Mapping[str, Tensor],
        statistics: Statistics | None,
        stage: int = 0,
        members: list[QuantizedTarget] | None = None,
    ) -> Iterator[Solved]:
        """Yields every weight with its codes and scales. Arguments as in `work`."""
        if self.group.size > 1 and statistics is not None:
            yield from self._divided(targets, tensors, statistics, stage, members)
            return
        for piece in self.work(targets, tensors, statistics, stage, members):
            yield from piece()

    def _divided(
        self,
        targets: list[QuantizedTarget],
        tensors: Mapping[str, Tensor],
        statistics: Statistics,
        stage: int,
        members: list[QuantizedTarget] | None,
    ) -> Iterator[Solved]:
        """Does as `solved`; each rank solves its own problems, and has what the others made of theirs."""
        group, warn = self.group, self.warn
        asked = targets if members is None else members
        rank = owners(asked, group.size)
        hand_over(statistics, asked, rank)
        own = {name for name, owner in rank.items() if owner == group.rank}
        made: dict[str, Solved] = {}
        lines: dict[str, list[str]] = {}  # by the weight whose piece of work said them
        for piece in self.work(targets, tensors, statistics, stage, members, own):
            said: list[str] = []
            self.warn = said.append
            found = {solved[0].name: solved for solved in piece()}
            lines[next(iter(found))] = said
            made |= found
        self.warn = warn
        codes: dict[str, Quantized] = {}
        mine = {name: solved[2] for name, solved in made.items() if name in own}
        for theirs, notes, more in group.gather((mine, self._notes(), lines)):
            codes |= theirs
            lines |= more
            for note, other in zip(self._notes(), notes, strict=True):
                note |= other
        alike = [t for t in asked if t.name in self.plan.carried or t.name in self.exact]
        left = [t for t in asked if t not in alike]
        ordered = [t for step, _, _ in self.solvers for _, t in in_order(t for t in left if step.takes(t))]
        for target in (*alike, *ordered):  # as one process meets them
            for note in self._notes():
                note |= {target.name: note.pop(target.name)} if target.name in note else {}
            for line in lines.get(target.name, ()):
                warn(line)
        for target in (*alike, *ordered):
            weight = target.view.of(tensors[target.view.tensor])
            yield target, weight, codes[target.name]

    def _notes(self) -> tuple[dict[str, Any], ...]:
        return self.dead_inputs, self.exact, self.skipped, self.seconds, self._outcomes

    def work(
        self,
        targets: list[QuantizedTarget],
        tensors: Mapping[str, Tensor],
        statistics: Statistics | None,
        stage: int = 0,
        members: list[QuantizedTarget] | None = None,
        own: set[str] | None = None,
    ) -> Iterator[Work]:
        """Yields pieces of work that give weights with their codes and scales: all together, every one once.

        Without statistics they may be done in any order, by several threads at once; else in turn.

        targets   of the part; `tensors` in source form
        members   those of one stage; None: all
        own       names of those to solve; None: all
        """

        def weight(target: QuantizedTarget) -> Tensor:
            found: Tensor = target.view.of(tensors[target.view.tensor])
            return found

        def amax(target: QuantizedTarget) -> Tensor | None:
            return shared.get(target.scale_group)

        def seen(target: QuantizedTarget) -> Tensor | None:
            return ranges.pop(target.name, None)

        def moment(site: str, expert: int | None) -> Moment | None:
            return statistics.moment(site, expert) if statistics is not None else None

        asked = targets if members is None else members
        if own is not None:
            asked = [target for target in asked if target.name in own]
        if self.plan.carried:
            yield from (partial(self._carried, t, weight) for t in asked if t.name in self.plan.carried)
            targets = [target for target in targets if target.name not in self.plan.carried]
            asked = [target for target in asked if target.name not in self.plan.carried]
        ranges: dict[str, Tensor | None] = {}
        shared = self._group_amax(targets, weight, ranges if statistics is None else None)
        exponents = self._exponents(targets, weight)
        known = [target for target in asked if target.scale_group in exponents]
        yield from (partial(self._exact, target, weight, exponents[target.scale_group]) for target in known)
        asked = [target for target in asked if target.scale_group not in exponents]
        left = Counter(target.site for target in asked)
        for step, solver, needs in self.solvers:
            mine = [target for target in asked if step.takes(target)]
            found = problems(mine, needs, moment, weight, amax, self.warn, self._report, stage, seen)
            together = runs(found, solver.at_once)
            if statistics is None and solver.apart and not self.refiners:
                singles = (single for problem in found for single in problem.singles())
                together = stacks(singles, lambda one: _kind(one.targets[0], one.weights[0]), partial(_many, solver))
            for run in together:
                left.subtract(target.site for problem in run for target in problem.targets)
                site = run[0].site
                if statistics is not None and site is not None and not left[site]:
                    statistics.forget(site)
                lost = [_lost(statistics, problem) for problem in run]
                yield partial(self._run, solver, needs, run, lost)
                del run  # held by its work alone

    def _run(self, solver: Solver, needs: Needs, run: list[Problem], lost: list[str]) -> Iterator[Solved]:
        started = time.perf_counter()
        found = self._solve(solver, needs, run, lost)
        own = (time.perf_counter() - started) / sum(len(problem.targets) for problem in run)
        for problem, quantized in zip(run, found, strict=True):
            started = time.perf_counter()
            refined = self._refine(problem, quantized)
            more = (time.perf_counter() - started) / len(problem.targets)
            for target in problem.targets:
                self.seconds[target.name] = self.seconds.get(target.name, 0.0) + own + more
            yield from zip(problem.targets, problem.weights, refined, strict=True)

    def _carried(self, target: QuantizedTarget, weight: Weights) -> Iterator[Solved]:
        """Yields a weight that keeps the source's codes and scales."""
        assert isinstance(self.source, Checkpoint)
        yield target, weight(target), self.source.decode(self.source.view.targets[target.name]).weight

    def stored_input(self, name: str) -> Tensor:
        """Returns the static scale of the input of a weight that keeps the source's codes and scales."""
        assert isinstance(self.source, Checkpoint)
        scale = self.source.decode(self.source.view.targets[name]).input
        assert scale is not None
        return scale

    def _exact(self, target: QuantizedTarget, weight: Weights, largest: int) -> Iterator[Solved]:
        quantized, self.exact[target.name] = exact.quantize(weight(target), target.weight, largest)
        yield target, weight(target), quantized

    def _group_amax(
        self, targets: list[QuantizedTarget], weight: Weights, ranges: dict[str, Tensor | None] | None
    ) -> dict[str, Tensor]:
        """Returns amax per scale group, for specs with one scale per tensor: fused linears must agree on it.

        ranges   takes the `known_range` of every weight that was looked at
        """

        def own(target: QuantizedTarget) -> Tensor:
            name = f"{target.name}.weight"
            if ranges is not None:
                range_ = ranges[target.name] = named(name, known_range, weight(target), target.weight)
                if range_ is not None:
                    return range_.max().float() if range_.numel() else torch.zeros(())
            amax: Tensor = named(name, weight_amax, weight(target), target.weight)
            return amax

        def all_of(stack: list[QuantizedTarget]) -> list[Tensor]:
            spec = stack[0].weight
            if len(stack) > 1 and ranges is not None and stacked.has_ranges(spec, weight(stack[0]).device):
                with suppress(DataError):  # found again below, with the name of the weight
                    every = stacked.known_ranges([weight(target) for target in stack], spec)
                    ranges.update(zip((target.name for target in stack), every, strict=True))
                    return list(torch.stack(every).flatten(1).amax(1).float().unbind())
            return [own(target) for target in stack]

        asked = alike((t for t in targets if t.weight.has_tensor_scale), lambda t: _kind(t, weight(t)))
        each = stacks(asked, lambda target: _kind(target, weight(target)), lambda target: stacked.at_once(target.shape))
        shared: dict[str, Tensor] = {}
        found = (amax for stack in self.workers.on(average_size(asked)).map(all_of, each) for amax in stack)
        for target, amax in zip(asked, found, strict=True):
            known = shared.get(target.scale_group)
            shared[target.scale_group] = amax if known is None else torch.maximum(known, amax)
        return shared

    def _exponents(self, targets: list[QuantizedTarget], weight: Weights) -> dict[str, int]:
        """Returns the largest exponent of each scale group whose weights all are codes times powers of two."""
        groups: dict[str, list[QuantizedTarget]] = {}
        for target in targets:
            groups.setdefault(target.scale_group, []).append(target)
        groups = {name: own for name, own in groups.items() if all(exact.may_hold(target.weight) for target in own)}

        def largest(members: list[QuantizedTarget]) -> int | None:
            each = [*takewhile(lambda power: power is not None, (exact.exponent(weight(t), t.weight) for t in members))]
            most = max((power for power in each if power is not None), default=0)
            return most if len(each) == len(members) and exact.fits(most) else None

        workers = self.workers.on(average_size(targets))
        found = zip(groups, workers.map(largest, groups.values()), strict=True)
        return {name: power for name, power in found if power is not None}

    def _report(self, targets: Iterable[QuantizedTarget], outcome: Outcome) -> None:
        self._outcomes.update(dict.fromkeys((target.name for target in targets), outcome))

    def _solve(self, solver: Solver, needs: Needs, run: list[Problem], lost: list[str]) -> list[list[Quantized]]:
        """Returns codes and scales of problems; rounded to nearest where the solver has no solution, and said.

        needs   statistics that the solver asked for; without data for them it is not called
        lost    per problem, why there are none; empty: there are, or no token came
        """
        for problem, why in zip(run, lost, strict=True):
            self._look(solver, needs, problem, why)
        try:
            called = run[0].moment is not None or not needs
            solved = self._together(solver, run) if called else [None] * len(run)
            return [self._or_nearest(solver, *pair, called) for pair in zip(run, solved, strict=True)]
        except DataError as error:
            for target, weight in ((t, w) for p in run for t, w in zip(p.targets, p.weights, strict=True)):
                named(f"{target.name}.weight", tensor_amax, weight)  # say which weight it was
            if not self.skip:
                raise
            return [self._nearest(problem, f"{solver.name}: {error.what}") for problem in run]

    def _together(self, solver: Solver, run: list[Problem]) -> list[list[Quantized] | None]:
        """Returns what a solver finds for problems; one after the other once the device's memory did not hold them."""
        if len(run) > 1 and not self.one_by_one:
            try:  # a solver forgets what it needs no longer, of its own copies
                return solver.solve_many([replace(problem, moment=copy(problem.moment)) for problem in run])
            except torch.OutOfMemoryError as error:
                cause = error
            clear_frames(cause.__traceback__)  # they hold the tensors of what failed
            self.one_by_one = True
            self.warn(f"not enough GPU memory: experts are quantized one by one, not {len(run)} together")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if self.one_by_one:
            return [found for problem in run for found in solver.solve_many([problem])]
        return solver.solve_many(run)

    def _nearest(self, problem: Problem, why: str) -> list[Quantized]:
        """Returns the weights of a problem rounded to nearest, because something is not finite, and says so."""
        self.warn(f"{problem.name}: {why}; its weights are rounded to nearest")
        self.skipped.update(dict.fromkeys((target.name for target in problem.targets), why))
        return RoundToNearest().solve(problem)

    def _look(self, solver: Solver, needs: Needs, problem: Problem, lost: str) -> None:
        """Counts the inputs that were always zero, and says where no token came."""
        if problem.moment is not None:
            dead = int(dead_inputs(problem.moment.gram).sum())
            self.dead_inputs.update(dict.fromkeys((target.name for target in problem.targets), dead) if dead else {})
        elif problem.site in needs and lost:
            self.skipped.update(dict.fromkeys((target.name for target in problem.targets), lost))
        elif problem.site in needs:
            self.warn(
                f"{problem.name}: no calibration token reached it; {solver.name} is replaced by rounding to nearest"
            )

    def _or_nearest(
        self, solver: Solver, problem: Problem, solved: list[Quantized] | None, called: bool
    ) -> list[Quantized]:
        if solved is not None:
            return self._checked(solver.name, problem, solved)
        if called:
            tokens = problem.moment.tokens if problem.moment is not None else 0
            self.warn(
                f"{problem.name}: {solver.name} finds no solution with {tokens} tokens; its weights are "
                "rounded to nearest"
            )
        return RoundToNearest().solve(problem)

    def _refine(self, problem: Problem, quantized: list[Quantized]) -> list[Quantized]:
        """Returns the problem's codes and scales after the refiners of its weights."""
        for step, refiner in self.refiners:
            if all(map(step.takes, problem.targets)):
                quantized = self._checked(refiner.name, problem, refiner.refine(problem, quantized))
        return quantized

    def _checked(self, name: str, problem: Problem, quantized: list[Quantized]) -> list[Quantized]:
        """Returns codes and scales; rounded to nearest where these are not finite and are to be passed over."""
        if not self.skip or all(is_finite(dequantize(each, problem.spec)) for each in quantized):
            return quantized
        return self._nearest(problem, f"NaN or inf in the result of {name}")


def _lost(statistics: Statistics | None, problem: Problem) -> str:
    """Returns why a problem has no data, where that is NaN or infinity; else an empty text."""
    if statistics is None or problem.site is None:
        return ""
    return statistics.guard.lost(problem.site, problem.expert) or ""


def _kind(target: QuantizedTarget, weight: Tensor) -> object:
    """Returns a key that is equal for weights that may be rounded above each other."""
    return target.weight, weight.shape, weight.dtype, weight.device


def _many(solver: Solver, problem: Problem) -> int:
    return solver.at_once(problem.shape)


def named(name: str, call: Any, *args: Any) -> Any:
    """Returns `call(*args)`; adds the tensor's name to a user error that has none."""
    try:
        return call(*args)
    except QuarkError as error:
        error.where = f"{name}{error.where or ''}"
        raise
