"""Plans that are refused, and what the message says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quarkcli.errors import ConfigError, ModelError
from quarkcli.recipe.entries import Entry, Origin
from quarkcli.recipe.recipe import Recipe
from tests import runs

from .layouts import LLAMA, MIXTRAL, lay_out, llama, mixtral, plan, weights
from .test_order import INT4, INT8, recipe


@pytest.mark.parametrize(
    ("flags", "where", "near"),
    [
        ({"exclude": ["*dwn_proj"]}, "--exclude '*dwn_proj'", "*down_proj"),
        ({"layers": ["*.upproj=fp8"]}, "--layer '*.upproj=fp8'", "up_proj"),
        ({"include": ["lmhead"]}, "--include 'lmhead'", "lm_head"),
        ({"exclude": ["model.layers.*.mlp.gate"]}, "--exclude 'model.layers.*.mlp.gate'", "gate_proj"),
        ({"layer_types": ["Conv2d=fp8"]}, "--layer-type 'Conv2d=fp8'", "use one of Embedding, Linear"),
        ({"layer_types": ["linear=fp8"]}, "--layer-type 'linear=fp8'", "did you mean 'Linear'?"),
        ({"layer_types": ["Embeding=fp8"]}, "--layer-type 'Embeding=fp8'", "did you mean 'Embedding'?"),
        ({"exclude": ["re:down_proj"]}, "--exclude 're:down_proj'", "did you mean 're:.*down_proj'?"),
        ({"exclude": ["re:.*layers\\.7\\..*"]}, "--exclude 're:.*layers\\.7\\..*'", ""),
    ],
)
def test_a_flag_that_matches_nothing(flags: dict, where: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan("mxfp4", **flags)
    assert caught.value.where == where
    assert "matches none of 23 modules" in caught.value.what
    assert near in caught.value.hint
    lenient = plan("mxfp4", **flags, allow_unmatched=True)
    assert any(where in warning and "matched none of" in warning for warning in lenient.warnings)


def test_an_expression_is_shown_as_it_was_typed() -> None:
    with pytest.raises(ConfigError, match=r"^--exclude 're:down_proj': 're:down_proj' matches none of"):
        plan("mxfp4", exclude=["re:down_proj"])
    with pytest.raises(ConfigError, match=r"'re:\[' is not a regular .* at position 0") as caught:
        plan("mxfp4", exclude=["re:["])
    assert caught.value.hint.startswith("correct it")


def test_a_class_without_the_module() -> None:
    row = Entry("*dwn_proj*", None, False, "nn.Embedding", True, Origin("own.yaml", 7, 5), "a", True)
    with pytest.raises(ConfigError, match=r"matches none of 1 modules of the class nn\.Embedding"):
        plan(recipe(("*.weight_quantizer", INT8, True), row))


@pytest.mark.parametrize(
    ("pattern", "written", "hint"),
    [
        ("*.weight_quantizer", "nn.Conv2d", "use one of nn.Embedding, nn.Linear"),
        ("*.weight_quantizer", "nn.Modul", "use one of nn.Embedding, nn.Linear"),
        ("*.weight_quantizer", "nn.Banana", "use one of nn.Embedding, nn.Linear"),
        ("*", "nn.Modul", "use one of nn.Embedding, nn.Linear"),
        ("*.weight_quantizer", "Linear", "did you mean 'nn.Linear'?"),
        ("*.nothing", "nn.Linea", "did you mean 'nn.Linear'?"),
        ("*.up_proj.weight_quantizer", "nn.Embed", "use one of nn.Linear"),
        ("*k_bmm_quantizer", "nn.Modul", "did you mean 'nn.Module'?"),
    ],
)
def test_a_class_that_no_module_has(pattern: str, written: str, hint: str) -> None:
    """The hint has classes of modules that the pattern matches: attention's only for a quantizer of attention."""
    row = Entry(pattern, INT8, True, written, True, Origin("own.yaml", 7, 5), "a", True)
    with pytest.raises(ConfigError, match=f"own.yaml:7:5: unknown class of layer '{written}'") as caught:
        plan(recipe(("*.weight_quantizer", INT8, True), row))
    assert caught.value.hint == hint


def test_a_recipe_without_entries() -> None:
    with pytest.raises(ConfigError, match="the plan quantizes nothing") as caught:
        plan(Recipe("own", "own.yaml", None, [], exclusions=False))
    assert caught.value.hint.endswith("the recipe has no entries")


