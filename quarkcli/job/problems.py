"""Groups the weights of a part into problems: one activation, one expert, one stage, one spec each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from quarkcli.algorithms.base import Moment, Needs, Outcome, Problem
from quarkcli.forward.group import dealt
from quarkcli.plan.model import QuantizedTarget

if TYPE_CHECKING:
    from torch import Tensor

SiteKey = tuple[str | None, int | None]  # activation and expert
Item = TypeVar("Item")


def problems(
    targets: Iterable[QuantizedTarget],
    needs: Needs,
    moment: Callable[[str, int | None], Moment | None],
    weight: Callable[[QuantizedTarget], Tensor],
    amax: Callable[[QuantizedTarget], Tensor | None],
    warn: Callable[[str], None],
    report: Callable[[Sequence[QuantizedTarget], Outcome], None],
    stage: int = 0,
    known: Callable[[QuantizedTarget], Tensor | None] = lambda target: None,
) -> Iterator[Problem]:
    """Yields the problems that `targets` make, activation by activation in plan order.

    needs    statistics that the solver asked for, by site; a moment is taken only where it did
    moment   second moment of a site, or of one expert's part of it
    """
    for (site, expert), members in _groups(targets):
        seen = moment(site, expert) if site is not None and needs.get(site) else None
        groups = _same_spec(members)
        for same in groups:
            yield Problem(
                site, expert, stage, tuple(same), tuple(map(weight, same)), tuple(map(amax, same)),
                seen if same is groups[-1] else copy(seen), warn, partial(report, same), tuple(map(known, same)),
            )  # fmt: skip


def in_order(targets: Iterable[QuantizedTarget]) -> Iterator[tuple[SiteKey, QuantizedTarget]]:
    """Yields the weights in the order in which their problems come, with activation and expert."""
    for key, members in _groups(targets):
        for same in _same_spec(members):
            yield from ((key, target) for target in same)


def owners(targets: Iterable[QuantizedTarget], ranks: int) -> dict[str, int]:
    """Returns the rank that solves each weight: those of one activation and expert together, the cost shared out."""
    costs: list[tuple[int, list[str]]] = []
    for _, members in _groups(targets):
        width = members[0].shape[1]
        costs.append((width * width * (width + sum(t.shape[0] for t in members)), [t.name for t in members]))
    found = dealt([cost for cost, _ in costs], ranks)
    return {name: rank for rank, (_, names) in zip(found, costs, strict=True) for name in names}


def runs(problems: Iterable[Problem], at_once: Callable[[tuple[int, int]], int]) -> Iterator[list[Problem]]:
    """Yields problems of one activation's experts together while their shapes and specs are equal, others alone.

    at_once   how many of a shape
    """
    run: list[Problem] = []
    for problem in problems:
        if run and (_alike(problem) != _alike(run[0]) or len(run) >= at_once(problem.shape)):
            yield run
            run = []
        run.append(problem)
        del problem  # held by the run alone, and so freed with it
        if run[0].expert is None or run[0].moment is None:
            yield run
            run = []
    if run:
        yield run


def stacks(
    items: Iterable[Item], key: Callable[[Item], object], at_once: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Yields neighbours that have one key together, as many as `at_once` says of the first."""
    stack: list[Item] = []
    room, last = 0, None
    for item in items:
        own = key(item)
        if stack and (own != last or not room):
            yield stack
            stack = []
        room = room - 1 if stack else at_once(item) - 1
        stack.append(item)
        last = own
        del item  # held by the stack alone, and so freed with it
    if stack:
        yield stack


def alike(items: Iterable[Item], key: Callable[[Item], object]) -> list[Item]:
    """Returns items with those of one key beside each other: keys as they first occur, items of one in their order."""
    found: dict[object, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return [item for own in found.values() for item in own]


def average_size(targets: Collection[QuantizedTarget]) -> float:
    """Returns the average number of values of weights; 0 of none."""
    return sum(math.prod(target.shape) for target in targets) / max(1, len(targets))


def _alike(problem: Problem) -> object:
    shapes = [weight.shape for weight in problem.weights]
    return problem.site, problem.expert is None, problem.moment is None, problem.spec, shapes


def _groups(targets: Iterable[QuantizedTarget]) -> Iterator[tuple[SiteKey, list[QuantizedTarget]]]:
    """Yields weights that read one activation of one expert. Those without a known activation stand alone."""
    sites: dict[str, dict[int | None, list[QuantizedTarget]]] = {}
    alone: list[QuantizedTarget] = []
    for target in targets:
        if target.site is None:
            alone.append(target)
            continue
        experts = sites.setdefault(target.site, {})
        experts.setdefault(target.expert[1] if target.expert else None, []).append(target)
    for site, experts in sites.items():
        for expert, members in experts.items():
            yield (site, expert), members
    for target in alone:
        yield (None, None), [target]


def _same_spec(members: list[QuantizedTarget]) -> list[list[QuantizedTarget]]:
    found: dict[object, list[QuantizedTarget]] = {}
    for target in members:
        found.setdefault(target.weight, []).append(target)
    return list(found.values())
