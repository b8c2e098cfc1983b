"""Which weights share a scale, by family and by recipe; the smallest scale of the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli.disk import verify
from quarkcli.errors import CheckError, ConfigError, ModelError, UsageError
from quarkcli.events import Message
from quarkcli.job import finish
from quarkcli.plan.model import Plan
from quarkcli.recipe import convert
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.entries import Origin, Share
from quarkcli.recipe.recipe import from_config, from_scheme
from tests import runs

from .layouts import LLAMA, MIXTRAL, decided, origin, plan
from .test_order import FP8, INT8, UP, recipe

ATTENTION = "model.layers.0.self_attn"
NVFP4_WEIGHT = "{element: fp4_e2m1, granularity: {group: 16}, scale: {dtype: e4m3, global_scale: {dtype: f32}}}"
ROW = Share(("*o_proj.weight_quantizer", "*down_proj.weight_quantizer"), Origin("own.yaml", 9, 5))


def shared(*rows: Share, scheme: str = "nvfp4", **overrides: Any) -> Plan:
    return plan(replace(from_scheme(scheme), share=list(rows)), **overrides)


def groups(made: Plan) -> set[tuple[str, ...]]:
    return {tuple(t.name.rpartition(".")[2] for t in members) for members in made.shared().values()}


def test_the_family_says_it() -> None:
    assert groups(plan("nvfp4")) == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    assert groups(plan("mxfp4")) == set()
    assert len(plan("nvfp4", MIXTRAL).shared()) == 2 * (1 + 4)


def test_rows_join_weights_of_one_part() -> None:
    made = shared(ROW)
    assert ("o_proj", "down_proj") in groups(made)
    assert len(made.shared()) == 3 * 3
    assert not made.warnings
    whole = shared(Share(("*q_proj*", "*o_proj*")))  # with q comes what servers fuse with it
    assert ("q_proj", "k_proj", "v_proj", "o_proj") in groups(whole)
    assert all(len({t.part for t in members}) == 1 for members in whole.shared().values())


def test_none_at_all_is_legal_and_said() -> None:
    made = shared()
    assert made.shared() == {}
    [warning] = made.warnings
    assert "groups of weights that servers multiply" in warning
    assert made.targets[UP].group != made.targets[UP].scale_group == UP  # servers fuse it all the same


def test_rows_that_are_wrong() -> None:
    with pytest.raises(ConfigError, match=r"'\*dwn_proj\*' matches none of 23 weights") as caught:
        shared(Share(("*o_proj*", "*dwn_proj*"), Origin("own.yaml", 9, 5)))
    assert caught.value.where == "own.yaml:9:5"
    with pytest.raises(ConfigError, match="which have different formats"):
        shared(ROW, layers=["*o_proj=fp8"])
    assert any(
        "share has no effect: no two of its weights have one scale each" in warning
        for warning in shared(ROW, scheme="mxfp4").warnings
    )


TEXT = """\
schema: quark/recipe/1
quantize:
  quant_cfg:
    - quantizer_path: '*.layers.*.weight_quantizer'
      cfg: {element: fp8_e4m3}
