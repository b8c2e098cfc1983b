"""Chooses one option per group so that the sum of losses is least under a budget: exact, by states and bounds.

A state is what the groups so far cost and lose. Of two states the one that costs and loses no less goes, and so does
one that could not beat the best known choice even if the groups that are left were divisible: that relaxation is solved
by walking down the convex hull of every group's options. Few states are left, and none of them is an optimum's rival.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

_SLACK = 1e-12  # of the loss: sums of floats in another order


class Option(NamedTuple):
    """An option of a group: its cost, its loss, and its number in the group."""

    cost: int
    loss: float
    number: int


class _State(NamedTuple):
    """A choice for the groups so far: its cost, its loss, and the way there."""

    cost: int
    loss: float
    number: int = -1
    before: _State | None = None


def allocate(groups: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """Returns the option of every group with the least sum of losses, of equal ones the cheapest; None: none fits.

    groups   options as (cost, loss); costs are whole numbers
    """
    options = [_undominated(group) for group in groups]
    if sum(group[0].cost for group in options) > budget:
        return None
    bounds = [_Bound(options[place:]) for place in range(len(options) + 1)]
    best = _greedy(options, budget)
    states = [_State(0, 0.0)]
    for place, group in enumerate(options):
        states = _extended(states, group, bounds[place + 1], budget, best)
    least = min(states, key=lambda state: (state.loss, state.cost))
    return _way(least)


def _extended(
    states: Sequence[_State], group: Sequence[Option], bound: _Bound, budget: int, best: float
) -> list[_State]:
    """Returns the states with one more group that may still be part of an optimum, by rising cost."""
    limit = best + _SLACK * max(1.0, abs(best))
    made = sorted(
        _State(state.cost + option.cost, state.loss + option.loss, option.number, state)
        for state in states
        for option in group
        if state.cost + option.cost + bound.least_cost <= budget
    )
    kept: list[_State] = []
    for state in made:
        if kept and state.loss >= kept[-1].loss:
            continue
        if state.loss + bound(budget - state.cost) <= limit:
            kept.append(state)
    return kept


def _way(state: _State) -> list[int]:
    found: list[int] = []
    while state.before is not None:
        found.append(state.number)
        state = state.before
    return found[::-1]


def _undominated(group: Sequence[tuple[int, float]]) -> list[Option]:
    """Returns the options that lose less than every cheaper one, by rising cost."""
    kept: list[Option] = []
    for option in sorted(Option(cost, loss, number) for number, (cost, loss) in enumerate(group)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _hull(group: Sequence[Option]) -> list[Option]:
    """Returns the options on the lower convex hull, by rising cost."""
    hull: list[Option] = []
    for option in group:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(one: Option, other: Option) -> float:
    return (other.loss - one.loss) / (other.cost - one.cost)


def _steps(groups: Sequence[Sequence[Option]]) -> list[tuple[float, int, float, int]]:
    """Returns steps down the hulls of all groups, steepest first: (slope, cost, loss, group)."""
    found = []
    for place, group in enumerate(groups):
        hull = _hull(group)
        for one, other in pairwise(hull):
            found.append((_slope(one, other), other.cost - one.cost, other.loss - one.loss, place))
    return sorted(found)


class _Bound:
    """A lower bound on what groups lose together with a budget: their options divisible."""

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        steps = _steps(groups)
        self.least_cost = sum(group[0].cost for group in groups)
        self.costs = list(accumulate((cost for _, cost, _, _ in steps), initial=self.least_cost))
        self.losses = list(accumulate((loss for _, _, loss, _ in steps), initial=sum(g[0].loss for g in groups)))

    def __call__(self, budget: int) -> float:
        at = bisect_right(self.costs, budget) - 1
        if at + 1 == len(self.costs):
            return self.losses[at]
        share = (budget - self.costs[at]) / (self.costs[at + 1] - self.costs[at])
        return self.losses[at] + share * (self.losses[at + 1] - self.losses[at])


def _greedy(groups: Sequence[Sequence[Option]], budget: int) -> float:
    """Returns the loss of a good choice within the budget: the steepest steps that fit, each group's in turn."""
    left = budget - sum(group[0].cost for group in groups)
    loss = sum(group[0].loss for group in groups)
    closed: set[int] = set()
    for _, cost, change, place in _steps(groups):
        if place in closed or cost > left:
            closed.add(place)
            continue
        left -= cost
        loss += change
    return loss