def test_a_required_entry_of_a_recipe() -> None:
    absent = Entry(
        "*.dwn_proj.weight_quantizer", INT8, True, None, True, Origin("own.yaml", 7, 5), "own.yaml:7:5", True
    )
    with pytest.raises(ConfigError) as caught:
        plan(recipe(("*.weight_quantizer", INT8, True), absent))
    assert caught.value.where == "own.yaml:7:5"
    assert "*.dwn_proj.weight_quantizer" in caught.value.what
    assert "down_proj.weight_quantizer" in caught.value.hint
    optional = Entry(absent.quantizer_path, INT8, True, None, False, absent.origin, absent.unit, True)
    made = plan(recipe(("*.weight_quantizer", INT8, True), optional))
    assert any("own.yaml:7:5" in warning for warning in made.warnings)


def test_entries_of_one_scheme_count_as_one() -> None:
    """`--layer` with a scheme makes four entries; that nothing has an output slot of its own is no error."""
    assert plan("mxfp4", layers=["*up_proj=int4_wo_128"]).warnings == []


def test_an_entry_without_effect() -> None:
    with pytest.raises(ConfigError) as caught:
        plan("mxfp4", layers=["*up_proj=fp8"], exclude=["*mlp*"])
    assert "switches quantizers on, but all of them end switched off" in caught.value.what
    assert caught.value.where == "--layer '*up_proj=fp8'"
    assert "--exclude '*mlp*'" in caught.value.hint
    with pytest.raises(ConfigError) as protected:
        plan("mxfp4", layers=["lm_head=fp8"])
    assert "role head" in protected.value.hint
    with pytest.raises(ConfigError) as empty:
        plan(recipe(("*up_proj.weight_quantizer", None, True), ("*down_proj.weight_quantizer", INT8, True)))
    assert "add a cfg" in empty.value.hint
    with pytest.raises(ConfigError) as partly:  # the head's input is excluded, and the others have no cfg either
        plan(recipe(("*.weight_quantizer", INT8, True), ("*.input_quantizer", None, True)))
    assert "add a cfg" in partly.value.hint


def test_to_be_overruled_is_no_error() -> None:
    made = plan("mxfp4", layers=["*up_proj=fp8", "*mlp*=int4_wo_128"])
    assert {t.weight.element for t in made.quantized() if ".mlp." in t.name} == {"int4"}


def test_a_plan_that_quantizes_nothing() -> None:
    with pytest.raises(ConfigError, match=r"end switched off|quantizes nothing"):
        plan("mxfp4", exclude=["*"])
    with pytest.raises(ConfigError, match="the plan quantizes nothing") as caught:
        plan(recipe(("*.weight_quantizer", INT8, False)))
    assert "row 0" in caught.value.hint


def test_only_the_cache_is_something() -> None:
    made = plan(recipe(("*.absent", INT8, False), kv_cache="fp8"))
    assert list(made.quantized()) == []
    assert made.attention["model.layers.0.self_attn"].slots["k"].spec is not None


def test_widths_that_groups_do_not_divide() -> None:
    layout = lay_out(llama(inner=200), "llama")
    with pytest.raises(ModelError) as caught:
        plan("int4_wo_128", layout)
    assert caught.value.where == "model.layers.0.mlp.down_proj.weight_quantizer"
    assert "200 input features are not a multiple of group size 128 (remainder 72)" in caught.value.what
    assert "modules have this width" in caught.value.what
    assert "--exclude '*down_proj'" in caught.value.hint and "--layer '*down_proj=fp8'" in caught.value.hint
    for flags in ({"exclude": ["*down_proj"]}, {"layers": ["*down_proj=fp8"]}):
        assert plan("int4_wo_128", layout, **flags).targets["model.layers.0.mlp.up_proj"].weight is not None
    with pytest.raises(ModelError, match="modules have this width"):
        plan("mxfp4", layout)  # its weight and its input, counted once


def test_what_does_not_fit_is_left_out() -> None:
    """By one entry where all modules of a kind are concerned, and the plan says how many and why."""
    layout = lay_out(llama(inner=200), "llama")
    made = plan("int4_wo_128", layout, on_indivisible="keep")
    down = [f"model.layers.{index}.mlp.down_proj" for index in range(3)]
    assert all(made.targets[name].weight is None for name in down)
    assert set(weights(made)) == set(weights(plan("int4_wo_128", layout, exclude=["*down_proj"])))
    assert all(made.kept[f"{name}.weight"].startswith("--on-indivisible keep: 200 features") for name in down)
    assert any("leaves out 3 modules because 200 features are not a multiple of 128" in w for w in made.warnings)
    (pattern,) = (
        e.quantizer_path for e in made.entries if str(e.origin).startswith("--on") and "weight" in e.quantizer_path
    )
    assert pattern.startswith("re:") and len(made.matches) == len(made.entries)


