"""Configs of other tools as recipes: each is named, with flags that ask for the same here."""

from __future__ import annotations

from typing import Any

import pytest

from quarkcli import algorithms
from quarkcli.errors import ConfigError
from quarkcli.recipe import catalog
from quarkcli.recipe.recipe import from_config, from_scheme

GPTQ = {"bits": 4, "group_size": 128, "desc_act": True, "sym": True, "damp_percent": 0.01}
AWQ = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
SMOOTH = {"SmoothQuantModifier": {"smoothing_strength": 0.8}}
COMPRESSOR = {"GPTQModifier": {"scheme": "W4A16", "targets": "Linear", "ignore": ["lm_head", "re:.*gate$"]}}
TILES = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        (GPTQ, "use --scheme int4_wo_128 --algorithm gptq"),
        ({**GPTQ, "sym": False, "group_size": -1}, "use --scheme uint4_wo_per_channel --algorithm gptq"),
        ({"quantization_config": {**GPTQ, "quant_method": "gptq"}}, "use --scheme int4_wo_128 --algorithm gptq"),
        ({**GPTQ, "iters": 200}, "use --scheme int4_wo_128 --algorithm gptq,autoround"),
        (AWQ, "use --scheme uint4_wo_64 --algorithm awq"),
        (
            {"bits": 8, "group_size": 128},
            "use --algorithm gptq with a scheme: 'quark schemes list' shows all; none is int8_wo_128",
        ),
        ({"quantization_config": TILES, "model_type": "x"}, "use --scheme fp8_block128"),
        ({"quant_method": "fp8"}, "use --scheme ptpc_fp8"),
        ({"quant_method": "mxfp4"}, "use --scheme mxfp4_weight_only"),
        (
            {"load_in_4bit": True},
            "use --scheme int4_wo_64 --algorithm gptq; the formats of bitsandbytes are not written",
        ),
        ({"load_in_8bit": True}, "use --scheme int8_dynamic; the formats of bitsandbytes are not written"),
        (
            {"quant_stage": {"quant_modifiers": {**SMOOTH, **COMPRESSOR}}},
            "use --scheme int4_wo_128 --algorithm smoothquant,gptq --exclude 're:.*gate$'",
        ),
        ({"stage": {"QuantizationModifier": {"scheme": "FP8_DYNAMIC", "ignore": "lm_head"}}}, "use --scheme ptpc_fp8"),
        (
            {"stage": {"AWQModifier": {"config_groups": {}}, "MyModifier": None}},
            "use --scheme NAME --algorithm awq; 'quark schemes list' shows all names; MyModifier has no equivalent",
        ),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "use --model with its directory"),
    ],
)
def test_a_config_of_another_tool_is_answered_with_flags(config: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_config(config)
    assert (caught.value.kind, caught.value.hint) == ("E-RECIPE-KIND", hint)


def test_a_scheme_is_no_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARK_HOME", "/home/me")
    with pytest.raises(ConfigError) as caught:
        from_config({"summary": "mine", "weight": {"element": "int4"}})
    assert caught.value.what == "this is a scheme and not a recipe"
    assert caught.value.hint == "put it into /home/me/schemes, then use --scheme with its name"


@pytest.mark.parametrize("config", [{"bits": "four"}, {"colour": "red"}])
def test_what_nobody_knows_is_no_recipe(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="this is not a recipe") as caught:
        from_config(config)
    assert "schema: quark/recipe/1" in caught.value.hint


def test_presets_are_schemes_and_modifiers_are_algorithms() -> None:
    known = catalog.elsewhere()
    assert all(from_scheme(name).scheme == name for name in known["presets"].values())
    assert all(catalog.same(name) == name for names in (known["presets"], known["modifiers"]) for name in names)
    assert set(known["modifiers"].values()) - {""} <= set(algorithms.names())
