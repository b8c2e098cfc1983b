"""The contract of an algorithm. What it declares is torch-free; `apply` imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

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
    """

    targets: list[Target]
    weight: Callable[[Target], Tensor]
    amax: Callable[[Target], Tensor | None]
    finish: Callable[[Target, Quantized], None]
    warn: Callable[[str], None]
    losses: dict[str, float] = field(default_factory=dict)


class Algorithm(Protocol):
    """kind: `transform` rewrites weights without changing the function, `solver` chooses the codes.

    parameters   the parameters a recipe may set, with their defaults
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["transform", "solver"]]
    parameters: ClassVar[dict[str, Any]]

    def needs(self, plan: Plan) -> dict[str, set[str]]:
        """Kinds of statistics by site name; empty: no data."""

    def check(self, plan: Plan) -> None:
        """Raises ConfigError when the plan is not one it can work on."""

    def apply(self, work: PartWork, statistics: Statistics | None) -> None:
        """Work on one part. A solver calls `work.finish` for every target."""


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