def test_single_modules_that_do_not_fit_are_left_out_by_name() -> None:
    shapes = llama() | {"model.layers.1.mlp.down_proj.weight": (128, 200)}
    shapes |= {f"model.layers.1.mlp.{leaf}_proj.weight": (200, 128) for leaf in ("gate", "up")}
    layout = lay_out(shapes, "llama")
    made = plan("int4_wo_128", layout, on_indivisible="keep")
    left = set(weights(plan("int4_wo_128"))) - set(weights(made))
    assert left == {"model.layers.1.mlp.down_proj"}


def test_nothing_to_leave_out() -> None:
    usual, made = plan("int4_wo_128"), plan("int4_wo_128", on_indivisible="keep")
    assert weights(usual) == weights(made)
    assert any("--on-indivisible keep changes nothing" in line for line in made.warnings)


def test_an_input_alone_is_said() -> None:
    made = plan(recipe(("*.weight_quantizer", INT4, True), ("*.input_quantizer", INT8, True),
                       ("*up_proj.weight_quantizer", None, False)))  # fmt: skip
    assert made.targets["model.layers.0.mlp.up_proj"].input is None
    assert any("3 input quantizers stay off because their weight is not quantized" in w for w in made.warnings)


def test_a_bad_expression_names_its_flag() -> None:
    with pytest.raises(ConfigError, match="not a regular expression") as caught:
        plan("mxfp4", exclude=["re:("])
    assert caught.value.where == "--exclude 're:('"


def test_missing_blocks() -> None:
    shapes = {name: shape for name, shape in llama().items() if ".layers.1." not in name}
    with pytest.raises(ModelError, match="decoder block 1 of 3 has no tensors"):
        lay_out(shapes, "llama")
    with pytest.raises(ModelError, match="decoder block 3 of 5 has no tensors"):
        lay_out(llama(), "llama", num_hidden_layers=5)


def test_layers_beyond_the_config_are_kept() -> None:
    """Extra prediction layers lie behind the last block that the model runs."""
    made = plan("mxfp4", lay_out(llama(layers=4), "llama", num_hidden_layers=3))
    extra = [name for name in made.kept if ".layers.3." in name]
    assert len(extra) == 8
    assert made.kept["model.layers.3.mlp.up_proj.weight"].startswith("default exclusion, role mtp")
    assert made.parts[-1].kind == "rest"


def test_matches_are_counted() -> None:
    made = plan("mxfp4", MIXTRAL, exclude=["*.layers.1.*"])
    assert made.matches[0] == len(list(made.slots()))
    assert made.matches[1] == len(made.targets) == 2 * (5 + 12) + 2
    assert len(mixtral()) == 2 * (6 + 12) + 3
    assert {entry for entry in made.entries if entry.unit == "exclude --exclude '*.layers.1.*'"}
    assert LLAMA.family == "llama"


def test_an_input_that_nothing_can_measure(tmp_path: Path) -> None:
    """Extra layers that no pass runs have no activations; schemes without data take them."""
    source = runs.build("llama", tmp_path / "m", num_hidden_layers=3)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}))
    extra = "model.layers.2.self_attn.q_proj"
    assert runs.prepare(source, scheme="fp8", calib_data="builtin").plan.targets[extra].weight is None
    with pytest.raises(ConfigError, match="its input needs calibration, and text does not reach this module") as caught:
        runs.prepare(source, scheme="fp8", calib_data="builtin", unprotect=["mtp"])
    assert ".layers.2." in caught.value.where and "role mtp" in caught.value.what
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_128", unprotect=["mtp"])
    assert f"{extra}.weight_scale" in runs.read_all(made.folder)


def test_a_router_is_measured_like_any_linear(tmp_path: Path) -> None:
    source = runs.build("qwen3_moe", tmp_path / "m")
    text = runs.text_file(tmp_path / "t.txt")
    made = runs.run(source, tmp_path / "out", scheme="fp8", unprotect=["router"], **runs.data(text))
    written = runs.read_all(made.folder)
    for layer in (0, 1):
        experts = written[f"model.layers.{layer}.mlp.experts.0.up_proj.input_scale"]
        assert written[f"model.layers.{layer}.mlp.gate.input_scale"] == experts  # they read the same activation
