"""The contract of an algorithm. What it declares is torch-free; `apply` imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from quarkcli.plan.model import Plan, Target
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.calibration.statistics import Statistics
    from quarkcli.numerics.quantize import Quantized


@dataclass
class PartWork:
    """One part on its way through the algorithms.

    targets   its quantized weights, in plan order
    weight    source weight [out, in] of a target, in the source's dtype, on the device
    amax      amax (float32 []) that the scale group of a target shares, or None when its scales are its own
    finish    hand over a finished weight; called once per target, after which its codes may be forgotten
    warn      a sentence for the log and the report
    losses    what a solver left over, by weight; for the report
    dead_inputs  how many inputs of a weight never moved in calibration, by weight; for the report
    """

    targets: list[Target]
    weight: Callable[[Target], Tensor]
    amax: Callable[[Target], Tensor | None]
    finish: Callable[[Target, Quantized], None]
    warn: Callable[[str], None]
    losses: dict[str, float] = field(default_factory=dict)
    dead_inputs: dict[str, int] = field(default_factory=dict)


class Algorithm(Protocol):
    """What a member's class offers.

    kind         `transform` rewrites weights without changing the function, `solver` chooses the codes
    parameters   what a recipe may set, with their defaults
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Literal["transform", "solver"]: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...

    def needs(self, plan: Plan) -> dict[str, set[str]]:
        """Kinds of statistics by site name; empty: no data."""

    def check(self, plan: Plan) -> None:
        """Raises ConfigError when the plan is not one it can work on."""

    def apply(self, work: PartWork, statistics: Statistics | None) -> None:
        """Work on one part. A solver calls `work.finish` for every target."""


class Limited:
    """An algorithm on the weights of these names alone (`slots` of a recipe's step)."""

    def __init__(self, algorithm: Algorithm, weights: frozenset[str]) -> None:
        self.algorithm = algorithm
        self.weights = weights
        self.name, self.kind, self.parameters = algorithm.name, algorithm.kind, algorithm.parameters

    def needs(self, plan: Plan) -> dict[str, set[str]]:
        return self.algorithm.needs(self._part_of(plan))

    def check(self, plan: Plan) -> None:
        self.algorithm.check(self._part_of(plan))

    def apply(self, work: PartWork, statistics: Statistics | None) -> None:
        mine = [target for target in work.targets if target.name in self.weights]
        if mine:
            self.algorithm.apply(replace(work, targets=mine), statistics)

    def _part_of(self, plan: Plan) -> Plan:
        return replace(plan, targets={name: t for name, t in plan.targets.items() if name in self.weights})


def weight_sites(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """Targets by the activation they read."""
    sites: dict[str, list[Target]] = {}
    for target in targets:
        if target.site is not None:
            sites.setdefault(target.site, []).append(target)
    return sites


def same_spec(targets: list[Target]) -> dict[TensorSpec, list[Target]]:
    """Targets by weight spec, in order."""
    out: dict[TensorSpec, list[Target]] = {}
    for target in targets:
        if target.weight is not None:
            out.setdefault(target.weight, []).append(target)
    return out
