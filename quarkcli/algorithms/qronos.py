"""Qronos (arXiv 2505.11695): rounds the weights whose output on the served inputs is nearest to the source's output.

It sees two streams: x, what the quantized blocks below hand on, and s, the same token's in the source model. The loop
is GPTQ's on the float weights W' for which W' x comes nearest to W s. How far to go from W to W' is chosen on held-out
tokens, 0 (GPTQ) among the choices. Refinement goes for the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms import _parameters
from quarkcli.algorithms._twostream import TwoStreamSolver
from quarkcli.algorithms.base import Problem
from quarkcli.errors import ConfigError

if TYPE_CHECKING:
    from quarkcli.numerics.settle import Choices


class Qronos(TwoStreamSolver):
    """damp_of: what `damp` is a share of: the `mean` of the second moment's diagonal, or its `largest` eigenvalue."""

    name = "qronos"
    feed = False
    parameters: ClassVar[Mapping[str, Any]] = {**TwoStreamSolver.parameters, "damp_of": "mean"}

    def __init__(self, damp_of: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.damp_of = _parameters.one_of("qronos damp_of", damp_of, ("mean", "largest"))
        if self.damp_of == "largest" and self.damp is None:
            raise ConfigError("qronos damp_of: largest has no effect without damp", where="algorithm",
                              hint="add damp: 0.001, or leave damp_of out", kind="E-ALGORITHM-PARAMETER")  # fmt: skip

    def _choices(self, problem: Problem, held: bool) -> Choices:
        choices = super()._choices(problem, held)
        if self.damp_of == "mean":
            return choices
        from quarkcli.numerics.solve import largest_share

        assert problem.moment is not None
        share = largest_share(problem.moment.gram)
        return replace(choices, damps=tuple(damp * share for damp in choices.damps))


ALGORITHM = Qronos
