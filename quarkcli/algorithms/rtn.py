"""Round to nearest: scales from amax, every weight to its nearest code. Needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quarkcli.algorithms.base import PartWork
from quarkcli.plan.model import Plan

if TYPE_CHECKING:
    from quarkcli.calibration.statistics import Statistics


class RoundToNearest:
    name: ClassVar[str] = "rtn"
    kind: ClassVar[Literal["transform", "solver"]] = "solver"
    parameters: ClassVar[dict[str, Any]] = {}

    def needs(self, plan: Plan) -> dict[str, set[str]]:
        return {}

    def check(self, plan: Plan) -> None:
        return None

    def apply(self, work: PartWork, statistics: Statistics | None) -> None:
        from quarkcli.numerics.packed import quantize

        for target in work.targets:
            assert target.weight is not None
            work.finish(target, quantize(work.weight(target), target.weight, amax=work.amax(target)))


ALGORITHM = RoundToNearest
