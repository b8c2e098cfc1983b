"""Round to nearest: scales from amax, every weight to its nearest code. Needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quarkcli.algorithms.base import Problem, Solver

if TYPE_CHECKING:
    from quarkcli.numerics.quantize import Quantized


class RoundToNearest(Solver):
    name = "rtn"

    def solve(self, problem: Problem) -> list[Quantized]:
        from quarkcli.numerics.packed import quantize

        spec = problem.spec
        return [quantize(w, spec, amax=amax) for w, amax in zip(problem.weights, problem.amax, strict=True)]


ALGORITHM = RoundToNearest
