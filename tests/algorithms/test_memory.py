"""The memory that solvers of columns take for one problem, counted tensor by tensor, and what they say of it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from quarkcli.algorithms import _columns, create
from quarkcli.algorithms.base import Problem
from quarkcli.forward.lanes import LANES
from quarkcli.forward.moments import CHUNK, Moments
from quarkcli.numerics import chunks

from .two_streams import SPECS, streams

N, R = 768, 256


class Counting(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            return
        self.sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self.see(value)
        return result


@pytest.mark.parametrize("name", ["gptq", "gptaq", "qronos"])
def test_a_problem_takes_what_was_forecast(name: str) -> None:
    case, solver = streams(features=N, rows=R), create(name, {})
    assert isinstance(solver, _columns.ColumnSolver)
    moment = case.moment()
    if name == "gptq":
        moment.cross = moment.cross_val = None
    chunks._kept.spaces.clear()  # a thread's scratch, as large as what it was lent for before, is no problem's
    counting = Counting()
    for mean in moment.means():
        counting.see(mean)
    problem: Problem = case.problem(SPECS["nvfp4"], moment)
    del moment, mean
    with counting:
        assert solver.solve(problem) is not None
    assert case.outcomes[0].strength > 0 or name == "gptq"
    taken, said = counting.peak, solver._solved((R, N))
    assert 0.75 * said < taken < 1.1 * said


def test_what_is_summed_is_half_a_matrix() -> None:
    """Of x x^T no whole matrix lies beside another while a block runs; the number of tokens is the code's."""
    assert _columns.TOKENS == CHUNK
    with Counting() as counting:
        moments = Moments()
        for _ in range(3):
            moments.add(torch.ones(CHUNK, N))
        kept = counting.now
    assert kept < 4 * N * N * 5 / 8


def test_four_lanes_of_a_moment_are_alive_at_most() -> None:
    with Counting() as counting:
        moments = Moments()
        for lane in range(LANES):
            moments.add(torch.ones(CHUNK, N), lane=lane)
        most = counting.peak - 4 * CHUNK * N * 2
    assert most < _columns.ALIVE * 4 * N * N * 5 / 8