share: %s
"""


def scales(folder: Path) -> dict[str, float]:
    suffix = ".weight_scale"
    return {name.removesuffix(suffix): float(t) for name, t in runs.read_all(folder).items() if name.endswith(suffix)}


@pytest.mark.parametrize(("rows", "equal"), [
    ("[]", set()),
    ("[{slots: ['*o_proj*', '*down_proj*'], what: scale}]", {("q", "k"), ("gate", "up"), ("o", "down")}),
])  # fmt: skip
def test_from_file_to_checkpoint(rows: str, equal: set[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(TEXT % rows)
    made = runs.run("demo", tmp_path / "out", recipe=str(tmp_path / "own.yaml"), dialect="compressed-tensors")
    written = scales(made.folder)
    layer = {name.rpartition(".")[2].removesuffix("_proj"): s for name, s in written.items() if ".layers.0." in name}
    source = runs.read_all(made.source)
    for one, other in (("q", "k"), ("gate", "up"), ("o", "down")):
        assert (layer[one] == layer[other]) == ((one, other) in equal)
    amax = max(float(source[f"model.layers.0.{n}.weight"].abs().max()) for n in ("self_attn.o_proj", "mlp.down_proj"))
    if equal:
        assert layer["o"] == pytest.approx(amax / 448, rel=1e-6)
    copied = recipes.from_file(made.folder / "quark" / "recipe.yaml")
    assert [row.slots for row in copied.share or ()] == [row.slots for row in made_rows(tmp_path)]
    report = json.loads((made.folder / "quark" / "report.json").read_text())
    assert sum(report["shared_scales"].values()) == 3 * 4 * bool(equal)  # groups by layers
    if equal:
        assert verify.directory(str(made.folder))
        return
    told: list[Any] = []
    checks = verify.directory(str(made.folder), tell=told.append)
    [warning] = [event.text for event in told if isinstance(event, Message) and event.level == "warning"]
    assert warning.startswith("8 scale groups do not share their per-tensor scales: servers keep all of them")
    assert not any("share their" in check for check in checks)


def test_two_levels_must_share(tmp_path: Path) -> None:
    """Block scales lie under the scale of the tensor, of which servers keep one."""
    (tmp_path / "own.yaml").write_text(TEXT.replace("{element: fp8_e4m3}", NVFP4_WEIGHT) % "[]")
    asked = {"recipe": str(tmp_path / "own.yaml"), "dialect": "compressed-tensors"}
    with pytest.raises(
        ModelError,
        match="groups of weights that servers multiply",
    ):
        runs.prepare("demo", **asked)
    made = runs.run("demo", tmp_path / "out", target="none", **asked)
    assert any(
        "servers keep one of them and decode the others wrong, so 'quark verify' fails" in text
        for text in made.prepared.warnings
    )
    with pytest.raises(CheckError, match="8 scale groups do not share their per-tensor scales"):
        verify.directory(str(made.folder))
    assert not any("share their" in check for check in verify.directory(str(made.folder), target="none"))


def exactly(*groups: tuple[str, ...], layout: Any = LLAMA, scheme: str = "nvfp4") -> Plan:
    rows = [Share(tuple(f"*{leaf}.weight_quantizer" for leaf in group), exact=True) for group in groups]
    return plan(replace(from_scheme(scheme), share=rows), layout)


def test_exact_rows_join_these_weights_alone() -> None:
    subset = exactly(("q_proj", "k_proj"))
    assert groups(subset) == {("q_proj", "k_proj")}
    assert "groups of weights that servers multiply" in subset.warnings[0]
    whole = exactly(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    assert groups(whole) == groups(plan("nvfp4")) and not whole.warnings
    own = exactly(("o_proj", "down_proj"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    assert groups(own) == {*groups(whole), ("o_proj", "down_proj")} and not own.warnings
    absent = exactly(("q_proj", "nope"))  # of another system's list, not all of which is in each model
    assert groups(absent) == set()
    experts = exactly(("w1", "w3"), layout=MIXTRAL)
    assert groups(experts) == {("w1", "w3")} and len(experts.shared()) == 2 * 4


@pytest.mark.parametrize(("asked", "expected"), [
    ([], set()),
    ([["q_proj", "k_proj"]], {("q_proj", "k_proj")}),
    ([["o_proj", "down_proj"]], {("o_proj", "down_proj")}),
])  # fmt: skip
def test_the_groups_of_a_quark_config(asked: list[list[str]], expected: set[tuple[str, ...]], tmp_path: Path) -> None:
    spec = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}
    config = {"global_quant_config": {"weight": spec}, "exclude": ["lm_head"], "shared_scale_groups": asked}
    made = plan(from_config(config))
    assert groups(made) == expected
    (tmp_path / "new.yaml").write_text(convert.as_native(from_config(config)))
    again = plan(recipes.from_file(tmp_path / "new.yaml"))
    assert groups(again) == expected


def made_rows(folder: Path) -> Any:
    return recipes.from_file(folder / "own.yaml").share


def test_the_resolved_recipe_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(TEXT % "[]")
    prepared = runs.prepare("demo", recipe=str(tmp_path / "own.yaml"))
    assert "share: []" in finish.resolved_recipe(prepared)


class TestMinimum:
    """`--min-kv-scale`."""

    @pytest.mark.parametrize("kind", ["k", "v"])
    def test_of_a_plain_scale(self, kind: str) -> None:
        made = plan("mxfp4", kv_cache="fp8", min_kv_scale=0.5)
        for module in made.attention.values():
            scale = module.specs[kind].scale
            assert scale is not None and (scale.minimum, scale.when) == (0.5, "static")
        assert origin(made, f"{ATTENTION}.{kind}_bmm_quantizer") == "--min-kv-scale 0.5"
        assert len(made.entries) == len(plan("mxfp4", kv_cache="fp8").entries) + 2

    def test_of_a_scale_over_others(self) -> None:
        scale = plan("mxfp4", kv_cache="nvfp4", min_kv_scale=2e-3).attention[ATTENTION].specs["k"].scale
        assert scale is not None and scale.global_scale is not None
        assert (scale.minimum, scale.global_scale.minimum) == (None, 2e-3)

    def test_keeps_differences_between_modules(self) -> None:
        own = recipe(("*.weight_quantizer", INT8, True), ("*.[kv]_bmm_quantizer", FP8, True),
                     ("*layers.1.*bmm_quantizer", None, False))  # fmt: skip
        made = plan(own, min_kv_scale=0.25)
        assert decided(made, "model.layers.1.self_attn.k_bmm_quantizer") is None
        assert decided(made, f"{ATTENTION}.k_bmm_quantizer") == "fp8_e4m3"
        assert made.attention[ATTENTION].specs["v"].scale.minimum == 0.25  # type: ignore[union-attr]

    def test_without_a_cache(self) -> None:
        for made in ("mxfp4", recipe(("*.weight_quantizer", INT8, True), kv_cache="fp8")):
            with pytest.raises(ConfigError, match="no KV cache") as caught:
                plan(made, kv_cache="none", min_kv_scale=0.5)
            assert caught.value.where == "--min-kv-scale"

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_what_is_no_scale(self, value: float) -> None:
        with pytest.raises(UsageError, match="cannot be a scale"):
            plan("mxfp4", kv_cache="fp8", min_kv_scale=value)

    def test_a_scale_that_is_not_stored(self) -> None:
        dynamic = {"element": "fp8_e4m3", "granularity": "token", "scale": {"when": "dynamic"}}
        own = recipe(("*.weight_quantizer", INT8, True), ("*.[kv]_bmm_quantizer", dynamic, True))
        with pytest.raises(ConfigError, match="has no scale that is stored"):
            plan(own, min_kv_scale=0.5)

    def test_in_the_written_checkpoint(self, tmp_path: Path) -> None:
        text = runs.text_file(tmp_path / "t.txt")
        made = runs.run(
            "demo", tmp_path / "out", scheme="mxfp4", kv_cache="fp8", min_kv_scale=0.03, **runs.data(text, 4)
        )
        free = runs.run("demo", tmp_path / "free", scheme="mxfp4", kv_cache="fp8", **runs.data(text, 4))
        bound, plain = (
            {name: t.float() for name, t in runs.read_all(run.folder).items() if name.endswith(("k_scale", "v_scale"))}
            for run in (made, free)
        )
        assert bound
        floor = torch.tensor(0.03)
        assert all(torch.equal(bound[name], plain[name].clamp_min(floor)) for name in bound)
        assert any(float(plain[name]) < 0.03 for name in bound)


# ---- static input scales of experts

STATIC = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "observer_cls": "PerTensorMinMaxObserver"}
CALIBRATION = {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 64}


def input_scales(folder: Path) -> dict[str, dict[int, float]]:
    """Of the first block: leaf name -> expert -> its input scale."""
    found: dict[str, dict[int, float]] = {}
    for name, tensor in runs.read_all(folder).items():
        if ".layers.0." in name and ".experts." in name and name.endswith(".input_scale"):
            number, leaf, _ = name.rpartition(".experts.")[2].split(".")
            found.setdefault(leaf, {})[int(number)] = float(tensor)
    return found


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("qwen3_moe", tmp_path_factory.mktemp("experts") / "m", num_experts=8, num_experts_per_tok=2)


@pytest.mark.parametrize("observer", ["PerTensorMinMaxObserver", "PerTensorPercentileObserver"])
def test_every_expert_has_its_own_input_scale(experts: Path, tmp_path: Path, observer: str) -> None:
    """Quark's `sync_moe_expert_input_amax: false`: the layer's scale is the largest of its experts' own."""
    written = {}
    for sync in (True, False):
        spec = {**STATIC, "observer_cls": observer}
        quark = {"global_quant_config": {"weight": STATIC, "input_tensors": spec}, "exclude": ["lm_head", "*gate"],
                 "sync_moe_expert_input_amax": sync}  # fmt: skip
        (tmp_path / "quark.json").write_text(json.dumps(quark))
        made = runs.run(
            experts, tmp_path / str(sync), recipe=str(tmp_path / "quark.json"), dialect="quark", **CALIBRATION
        )
        written[sync] = input_scales(made.folder)
    shared, own = written[True], written[False]
    assert set(own) == set(shared) == {"gate_proj", "up_proj", "down_proj"}
    for leaf in shared:
        assert len(set(shared[leaf].values())) == 1
        assert len(set(own[leaf].values())) > 1
        if "MinMax" in observer:
            assert max(own[leaf].values()) == next(iter(shared[leaf].values()))
    assert own["gate_proj"] == own["up_proj"]  # they read the same rows
    assert any("expert_inputs: own gives every expert" in text for text in made.report["warnings"])
    told: list[Any] = []
    assert verify.directory(str(made.folder), str(experts), tell=told.append)
    warnings = [event.text for event in told if isinstance(event, Message) and event.level == "warning"]
    assert [text.partition(" (")[0] for text in warnings] == [
        "the experts of 4 layers have different input scales; servers use the largest for all experts of a layer"
    ]
    copied = recipes.from_file(made.folder / "quark" / "recipe.yaml")
    assert copied.expert_inputs == "own"
    assert "expert_inputs: own" in convert.as_native(recipes.from_file(tmp_path / "quark.json"))


def test_an_expert_that_saw_no_token_takes_the_layers(experts: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("schema: quark/recipe/1\nquantize: {scheme: fp8}\nexpert_inputs: own\n")
    few = {**CALIBRATION, "calib_samples": 1, "calib_seqlen": 2}
    made = runs.run(experts, tmp_path / "out", recipe=str(tmp_path / "own.yaml"), **few)
    report = json.loads((made.folder / "quark" / "report.json").read_text())
    tokens = report["experts"]["calibration_tokens"]["model.layers.0.mlp.experts"]
    unseen = {int(number) for number, count in tokens.items() if not count}
    scales = input_scales(made.folder)
    assert unseen
    for leaf in scales:
        assert {scales[leaf][number] for number in unseen} == {max(scales[leaf].values())}


def test_own_input_scales_without_effect_are_said() -> None:
    made = plan(replace(from_scheme("mxfp4"), expert_inputs="own"), MIXTRAL)
    assert "expert_inputs: own changes nothing: no input of an expert has a static scale" in made.warnings
    assert any("changes nothing" in w for w in plan(replace(from_scheme("fp8"), expert_inputs="own"), LLAMA).warnings)
