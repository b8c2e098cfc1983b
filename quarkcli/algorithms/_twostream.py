"""Does what gptaq and qronos share: they see the source model's activations beside the served ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ref

from quarkcli.algorithms import _parameters
from quarkcli.algorithms._columns import TOKENS, ColumnSolver
from quarkcli.algorithms.base import Effort, Needs, Problem
from quarkcli.numerics.rows import cpu_rows
from quarkcli.plan.model import Plan
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from quarkcli.numerics.settle import Aim, Choices
    from quarkcli.numerics.solve import Factor

# A layer that makes the source's output of inputs that are off no longer answers to what is off, which the blocks
# behind it count on: beyond a half, the layer's own loss goes on falling while the model's rises.
STRENGTHS = (0.0, 0.25, 0.5)
CAUTIOUS = 0.25  # where no token is held out
# A target further from the weights than their own norm follows directions that calibration hardly excites.
FURTHEST = 1.0


class TwoStreamSolver(ColumnSolver):
    """Rounds column by column, for a target between W (strength 0) and what makes W s of x (strength 1).

    strength   auto: chosen on held-out tokens, a quarter where there are none; or a number from 0 to 1
    """

    feed: ClassVar[bool]  # how it gets there, see `settle.Aim`

    streams: ClassVar[frozenset[str]] = frozenset({"served", "source"})
    parameters: ClassVar[Mapping[str, Any]] = {**ColumnSolver.parameters, "strength": "auto"}

    def __init__(self, strength: float | str, **settings: Any) -> None:
        super().__init__(**settings)
        self.strength = _parameters.auto_part(f"{self.name} strength", strength)

    def needs(self, plan: Plan) -> Needs:
        return {site: kinds | {"cross"} for site, kinds in super().needs(plan).items()}

    def _observed(self, width: int) -> int:
        return super()._observed(width) + 2 * (4 * width * width + 2 * TOKENS * width)

    def _solved(self, shape: tuple[int, int]) -> int:
        """Returns the bytes of what the column loop needs, the cross moment, and the target."""
        rows, width = shape
        return super()._solved(shape) + 4 * (width * width + 2 * min(rows, cpu_rows(width)) * width)

    def effort(self, shape: tuple[int, int], spec: TensorSpec) -> Effort:
        """Returns the work of a column solver, and of a target for every strength."""
        rows, width = shape
        own = super().effort(shape, spec)
        return own._replace(products=own.products + 2 * len(STRENGTHS) * rows * width**2 + 2 * width**3)

    def aiming(self, problem: Problem) -> Callable[[Factor, float], Aim]:
        from quarkcli.numerics.settle import Aim

        last: list[tuple[ref[Factor], Aim]] = []  # a factor that was tried in vain is to go

        def aim(factor: Factor, strength: float) -> Aim:
            if strength == 0:
                return Aim()
            if not last or last[0][0]() is not factor:
                last[:] = [(ref(factor), self._bounded(problem, factor))]
            return last[0][1].times(strength)

        return aim

    def _bounded(self, problem: Problem, factor: Factor) -> Aim:
        """Returns the aim at full strength, taken back where it lies far away from the weights."""
        from quarkcli.numerics.settle import Aim
        from quarkcli.numerics.shift import Drift, distance

        moment = problem.moment
        assert moment is not None and moment.cross is not None
        full = Aim(Drift(moment.gram, moment.cross, factor.dead), 1.0, self.feed)
        assert full.drift is not None
        far = distance(problem.weights, full.drift, factor)
        if far <= FURTHEST:
            return full
        problem.warn(
            f"{problem.name}: {self.name} finds weights {far:.1f} times their norm away from the original ones, "
            "and goes only part of the way; use more calibration rows"
        )
        return full.times(FURTHEST / far)

    def _choices(self, problem: Problem, held: bool) -> Choices:
        choices = super()._choices(problem, held)
        if problem.moment is None or problem.moment.cross is None:
            return choices
        if self.strength is not None:
            return replace(choices, strengths=(self.strength,))
        return replace(choices, strengths=STRENGTHS if held else (CAUTIOUS,))
