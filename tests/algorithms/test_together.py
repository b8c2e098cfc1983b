"""Problems that go through the column loop together: none knows of the others, not by a bit."""

from __future__ import annotations

import pytest
import torch

from quarkcli.algorithms import _columns, create
from quarkcli.algorithms.base import Problem
from quarkcli.numerics import solve as solve_module
from quarkcli.spec import TensorSpec
from tests import runs

from .two_streams import SPECS, Streams, streams

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def cases() -> list[Streams]:
    return [streams(seed=seed) for seed in range(5)]


def problem(case: Streams, spec: TensorSpec, name: str) -> Problem:
    moment = case.moment()
    if name == "gptq":
        moment.cross = moment.cross_val = None
    return case.problem(spec, moment)


@every_spec
@pytest.mark.parametrize("name", ["gptq", "gptaq", "qronos"])
def test_together_is_alone(name: str, spec: TensorSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dampings and strengths are each problem's own, so that they come and go while others stay."""
    counts: list[int] = []
    original = solve_module._solve_jobs
    solver = create(name, {})
    assert isinstance(solver, _columns.ColumnSolver)
    alone, others = cases(), cases()
    wanted = [solver.solve(problem(case, spec, name)) for case in alone]
    monkeypatch.setattr(
        solve_module, "_solve_jobs", lambda jobs, columns: counts.append(len(jobs)) or original(jobs, columns)
    )
    found = solver.solve_many([problem(case, spec, name) for case in others])
    assert max(counts) == len(others)
    assert [case.outcomes for case in others] == [case.outcomes for case in alone]
    for one, two in zip(wanted, found, strict=True):
        assert one is not None and two is not None
        assert runs.same_bytes(one[0].codes, two[0].codes)
        assert one[0].params.scale is not None and two[0].params.scale is not None
        assert runs.same_bytes(one[0].params.scale, two[0].params.scale)


def test_one_without_tokens_and_one_without_a_factor_leave_the_others_alone() -> None:
    spec, solver = SPECS["int3"], create("gptq", {})
    assert isinstance(solver, _columns.ColumnSolver)
    good, dead, bad = cases()[:3]
    run = [problem(case, spec, "gptq") for case in (good, dead, bad)]
    assert run[1].moment is not None and run[2].moment is not None
    run[1].moment.gram = torch.zeros_like(run[1].moment.gram)
    run[2].moment.gram = -run[2].moment.gram + 2 * torch.diag(run[2].moment.gram.diagonal())
    found = solver.solve_many(run)
    again = cases()[0]
    (wanted,) = [solver.solve(problem(again, spec, "gptq"))]
    assert wanted is not None and found[0] is not None and found[1] is not None
    assert runs.same_bytes(found[0][0].codes, wanted[0].codes)
    assert not dead.outcomes and good.outcomes == again.outcomes


@pytest.mark.parametrize("shape", [(512, 512), (1536, 2048), (6144, 3072)])
def test_together_they_take_what_is_forecast_at_most(shape: tuple[int, int]) -> None:
    for name in ("gptq", "qronos"):
        solver = create(name, {})
        assert isinstance(solver, _columns.ColumnSolver)
        count = solver.at_once(shape)
        assert count == 1 or count * solver._solved(shape) <= _columns.TOGETHER
        assert (count + 1) * solver._solved(shape) > _columns.TOGETHER
