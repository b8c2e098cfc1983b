"""The algorithms that are asked for: by name, with parameters, or left to the default advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import quarkcli
from quarkcli import algorithms
from quarkcli.errors import ConfigError, QuarkError, UsageError
from quarkcli.job import asked
from quarkcli.plan.edit import set_quantizer_by_cfg
from quarkcli.recipe import advice, catalog
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.attributes import to_spec
from tests import runs

DATA = {"calib_data": "builtin", "calib_samples": 8, "calib_seqlen": 64}
MIXED: dict[str, Any] = {"scheme": "nvfp4", "layers": ["*down_proj=fp8"], **DATA}


def listed(prepared: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(step.name, step.parameters) for step in prepared.plan.algorithms]


def with_algorithm(folder: Path, value: Any, scheme: str = "int4_wo_128") -> str:
    path = folder / "own.yaml"
    own = {"schema": "quark/recipe/1", "quantize": {"scheme": scheme, "algorithm": value}}
    path.write_text(yaml.safe_dump(own))
    return str(path)


# ---- parameters by --set


def test_parameters_of_a_step_beside_a_scheme() -> None:
    prepared = runs.prepare(
        "demo", scheme="int4_wo_128", algorithm="gptq", settings=["gptq.damp=5e-2", "gptq.act_order=false"], **DATA
    )
    assert listed(prepared) == [("gptq", {"damp": 0.05, "act_order": False})]


def test_parameters_of_a_recipe_stay_but_for_those_that_are_set(tmp_path: Path) -> None:
    own = with_algorithm(tmp_path, [{"method": "gptq", "damp": 0.02, "act_order": False}])
    settings = ["gptq.damp=0.03", "calibration.samples=4"]
    prepared = runs.prepare("demo", recipe=own, algorithm="GPTQ", settings=settings, calib_data="builtin")
    assert listed(prepared) == [("gptq", {"damp": 0.03, "act_order": False})]
    assert prepared.calibration.samples == 4


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"algorithm": "rtn", "settings": ["gptq.damp=1"]}, UsageError, "'gptq' is not an algorithm of this run"),
        ({"settings": ["gptq.damp=0.1"]}, UsageError, "is not an algorithm of this run"),
        ({"algorithm": "gptq", "settings": ["gptq=1"]}, UsageError, "is not ALGORITHM.PARAMETER=VALUE"),
        ({"algorithm": "gptq", "settings": ["gptq.dampp=1"]}, ConfigError, "no parameter 'dampp'"),
        ({"algorithm": "gptq", "settings": ["gptq.damp=7"]}, ConfigError, "--set gptq.damp=7"),
        (
            {"algorithm": "gptq", "settings": ["gptq.damp=7", "gptq.act_order=true"]},
            ConfigError,
            "--set gptq.damp=7 --set gptq.act_order=true: gptq damp must be",
        ),
        ({"algorithm": "gptq", "settings": ["calibration.samples=4"]}, UsageError, "there is no recipe to change"),
        ({"algorithm": "gptq,,rtn"}, UsageError, "contains an empty name"),
        ({"algorithm": "gtpq"}, UsageError, "unknown algorithm 'gtpq'"),
        ({"algorithm": "auto,gptq"}, ConfigError, "'auto' chooses all algorithms and cannot be combined with"),
        (
            {"algorithm": "auto", "settings": ["rtn.damp=0.1"]},
            ConfigError,
            "'auto' does not choose the algorithm 'rtn' for this plan",
        ),
        ({"algorithm": "auto", "settings": ["qronos.dampp=1"]}, ConfigError, "no parameter 'dampp'"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], kind: type[QuarkError], message: str) -> None:
    with pytest.raises(kind) as caught:
        runs.prepare("demo", scheme="int4_wo_128", **options, **DATA)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"method": "auto", "damp": 0.1}], "'auto' does not choose the algorithm 'damp' for this plan"),
        ([{"method": "auto", "qronos": 4}], "'qronos' must be a mapping of parameters"),
        ([{"method": "auto", "qronos": {"damp": 4}}], "damp must"),
        ([{"method": "auto", "slots": ["*q_proj.weight_quantizer"]}], "'auto' works only for all weights"),
        ([{"method": "auto"}, {"method": "rtn"}], "chooses all algorithms and cannot be combined with"),
    ],
)
def test_a_file_is_named(value: Any, message: str, tmp_path: Path) -> None:
    own = with_algorithm(tmp_path, value)
    with pytest.raises(ConfigError, match=message) as caught:
        runs.prepare("demo", recipe=own, **DATA)
    assert own in str(caught.value)


# ---- auto


def test_auto_has_one_step_for_weights_of_one_format() -> None:
    prepared = runs.prepare("demo", scheme="int4_wo_128", algorithm="auto", **DATA)
    (choice,) = prepared.advice
    assert choice.weights == {target.name for target in prepared.plan.quantized()}
    assert [step.name for step in prepared.plan.algorithms] == choice.names == [s.name for s in prepared.steps]
    assert all(step.weights is None for step in prepared.plan.algorithms)
    assert "int4 group 128" in choice.format


def test_auto_takes_every_format_by_itself(tmp_path: Path) -> None:
    """The resolved recipe names the steps and their weights, and repeats the run."""
    made = runs.run("demo", tmp_path / "auto", algorithm="auto", settings=["gptq.damp=0.02"], **MIXED)
    plan = made.prepared.plan
    down = {target.name for target in plan.quantized() if target.role == "down"}
    chosen = {step.name: step for step in plan.algorithms}
    assert chosen["rtn"].weights == down
    assert chosen["gptq"].weights == {target.name for target in plan.quantized()} - down
    assert chosen["gptq"].parameters == {"damp": 0.02}
    assert {row["weights"] for row in made.report["advice"]} == {len(down), 6 * len(down)}
    written = yaml.safe_load((made.folder / "quark" / "recipe.yaml").read_text())["quantize"]["algorithm"]
    slots = {row["method"]: row["slots"] for row in written}
    assert slots["rtn"] == ["model.layers.*.mlp.down_proj.weight_quantizer"]
    assert len(slots["gptq"]) == 6
    again = runs.run("demo", tmp_path / "again", recipe=str(made.folder / "quark" / "recipe.yaml"))
    assert runs.same_files(made.folder, again.folder)
    named = {"recipe": str(made.folder / "quark" / "recipe.yaml"), "algorithm": "auto"}
    assert {c.why for c in runs.prepare("demo", **named).advice} == {c.why for c in made.prepared.advice}


def test_auto_in_a_recipe_with_parameters(tmp_path: Path) -> None:
    own = with_algorithm(tmp_path, [{"method": "auto", "qronos": {"damp": 0.07}}])
    assert listed(runs.prepare("demo", recipe=own, **DATA)) == [("qronos", {"damp": 0.07})]
    settings = ["qronos.act_order=false"]
    prepared = runs.prepare("demo", recipe=own, settings=settings, **DATA)
    assert listed(prepared) == [("qronos", {"damp": 0.07, "act_order": False})]
    asked.check(recipes.from_file(Path(own)))
    with pytest.raises(ConfigError, match="no parameter 'x'"):
        asked.check(recipes.from_file(Path(with_algorithm(tmp_path, [{"method": "auto", "qronos": {"x": 1}}]))))


def test_auto_leaves_out_what_cannot_work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from quarkcli.algorithms.qronos import Qronos

    def refuses(self: Qronos, plan: Any) -> None:
        raise ConfigError("not on a Saturday")

    monkeypatch.setattr(Qronos, "check", refuses)
    prepared = runs.prepare("demo", scheme="int4_wo_128", algorithm="auto", **DATA)
    assert [step.name for step in prepared.steps] == ["rtn"]
    assert "auto leaves out qronos: not on a Saturday" in prepared.warnings
    assert [choice.names for choice in prepared.advice] == [[]]


def test_auto_of_a_plan_that_was_edited(tmp_path: Path) -> None:
    """The advice is that of the plan as it became."""
    plan = quarkcli.make_plan("demo", "int4_wo_128", algorithm="auto", **DATA)
    assert quarkcli.need_calibration(plan)
    fp8 = {"element": "fp8_e4m3", "granularity": "tensor", "scale": {"dtype": "f32"}}
    set_quantizer_by_cfg(plan, [{"quantizer_path": "*.weight_quantizer", "cfg": fp8}])
    assert not quarkcli.need_calibration(plan)
    report = quarkcli.quantize(plan, output=tmp_path / "out", device="cpu")
    assert report["algorithms"] == ["rtn"] and [row["steps"] for row in report["advice"]] == [["rtn"]]


# ---- the table


def test_every_format_has_advice_of_algorithms_that_exist() -> None:
    for row in advice.rows():
        for step in row.steps:
            algorithms.create(step.method, dict(step.model_extra or {}), "advice.yaml")
        assert len({step.method for step in row.steps}) == len(row.steps)
    assert advice.rows()[-1].elements == ["*"] and advice.rows()[-1].inputs is None
    found = []
    for name in catalog.files("schemes"):
        cfgs = {entry.quantizer_path: entry.cfg for entry in recipes.from_scheme(name).entries}
        read = cfgs["*.input_quantizer"]
        weight = to_spec(cfgs["*.weight_quantizer"], weight=True)
        found.append(advice.of(weight, to_spec(read, weight=False) if read is not None else None))
    assert all(any(row is used for used in found) for row in advice.rows())  # none is hidden by another


@pytest.mark.parametrize("scheme", ["int3_wo_128", "int4_wo_128", "int4_wa_64", "nvfp4_weight_only", "nvfp4", "int8"])
def test_auto_takes_no_step_that_the_plan_warns_of(scheme: str) -> None:
    prepared = runs.prepare("demo", scheme=scheme, algorithm="auto", **DATA)
    assert prepared.steps
    assert not [text for text in prepared.warnings if text.split()[0] in algorithms.names()]
