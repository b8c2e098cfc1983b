"""Qronos, and what it has in common with gptaq: both see the source model's activations beside the served ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli.algorithms import create
from quarkcli.algorithms._twostream import CAUTIOUS, STRENGTHS
from quarkcli.errors import ConfigError
from quarkcli.spec import TensorSpec
from tests import runs

from .two_streams import SPECS, streams

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
both = pytest.mark.parametrize("name", ["gptaq", "qronos"])
PLAIN: dict[str, Any] = {"damp": 0.01, "refine": "off"}


@both
@every_spec
def test_equal_streams_are_gptq(name: str, spec: TensorSpec) -> None:
    case = streams()
    moment = case.moment(equal=True)
    (wanted,) = case.solve("gptq", spec, moment, **PLAIN)
    (found,) = case.solve(name, spec, moment, **PLAIN, strength=1.0)
    assert runs.same_bytes(found.codes, wanted.codes)


@every_spec
def test_each_comes_nearer_to_the_source(spec: TensorSpec) -> None:
    case = streams()
    moment = case.moment()
    whole = PLAIN | {"strength": 1.0}
    lost = [case.lost(case.solve(name, spec, moment, **whole), spec) for name in ("qronos", "gptaq")]
    lost += [case.lost(case.solve(name, spec, moment, **p), spec) for name, p in (("gptq", PLAIN), ("rtn", {}))]
    assert lost[0] <= 1.01 * lost[1] and lost[1] < lost[2] < lost[3]


@both
@every_spec
def test_refinement_goes_for_the_source_too(name: str, spec: TensorSpec) -> None:
    case = streams()
    moment = case.moment()
    whole: dict[str, Any] = {"damp": 0.01, "strength": 1.0}
    rough, fine = (case.lost(case.solve(name, spec, moment, refine=n, **whole), spec) for n in ("off", 2))
    assert fine < rough


@both
def test_strength_is_chosen_on_held_out_tokens(name: str) -> None:
    """Where the held-out tokens know of no difference between the streams, the result is gptq's."""
    case = streams()
    moment, spec = case.moment(), SPECS["int3"]
    case.solve(name, spec, moment, **PLAIN)
    assert case.outcomes[-1].strength == STRENGTHS[-1]  # the streams differ everywhere alike
    same = replace(moment, cross_val=moment.gram_val)
    (found,) = case.solve(name, spec, same, **PLAIN)
    assert case.outcomes[-1].strength == 0
    (wanted,) = case.solve("gptq", spec, replace(same, cross=None, cross_val=None), **PLAIN)
    assert runs.same_bytes(found.codes, wanted.codes)


@both
def test_strength_is_cautious_where_nothing_is_held_out(name: str) -> None:
    case = streams()
    case.solve(name, SPECS["int3"], case.moment(held=False))
    assert case.outcomes[-1].strength == CAUTIOUS
    case.solve(name, SPECS["int3"], case.moment(), strength=0.6)
    assert case.outcomes[-1].strength == 0.6


@both
def test_a_target_far_away_is_taken_back(name: str) -> None:
    case = streams()
    case.s *= 40
    quantized = case.solve(name, SPECS["int3"], case.moment(held=False), strength=1.0)
    (warning,) = case.warnings
    assert warning.startswith(f"weight: {name} finds weights 1")
    assert "times their norm away from the original ones" in warning
    assert float(quantized[0].codes.float().abs().mean()) < 4


@both
@pytest.mark.parametrize("strength", [-0.1, 1.5, True, "strong"])
def test_strengths_that_are_none(name: str, strength: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} strength must be auto or a number from 0 to 1"):
        create(name, {"strength": strength})


@pytest.mark.parametrize(
    ("name", "family", "scheme"), [("gptaq", "llama", "mxfp4_weight_only"), ("qronos", "qwen3_moe", "int4_wo_32")]
)
def test_a_run_sees_what_the_blocks_below_lost(name: str, family: str, scheme: str, tmp_path: Path) -> None:
    source = runs.build(family, tmp_path / "m")
    options = {"scheme": scheme, **runs.data(runs.text_file(tmp_path / "t.txt"), 40, 64)}
    made = runs.run(source, tmp_path / "out", algorithm=name, **options)
    strengths: dict[str, set[float]] = {"0": set(), "1": set()}
    for weight, row in made.report["outcomes"]["weights"].items():
        strengths[weight.split(".")[2]].add(row["strength"])
    assert strengths["1"] & set(STRENGTHS[1:])
    plain = runs.run(source, tmp_path / "gptq", algorithm="gptq", **options)
    tensors, others = runs.read_all(made.folder), runs.read_all(plain.folder)
    same = {key for key, tensor in tensors.items() if runs.same_bytes(tensor, others[key])}
    # Nothing lies below block 0, so that its weights are gptq's.
    assert {key.split(".")[2] for key in tensors.keys() - same} == {"1"}


def test_the_forecast_counts_both_streams(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    data = runs.data(runs.text_file(tmp_path / "t.txt"), 32, 64)
    one, two = (runs.prepare(source, scheme="nvfp4", algorithm=name, **data).forecast for name in ("gptq", "qronos"))
    assert two.hidden_bytes == 2 * one.hidden_bytes
    assert two.memory_bytes > one.memory_bytes


def test_damping_by_the_largest_eigenvalue() -> None:
    """As the same share of the mean diagonal that this eigenvalue is."""
    case = streams()
    moment, spec = case.moment(), SPECS["int3"]
    share = float(torch.linalg.eigvalsh(moment.gram.double())[-1] / moment.gram.diagonal().double().mean())
    assert share > 1.5
    plain: dict[str, Any] = {"refine": "off", "strength": 1.0, "holdout": 0}
    case.solve("qronos", spec, moment, damp=0.01, damp_of="largest", **plain)
    assert case.outcomes[-1].damp == pytest.approx(0.01 * share, rel=1e-2)
    case.solve("qronos", spec, moment, damp=0.01, **plain)
    assert case.outcomes[-1].damp == 0.01
    with pytest.raises(ConfigError, match="qronos damp_of: largest has no effect without damp"):
        create("qronos", {"damp_of": "largest"})
    with pytest.raises(ConfigError, match="damp_of must be one of mean, largest"):
        create("qronos", {"damp": 0.01, "damp_of": "trace"})
