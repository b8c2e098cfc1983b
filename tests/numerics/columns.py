"""One problem through the column loop, and through all choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quarkcli.numerics.grid import Grid
from quarkcli.numerics.settle import Aim, Choices, Objective, Settled, steps, together
from quarkcli.numerics.solve import Factor, Feed, codes_of, solve_values
from quarkcli.numerics.task import Task


@dataclass
class Solved:
    """Codes [R, N] in the weight's own column order, and the loss sum(e^2)."""

    codes: Tensor
    loss: float


def solve(weight: Tensor, factor: Factor, at: Grid, *, columns: int = 128, feed: Feed | None = None) -> Solved:
    values, loss = solve_values(weight, factor, at, columns=columns, feed=feed)
    return Solved(codes_of(values, at), loss)


def settle(
    task: Task, gram: Tensor, choices: Choices, aim: Callable[[Factor, float], Aim], held: Objective | None
) -> Settled | None:
    return together([steps(task, gram, choices, aim, held)])[0]
