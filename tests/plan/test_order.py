"""Later entries win; the resolved order of recipe and flags."""

from __future__ import annotations

from typing import Any

import pytest

from quarkcli.errors import ConfigError, UsageError
from quarkcli.recipe.entries import Entry, Origin
from quarkcli.recipe.recipe import Recipe

from .layouts import GPT_OSS, LLAMA, MIXTRAL, decided, origin, plan, weights

INT8 = {"element": "int8"}
INT4 = {"element": "int4", "granularity": {"group": 32}}
FP8 = {"element": "fp8_e4m3"}
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
HEAD = "lm_head.weight_quantizer"


def recipe(*rows: tuple[str, dict[str, Any] | None, bool] | Entry, **settings: Any) -> Recipe:
    """A recipe of entries (pattern, cfg, enable)."""
    entries = [Entry("*", None, False, origin=Origin("row deny"))]
    for index, row in enumerate(rows):
        name = f"row {index}"
        entries.append(row if isinstance(row, Entry) else Entry(*row, None, False, Origin(name), name, True))
    return Recipe("own", "own.yaml", None, entries, **settings)


def test_the_last_match_decides() -> None:
    made = plan(recipe(("*.weight_quantizer", INT8, True), ("*up_proj.weight_quantizer", FP8, True)))
    assert decided(made, f"{UP}.weight_quantizer") == "fp8_e4m3"
    assert decided(made, f"{DOWN}.weight_quantizer") == "int8"
    assert origin(made, f"{UP}.weight_quantizer") == "row 1"
    other = plan(recipe(("*up_proj.weight_quantizer", FP8, True), ("*proj.weight_quantizer", INT8, True)))
    assert set(weights(other).values()) == {"int8"}


def test_a_cfg_replaces_all_that_was_said_before() -> None:
    made = plan(recipe(("*.weight_quantizer", INT4, True), ("*up_proj.weight_quantizer", {"element": "int4"}, True)))
    assert made.targets[UP].weight.group_size is None
    assert made.targets[DOWN].weight.group_size == 32


def test_switching_keeps_the_cfg() -> None:
    made = plan(
        recipe(
            ("*.weight_quantizer", INT4, True), ("*layers.0.*", None, False), ("*layers.0.mlp.up*", None, True),
        )
    )  # fmt: skip
    assert decided(made, f"{UP}.weight_quantizer") == "int4"
    assert decided(made, f"{DOWN}.weight_quantizer") is None
    assert decided(made, f"{UP}.input_quantizer") is None  # on, but nobody said how
    late = plan(recipe(("*.weight_quantizer", None, True), ("*.weight_quantizer", INT4, False), ("*up*", None, True)))
    assert set(weights(late)) == {f"model.layers.{index}.mlp.up_proj" for index in range(3)}


def test_classes() -> None:
    rows = [Entry("*.weight_quantizer", INT8, True, kind, False, Origin(kind), kind, True)
            for kind in ("nn.Linear", "nn.Embedding")]  # fmt: skip
    made = plan(recipe(*rows, exclusions=False))
    assert origin(made, "model.embed_tokens.weight_quantizer") == "nn.Embedding"
    assert origin(made, f"{UP}.weight_quantizer") == "nn.Linear"
    assert made.matches[1:] == [3 * 7 + 1, 1]


def test_flags_in_their_order() -> None:
    made = plan(
        "mxfp4",
        layer_types=["Linear=int4_wo_128"],
        layers=["*mlp*=fp8", "*up_proj=nvfp4"],
        exclude=["*layers.1.*"],
        include=["*layers.1.mlp.down_proj"],
        kv_cache="fp8",
    )
    assert origin(made, "model.layers.0.self_attn.q_proj.weight_quantizer") == "--layer-type 'Linear=int4_wo_128'"
    assert decided(made, "model.layers.0.self_attn.q_proj.weight_quantizer") == "int4"
    assert decided(made, f"{DOWN}.weight_quantizer") == "fp8_e4m3"
    assert made.targets[UP].weight.group_size == 16
    assert origin(made, f"{UP}.weight_quantizer") == "--layer '*up_proj=nvfp4'"
    assert decided(made, "model.layers.1.mlp.up_proj.weight_quantizer") is None
    back = "model.layers.1.mlp.down_proj"  # the run's scheme again, not that of --layer
    assert made.targets[back].weight.group_size == 32
    assert decided(made, "model.layers.1.self_attn.k_bmm_quantizer") == "fp8_e4m3"
    assert decided(made, "model.layers.1.self_attn.q_bmm_quantizer") is None
    assert decided(made, HEAD) is None


def test_a_scheme_switches_off_the_kinds_it_lacks() -> None:
    made = plan("nvfp4", layers=["*up_proj=int4_wo_128"])
    assert made.targets[UP].input is None
    assert made.targets[DOWN].input is not None
    assert decided(made, f"{UP}.input_quantizer") is None


