"""Chooses the best candidate of every group for a budget, and says what that costs and loses. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quarkcli.disk.writer import tensor_bytes
from quarkcli.errors import ConfigError
from quarkcli.search.allocate import allocate
from quarkcli.search.candidates import Candidate, Group, Space, bits, stored

_TINY = 1e-9  # of a bit: budgets are decimal, sizes are not


@dataclass(frozen=True)
class Choice:
    """A candidate for every group.

    bits  mean bits per weight that counts
    size  bytes of the checkpoint's safetensors files, to within their headers
    loss  predicted KL divergence per token, in nats
    """

    chosen: Mapping[str, str]
    bits: float
    size: int
    loss: float

    def count(self, candidate: str) -> int:
        """Returns the number of groups that have a candidate."""
        return list(self.chosen.values()).count(candidate)


class Choosing:
    """Groups with what every candidate costs and loses.

    losses   by (group, candidate)
    """

    def __init__(
        self,
        space: Space,
        groups: Sequence[Group],
        losses: Mapping[tuple[str, str], float],
        unjudged: Sequence[str] = (),
    ) -> None:
        self.space = space
        self.groups = groups
        self.losses = losses
        self.options = [[space.named(name) for name in group.allowed] for group in groups]
        self.counted = sum(group.counted for group in groups)
        if not self.counted:
            raise ConfigError(
                "none of the weights that are searched counts in the budget",
                hint="remove patterns from cost_excluded_layers",
                kind="E-SEARCH",
            )
        self.bits = {(g.name, c.name): bits(g, c) for g, own in self._pairs() for c in own}
        self.sizes = {(g.name, c.name): stored(g, c) for g, own in self._pairs() for c in own}
        self.rest = _rest(space, groups, unjudged)

    def _pairs(self) -> list[tuple[Group, list[Candidate]]]:
        return list(zip(self.groups, self.options, strict=True))

    def of_bits(self, budget: float) -> Choice:
        """Returns the best choice of at most so many bits per weight. Raises ConfigError when there is none."""
        found = self._best(self.bits, int(budget * self.counted + _TINY * self.counted))
        if found is None:
            low, high = self.span()
            raise ConfigError(
                f"{budget:g} bits per weight are too few; the smallest choice takes {low:.4g}",
                where="--budget",
                hint=f"use a value between {_up(low)} and {high:.4g}, or add a smaller scheme",
                kind="E-BUDGET-SMALL",
            )
        return found

    def of_size(self, size: int) -> Choice:
        """Returns the best choice with files of at most so many bytes. Raises ConfigError when there is none."""
        found = self._best(self.sizes, size - self.rest)
        if found is None:
            least = self.rest + sum(min(self.sizes[g.name, c.name] for c in own) for g, own in self._pairs())
            raise ConfigError(
                f"{size:,} bytes are too few; the smallest choice takes {least:,}, of which {self.rest:,} are "
                "tensors that are not searched",
                where="--size",
                hint="use a larger size, or add a smaller scheme",
                kind="E-BUDGET-SMALL",
            )
        return found

    def span(self) -> tuple[float, float]:
        """Returns the least and the most bits per weight."""
        ends = [[self.bits[g.name, c.name] for c in own] for g, own in self._pairs()]
        return sum(map(min, ends)) / self.counted, sum(map(max, ends)) / self.counted

    def curve(self, points: int) -> list[Choice]:
        """Returns the best choices for budgets from the least to the most bits, without those that are one."""
        low, high = self.span()
        budgets = [low + (high - low) * step / (points - 1) for step in range(points)]
        found: dict[tuple[str, ...], Choice] = {}
        for choice in map(self.of_bits, budgets):
            found.setdefault(tuple(choice.chosen.values()), choice)
        return list(found.values())

    def whole(self, candidate: str) -> Choice | None:
        """Returns the choice of one candidate for all groups; None when some group may not get it."""
        if not all(candidate in group.allowed for group in self.groups):
            return None
        return self.choice([candidate] * len(self.groups))

    def choice(self, names: Sequence[str]) -> Choice:
        """Returns the choice of these candidates, one per group."""
        pairs = [(group.name, name) for group, name in zip(self.groups, names, strict=True)]
        return Choice(
            dict(pairs),
            sum(self.bits[pair] for pair in pairs) / self.counted,
            self.rest + sum(self.sizes[pair] for pair in pairs),
            sum(self.losses[pair] for pair in pairs),
        )

    def _best(self, costs: Mapping[tuple[str, str], int], budget: int) -> Choice | None:
        options = [[(costs[g.name, c.name], self.losses[g.name, c.name]) for c in own] for g, own in self._pairs()]
        found = allocate(options, budget)
        if found is None:
            return None
        return self.choice([own[index].name for index, (_, own) in zip(found, self._pairs(), strict=True)])


def _rest(space: Space, groups: Sequence[Group], unjudged: Sequence[str]) -> int:
    """Returns the bytes of a checkpoint's files that are no group's."""
    base = next(candidate for candidate in space.candidates if candidate.prepared is space.base)
    plan = space.base.plan
    left = Group("", 0, tuple(plan.targets[name] for name in unjudged), ())
    kept = sum(tensor_bytes(target.dtype, target.shape) for target in left.targets)
    searched = sum(stored(group, base) for group in (*groups, left))
    return space.base.forecast.output_bytes - searched + kept


def _up(value: float) -> str:
    """Returns a number of bits that is not below `value`, in few digits."""
    return f"{value + 0.0005:.3f}"
