"""How the weights of a part become problems, and what the worker does with an answer of None."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli.algorithms.base import Moment, Problem
from quarkcli.algorithms.gptq import GPTQ
from quarkcli.job import run as job
from quarkcli.job.problems import alike, problems, stacks
from quarkcli.job.problems import runs as together
from tests import runs


def grouped(prepared: job.Prepared, part: int, needs: dict[str, set[str]]) -> list[Problem]:
    plan = prepared.plan
    asked: list[tuple[str, int | None]] = []

    def moment(site: str, expert: int | None) -> Moment:
        asked.append((site, expert))
        return Moment(torch.eye(2), 7)

    def weight(target: Any) -> torch.Tensor:
        return torch.zeros(target.shape)

    found = list(
        problems(plan.quantized(part), needs, moment, weight, lambda t: None, lambda text: None, lambda *outcome: None)
    )
    assert asked == list(dict.fromkeys((p.site, p.expert) for p in found if needs.get(p.site or "")))
    return found


def test_one_activation_one_expert_one_spec(tmp_path: Path) -> None:
    prepared = runs.prepare(
        runs.build("qwen3_moe", tmp_path / "m"), scheme="mxfp4", layers=["*v_proj=int8_dynamic"], target="none"
    )
    plan = prepared.plan
    found = grouped(prepared, 1, {})
    assert sorted(t.name for p in found for t in p.targets) == sorted(t.name for t in plan.quantized(1))
    for problem in found:
        assert {t.site for t in problem.targets} == {problem.site}
        assert {t.weight for t in problem.targets} == {problem.spec}
        assert {t.expert[1] if t.expert else None for t in problem.targets} == {problem.expert}
        assert [tuple(w.shape) for w in problem.weights] == [t.shape for t in problem.targets]
        assert problem.moment is None
    leaves = {tuple(sorted(t.name.rsplit(".", 1)[1] for t in problem.targets)) for problem in found}
    assert {("k_proj", "q_proj"), ("v_proj",), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)} <= leaves


def test_moments_are_taken_where_they_are_asked_for() -> None:
    prepared = runs.prepare("demo", scheme="mxfp4")
    site = prepared.plan.targets["model.layers.0.mlp.down_proj"].site
    found = grouped(prepared, 1, {site: {"gram"}})
    assert {problem.site: problem.moment is not None for problem in found}[site]
    assert sum(problem.moment is not None for problem in found) == 1


def test_weights_without_an_activation_stand_alone() -> None:
    prepared = runs.prepare("demo", scheme="mxfp4", unprotect=["embedding"])
    (problem,) = grouped(prepared, 0, {})
    assert (problem.site, problem.expert, problem.moment, len(problem.targets)) == (None, None, None, 1)


def test_a_solver_without_a_solution_is_replaced_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`down_proj` has none: its weights are those of rounding to nearest, everything else is solved."""
    solve = GPTQ.solve_many

    def but_down(self: GPTQ, run: Sequence[Problem]) -> list[Any]:
        return [None] if "down_proj" in run[0].name else solve(self, run)

    monkeypatch.setattr(GPTQ, "solve_many", but_down)
    text = runs.data(runs.text_file(tmp_path / "t.txt"), 8, 64)
    made = runs.run("demo", tmp_path / "gptq", scheme="int4_wo_128", algorithm="gptq", **text)
    plain = runs.run("demo", tmp_path / "rtn", scheme="int4_wo_128")
    mine, theirs = runs.read_all(made.folder), runs.read_all(plain.folder)
    packed = [name for name in mine if name.endswith("weight_packed")]
    same = {name for name in packed if runs.same_bytes(mine[name], theirs[name])}
    assert same == {name for name in packed if "down_proj" in name}
    said = [w for w in made.report["warnings"] if "finds no solution" in w]
    first = "model.layers.0.mlp.down_proj: gptq finds no solution with 512 tokens; its weights are rounded to nearest"
    assert said == [f"{first} (and 3 more like this)"]


def test_experts_of_one_shape_are_solved_together(tmp_path: Path) -> None:
    prepared = runs.prepare(runs.build("qwen3_moe", tmp_path / "m"), scheme="int4_wo_32")
    sites = {target.site for target in prepared.plan.quantized(1) if target.site is not None}
    found = grouped(prepared, 1, {site: {"gram"} for site in sites})
    experts = {problem.expert for problem in found} - {None}
    for at_once in (1, 3, 100):
        made = list(together(found, lambda shape, at_once=at_once: at_once))
        assert [problem for run in made for problem in run] == found
        assert max(map(len, made)) == min(at_once, len(experts))
        for run in made:
            assert len({(p.site, p.shape, p.spec) for p in run}) == 1
            assert len(run) == 1 or all(problem.expert is not None for problem in run)


def test_neighbours_of_one_kind_are_stacked_and_no_more_than_there_is_room_for() -> None:
    found = stacks("aaaabbabbbbbb", str, lambda item: {"a": 3, "b": 4}[item])
    assert ["".join(stack) for stack in found] == ["aaa", "a", "bb", "a", "bbbb", "bb"]
    assert list(stacks("", str, len)) == []


def test_alike_stand_beside_each_other_in_the_order_they_came() -> None:
    assert alike(["g0", "u0", "d0", "g1", "d1", "x"], lambda item: item[0] in "gu") == [
        "g0",
        "u0",
        "g1",
        "d0",
        "d1",
        "x",
    ]
    assert alike("", str) == []
