"""Rounds to nearest: scales from the largest magnitude, each weight to its nearest code. It needs no data.

With `scale_search` every group takes the legal scale that loses least output, by the group's own block of the second
moment of the inputs (ModelOpt's `local_hessian`). That needs data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms import _parameters
from quarkcli.algorithms.base import Needs, Problem, Solver
from quarkcli.plan.model import Plan
from quarkcli.spec import PerGroup

if TYPE_CHECKING:
    from quarkcli.numerics.quantize import Quantized


class RoundToNearest(Solver):
    """Rounds to nearest; `scale_search`: see above."""

    name = "rtn"
    apart = True
    parameters: ClassVar[Mapping[str, Any]] = {"scale_search": False}

    def __init__(self, scale_search: bool = False) -> None:
        self.scale_search = _parameters.flag("rtn scale_search", scale_search)

    def needs(self, plan: Plan) -> Needs:
        if not self.scale_search:
            return {}
        return {target.site: {"gram"} for target in plan.quantized() if target.site is not None}

    def solve(self, problem: Problem) -> list[Quantized]:
        from quarkcli.numerics.packed import quantize

        if self.scale_search and problem.moment is not None:
            return _searched(problem)
        spec = problem.spec
        rows = zip(problem.weights, problem.amax, problem.known or [None] * len(problem.weights), strict=True)
        return [quantize(weight, spec, amax=amax, known=known) for weight, amax, known in rows]

    def solve_many(self, problems: Sequence[Problem]) -> list[list[Quantized] | None]:
        from quarkcli.numerics import stacked

        first = problems[0]
        if len(problems) == 1 or first.moment is not None or not stacked.takes(first.spec, first.weights[0].device):
            return super().solve_many(problems)
        weights = [weight for problem in problems for weight in problem.weights]
        amax = [own for problem in problems for own in problem.amax]
        known = [own for problem in problems for own in problem.known]
        found = iter(stacked.quantize(weights, first.spec, amax, known))
        return [[next(found) for _ in problem.weights] for problem in problems]

    def at_once(self, shape: tuple[int, int]) -> int:
        from quarkcli.numerics import stacked

        return stacked.at_once(shape)


def _searched(problem: Problem) -> list[Quantized]:
    from quarkcli.numerics.fit import column_importance, diagonal_blocks, fitted
    from quarkcli.numerics.quantize import Quantized, encode

    assert problem.moment is not None
    spec, gram = problem.spec, problem.moment.gram
    grouped = isinstance(spec.granularity, PerGroup)
    cost = diagonal_blocks(gram, spec.granularity.size) if grouped else column_importance(gram)  # type: ignore[union-attr]
    found = [fitted(w, spec, amax, cost) for w, amax in zip(problem.weights, problem.amax, strict=True)]
    return [Quantized(encode(w, spec, params), params) for w, params in zip(problem.weights, found, strict=True)]


ALGORITHM = RoundToNearest
