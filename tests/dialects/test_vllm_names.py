"""Names that vLLM has for modules beside those of the files, in configs that it reads (`FamilyModel.in_vllm`).

Each of these families was written whole and with such modules left out, and loaded in vLLM's CPU build.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from quarkcli import dialects
from quarkcli.dialects import _vllm_names as vllm_names
from quarkcli.dialects._patterns import WrittenNames
from quarkcli.family import FamilyModel, known
from quarkcli.family.rewrites import Rewrites
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog
from quarkcli.spec import PerGroup, ScaleSpec, TensorSpec

from .plans import FP8_GROUP, FP8_TILE, PAIRS, Module, Pair, int4, plan

PTPC = PAIRS["ptpc"]
# Dialect -> the list of its config, and a pair that it holds.
LISTS: dict[str, tuple[str, Pair]] = {
    "compressed-tensors": ("ignore", PTPC),
    "quark": ("exclude", PTPC),
    "modelopt": ("ignore", PTPC),
    "fp8": ("modules_to_not_convert", (FP8_TILE, FP8_GROUP)),
    "awq": (
        "modules_to_not_convert",
        (TensorSpec("uint4", PerGroup(32), ScaleSpec("model", "half_range"), "int"), None),
    ),
}
# Family -> modules that are quantized, modules that are left out, and the names that vLLM has for these.
CASES = {
    "gptj": (
        "transformer.h.0.attn.q_proj transformer.h.1.mlp.fc_in",
        "transformer.h.1.attn.q_proj transformer.h.1.attn.k_proj transformer.h.1.attn.v_proj",
        "transformer.h.1.attn.qkv_proj",
    ),
    "granitemoehybrid": (
        "model.layers.0.mamba.in_proj model.layers.1.self_attn.o_proj",
        "model.layers.1.mamba.in_proj",
        "model.layers.1.mixer.in_proj",
    ),
    "falcon_h1": (
        "model.layers.0.mamba.in_proj model.layers.0.self_attn.o_proj model.layers.1.feed_forward.down_proj",
        "model.layers.1.mamba.in_proj model.layers.1.self_attn.o_proj model.layers.0.feed_forward.down_proj",
        "model.3.mixer.in_proj model.layers.1.o_proj",
    ),
    "gemma3n": (
        "model.layers.0.mlp.up_proj model.layers.0.per_layer_projection",
        "model.altup_projections.0 model.per_layer_model_projection model.altup_unembed_projections.0",
        "model.self_decoder.altup_projections.0 model.self_decoder.per_layer_model_projection",
    ),
    "gemma3n with towers": (
        "model.language_model.layers.0.mlp.up_proj",
        "model.language_model.altup_projections.0 model.language_model.altup_unembed_projections.0",
        "model.language_model.self_decoder.altup_projections.0 language_model.model.altup_unembed_projections.0",
    ),
    "gemma4": (
        "model.layers.0.self_attn.q_proj model.layers.0.self_attn.k_proj model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
    ),
}


def family(name: str, modules: Iterable[str]) -> FamilyModel:
    return known.spelled(
        known.load(catalog.find("models", name.partition(" ")[0])), [f"{module}.weight" for module in modules]
    )


# vLLM's names that patterns of compressed-tensors match too: those of trees without a quantized module.
BY_PATTERN = {"gemma3n": {"model.self_decoder.altup_projections.0"}}


def made(name: str, pairs: dict[str, Pair | None]) -> Plan:
    """A plan of one family with linears of one size."""
    own = Rewrites(family(name, pairs))
    found = plan([Module(module, (128, 128), "up") for module in pairs], lambda module: pairs[module.name])
    return replace(found, rewrites=own)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dialect", LISTS)
def test_a_list_of_modules_left_out_has_both_names(name: str, dialect: str) -> None:
    quantized, left, others = (names.split() for names in CASES[name])
    (key, pair), writer = LISTS[dialect], dialects.writer(dialect)
    less = made(name, {**dict.fromkeys(quantized, pair), **dict.fromkeys(left)})
    config = writer.config(less)
    without = writer.config(replace(less, rewrites=Rewrites()))
    assert config == {**without, key: [*without[key], *others]}
    assert "vllm" in writer.loaders(less)
    assert writer.config_faults(config, "vllm", less) == []
    told = writer.config_faults(without, "vllm", less)
    by_pattern = {other for other in others if WrittenNames(without[key], others).named(other, without[key])}
    assert by_pattern == (BY_PATTERN.get(name, set()) if dialect == "compressed-tensors" else set())
    assert len(told) == 1 and {other for other in others if other not in told[0]} == by_pattern
    assert writer.config_faults(without, "transformers", less) == []
    whole = made(name, dict.fromkeys([*quantized, *left], pair))
    assert writer.config(whole)[key] == [] and "vllm" in writer.loaders(whole)


@pytest.mark.parametrize("name", CASES)
def test_a_scheme_of_modules_with_other_names_can_be_said_only_where_it_is_the_only_one(name: str) -> None:
    quantized, left, _ = (names.split() for names in CASES[name])
    mixed = made(name, {**dict.fromkeys(quantized, PTPC), **dict.fromkeys(left, PAIRS["int4-32"])})
    groups = made(name, {**dict.fromkeys(quantized, (int4(64), None)), **dict.fromkeys(left, (int4(32), None))})
    for dialect in ("compressed-tensors", "quark"):
        assert "vllm" not in dialects.writer(dialect).loaders(mixed)
        assert "vllm" not in dialects.writer(dialect).loaders(groups)


def test_a_name_of_another_module_is_not_listed() -> None:
    """Gemma 4: most blocks have a v projection of their own."""
    keys, values = (f"model.layers.0.self_attn.{leaf}_proj" for leaf in "kv")
    writer = dialects.writer("compressed-tensors")
    assert writer.config(made("gemma4", {keys: None, values: PTPC}))["ignore"] == [keys]
    assert "vllm" in writer.loaders(made("gemma4", {keys: PTPC, values: PAIRS["int4-32"]}))


@pytest.mark.parametrize("name", CASES)
def test_gptq_is_told_by_the_names_in_the_files_alone(name: str) -> None:
    """vLLM looks for its own names among the tensors, and takes a module that it does not find for an unquantized."""
    quantized, left, _ = (names.split() for names in CASES[name])
    pair, writer = PAIRS["int4-32"], dialects.writer("gptq")
    less = made(name, {**dict.fromkeys(quantized, pair), **dict.fromkeys(left)})
    whole = made(name, dict.fromkeys([*quantized, *left], pair))
    alike = {module for module in less.targets if module not in vllm_names.own_names(less)}
    assert ("vllm" in writer.loaders(less)) == alike.issuperset(quantized)
    assert "vllm" not in writer.loaders(whole)
    assert "vllm" in writer.loaders(replace(whole, rewrites=Rewrites()))


def test_a_rule_that_is_no_expression_is_refused() -> None:
    with pytest.raises(ValueError, match="no regular expression"):
        FamilyModel.model_validate({"blocks": "layers", "embed": [], "tail": [], "roles": {}, "in_vllm": {"(": ""}})
