"""Searches factors of channels: candidates, their loss on sampled rows, and a proof on held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms import _parameters
from quarkcli.algorithms._scaling import ChannelScaling, Rows, quantized
from quarkcli.algorithms.base import Assignment
from quarkcli.family import Pair
from quarkcli.plan.model import Part, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.algorithms._channels import Channels
    from quarkcli.numerics.sample import Sample


MARGIN = 0.01  # less than this share of gain on held-out rows is within what sampling rows leaves open


class SearchedScaling(ChannelScaling):
    """Chooses among candidates by what quantization then costs; 1 everywhere is always one of them.

    n_grid  number of steps of the exponent between 0 and 1
    """

    kinds = frozenset({"samples"})
    norms_first = True
    power: ClassVar[int] = 2

    def __init__(self, scaling_layers: Rows, n_grid: int) -> None:
        super().__init__(scaling_layers)
        self.n_grid = _parameters.whole(f"{self.name} n_grid", n_grid, 1, 1000)

    def kinds_of(self, plan: Plan, part: Part, pair: Pair) -> frozenset[str]:
        inputs = (target.input for target in quantized(plan.targets, pair))
        ranges = any(spec is not None and spec.needs_amax for spec in inputs)
        return self.kinds | {"channel_absmax"} if ranges else self.kinds

    def candidates(self, channels: Channels, sample: Sample) -> dict[str, Callable[[float], Tensor]]:
        """Returns what makes factors of a ratio, by kind; `sample`: of the activation."""
        raise AssertionError("a search has candidates")

    def factors(self, channels: Channels) -> tuple[Tensor | None, dict[str, Any]]:
        import torch

        from quarkcli.algorithms._trials import Trial
        from quarkcli.numerics.smooth import Choice, search

        trial = Trial(channels, self.solvers(channels.part.plan), self.power)
        if trial.fitted is None:
            return None, {"reason": "no calibration token"}
        ones = torch.ones(channels.count, device=trial.fitted.rows.device)
        plain = Choice("none", 0.0, ones, trial.cost(ones))
        best = search(self.candidates(channels, trial.fitted), self.n_grid, trial.cost, [plain])
        facts: dict[str, Any] = {"before": plain.cost, "after": best.cost}
        if best is plain:
            return None, facts | {"reason": "no candidate is better"}
        facts |= {"kind": best.kind, "ratio": round(best.ratio, 4)}
        proof = trial.proof(best.factors)
        if proof is not None:
            facts |= {"held_out_before": proof[0], "held_out_after": proof[1]}
            if not proof[1] < proof[0] * (1 - MARGIN):
                return None, facts | {"reason": "not better on held-out rows"}
        return best.factors, facts

    def solvers(self, plan: Plan) -> dict[str, Assignment]:
        """Returns the solver of every quantized weight."""

        def found() -> dict[str, Assignment]:
            steps = [step for step in _steps(plan) if step.kind == "solver"]
            return {t.name: next(s for s in steps if s.takes(t)) for t in plan.quantized()}

        return plan.once("solvers", found)

    def turned(self, plan: Plan) -> dict[str, int]:
        """Returns weights whose inputs the server turns by a Hadamard, with the size of its blocks."""
        return plan.once("turned", lambda: {n: b for step in _steps(plan) for n, b in step.online(plan).items()})


def _steps(plan: Plan) -> list[Assignment]:
    from quarkcli import algorithms

    return algorithms.pipeline(plan)