def test_protected_roles() -> None:
    made = plan("int4_wo_128")
    assert set(weights(made)) == {name for name in made.targets if ".layers." in name}
    assert "role head" in made.kept["lm_head.weight"]
    assert "role embedding" in made.kept["model.embed_tokens.weight"]
    assert made.kept["model.norm.weight"].startswith("norm")
    assert "role router" in origin(plan("mxfp4", MIXTRAL), "model.layers.0.block_sparse_moe.gate.weight_quantizer")


def test_unprotect_and_include_reach_the_head() -> None:
    for flags in ({"unprotect": ["head"]}, {"include": ["lm_head"]}):
        made = plan("int4_wo_128", **flags)
        assert decided(made, HEAD) == "int4"
        assert decided(made, "model.embed_tokens.weight_quantizer") is None
    routers = plan("int4_wo_128", MIXTRAL, unprotect=["router"])
    assert "model.layers.0.block_sparse_moe.gate" in weights(routers)


def test_an_exclusion_leaves_the_cache_alone() -> None:
    made = plan("fp8", exclude=["*self_attn*"], kv_cache="fp8")
    assert decided(made, "model.layers.0.self_attn.q_proj.weight_quantizer") is None
    assert decided(made, "model.layers.0.self_attn.k_bmm_quantizer") == "fp8_e4m3"


def test_the_flag_for_the_cache_wins() -> None:
    own = recipe(("*.weight_quantizer", INT8, True), kv_cache="fp8")
    assert decided(plan(own), "model.layers.0.self_attn.v_bmm_quantizer") == "fp8_e4m3"
    assert decided(plan(own, kv_cache="none"), "model.layers.0.self_attn.v_bmm_quantizer") is None
    written = recipe(("*.weight_quantizer", INT8, True), ("*.[qkvp]_bmm_quantizer", FP8, True))
    without = plan(written, kv_cache="none")
    kept = {kind: decided(without, f"model.layers.0.self_attn.{kind}_bmm_quantizer") for kind in "qkvp"}
    assert kept == {"q": "fp8_e4m3", "k": None, "v": None, "p": "fp8_e4m3"}
    without = plan(written, kv_cache="none", attention="none")
    assert all(decided(without, f"model.layers.0.self_attn.{kind}_bmm_quantizer") is None for kind in "qkvp")


def test_include_with_a_recipe_goes_back_before_the_exclusions() -> None:
    own = recipe(("*.weight_quantizer", INT4, True), ("lm_head.weight_quantizer", FP8, True))
    made = plan(own, exclude=["*up_proj"], include=["*layers.0.mlp.up_proj", "lm_head"])
    assert decided(made, f"{UP}.weight_quantizer") == "int4"
    assert decided(made, "model.layers.1.mlp.up_proj.weight_quantizer") is None
    assert decided(made, HEAD) == "fp8_e4m3"
    assert origin(made, HEAD) == "--include 'lm_head'"
    # What the recipe itself left off stays off.
    own = recipe(("*.weight_quantizer", INT4, True), ("*up_proj.weight_quantizer", None, False))
    made = plan(own, exclude=["*layers.0.*"], include=["*layers.0.mlp.*"])
    assert decided(made, f"{UP}.weight_quantizer") is None
    assert decided(made, f"{DOWN}.weight_quantizer") == "int4"


def test_recipes_without_default_exclusions() -> None:
    made = plan(recipe(("*.weight_quantizer", INT8, True), exclusions=False))
    assert {"lm_head", "model.embed_tokens"} < set(weights(made))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*block_sparse_moe.experts.0.w1", 2),  # names in the file
        ("*mlp.experts.0.gate_proj", 2),  # names in memory
        ("*mlp.experts.gate_proj", 8),  # without the expert's index
        ("*experts.w2", 8),
        ("re:model\\.layers\\.1\\.mlp\\.experts\\.[01]\\.(up|down)_proj", 4),
    ],
)
def test_other_spellings_of_experts(pattern: str, count: int) -> None:
    made = plan("mxfp4", MIXTRAL, layers=[f"{pattern}=mxfp4"])
    units = [matched for entry, matched in zip(made.entries, made.matches, strict=True) if "--layer" in entry.unit]
    assert units == [count] * 4  # one entry for each kind


def test_experts_of_fused_files_have_names() -> None:
    made = plan("mxfp4", GPT_OSS, exclude=["*experts.1.*"])
    names = {name for name in weights(made) if ".experts." in name}
    assert len(names) == 2 * 3 * 3
    assert "model.layers.1.mlp.experts.1.up_proj" in made.targets
    assert "model.layers.1.mlp.experts.gate_up_proj" not in made.kept
    assert made.kept["model.layers.1.mlp.experts.gate_up_proj_bias"]


@pytest.mark.parametrize("flag", ["up_proj", "=fp8", "*up=", "*up_proj=fp9"])
def test_pairs_of_pattern_and_scheme(flag: str) -> None:
    for name in ("layers", "layer_types"):
        with pytest.raises(UsageError):
            plan("mxfp4", LLAMA, **{name: [flag]})


def test_unknown_roles() -> None:
    with pytest.raises(ConfigError, match=r"unknown role .* 'heads'") as caught:
        plan("mxfp4", unprotect=["heads"])
    assert caught.value.hint == "did you mean 'head'?"
