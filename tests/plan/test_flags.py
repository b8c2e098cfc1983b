"""Flags without which the plan would be the same are said."""

from __future__ import annotations

from typing import Any

import pytest

from quarkcli.recipe.recipe import from_config

from .layouts import LLAMA, MIXTRAL, decided, plan, weights
from .test_order import INT8, recipe

EMBEDDING = "model.embed_tokens.weight_quantizer"
DENY = {"quantizer_path": "*", "enable": False}


def idle(made: Any) -> list[str]:
    return [warning for warning in made.warnings if "changes nothing" in warning]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"exclude": ["lm_head"]}, "--exclude 'lm_head'"),
        ({"exclude": ["*q_proj"], "layers": []}, None),
        ({"include": ["*q_proj"]}, "--include '*q_proj'"),
        ({"include": ["lm_head"]}, None),
        ({"layers": ["*q_proj=fp8"]}, "--layer '*q_proj=fp8'"),
        ({"layers": ["*q_proj=mxfp4"]}, None),
        ({"layers": ["*q_proj=mxfp4", "*q_proj=int8"]}, "--layer '*q_proj=mxfp4'"),
        ({"layer_types": ["Linear=fp8"]}, "--layer-type 'Linear=fp8'"),
        ({"layer_types": ["Embedding=int8"]}, None),
        ({"unprotect": ["audio"]}, "--unprotect audio"),
        ({"unprotect": ["head"]}, None),
        ({"unprotect": ["head"], "exclude": ["lm_head"]}, "--unprotect head"),
        ({"allow_unmatched": True}, "--allow-unmatched"),
        ({"kv_cache": "none"}, "--kv-cache none"),
        ({"kv_cache": "fp8"}, None),
        ({"attention": "none"}, "--attention none"),
        ({"kv_cache": "fp8", "attention": "fp8"}, None),
        ({"kv_cache": "fp8", "min_kv_scale": 0.5}, None),
    ],
)
def test_what_changes_nothing_is_named(flags: dict[str, Any], named: str | None) -> None:
    found = idle(plan("fp8", **flags))
    assert [line.split(" changes")[0] for line in found] == ([named] if named else [])


def test_of_two_that_say_the_same_one_is_named() -> None:
    made = plan("fp8", exclude=["*q_proj", "re:.*q_proj"])
    assert idle(made) == ["--exclude '*q_proj' changes nothing: the plan is the same without it"]


def test_what_a_recipe_names_is_switched_off() -> None:
    assert not idle(plan(recipe(("*.weight_quantizer", INT8, True), kv_cache="fp8"), kv_cache="none"))
    own = recipe(("*.weight_quantizer", INT8, True), ("*[kv]_bmm_quantizer", INT8, True))
    assert not idle(plan(own, kv_cache="none"))


def test_a_slot_that_does_not_count_is_no_effect() -> None:
    """An input quantizer that is on beside a weight that is not quantized stays off anyway."""
    rows = recipe(("*mlp*.weight_quantizer", INT8, True), ("*proj.input_quantizer", INT8, True))
    assert idle(plan(rows, exclude=["*q_proj"])) == [
        "--exclude '*q_proj' changes nothing: the plan is the same without it"
    ]


def test_roles_of_a_recipe_without_exclusions() -> None:
    bare = recipe(("*mlp*.weight_quantizer", INT8, True), exclusions=False)
    assert "own has no default exclusions" in idle(plan(bare, unprotect=["head"]))[0]
    mlp = recipe(("*experts*.weight_quantizer", INT8, True))
    assert "no entry quantizes the 2 modules of this role" in idle(plan(mlp, MIXTRAL, unprotect=["router"]))[0]
    assert "no quantizer for the 4 tensors of this role" in idle(plan("fp8", unprotect=["norm"]))[0]
    assert "the model has no module of this role" in idle(plan("fp8", unprotect=["audio"]))[0]


def test_a_class_that_is_named_is_meant() -> None:
    made = plan("fp8", layer_types=["Embedding=int8"])
    assert decided(made, EMBEDDING) == "int8"
    assert decided(made, "lm_head.weight_quantizer") is None
    entries = [DENY, {"quantizer_path": "*", "parent_class": "nn.Embedding", "cfg": INT8}]
    document = {"schema": "quark/recipe/1", "metadata": {"description": "x"}, "quantize": {"quant_cfg": entries}}
    assert weights(plan(from_config(document))) == {"model.embed_tokens": "int8"}
    assert decided(plan("fp8", layer_types=["Linear=int8"]), EMBEDDING) is None
    assert "model.embed_tokens" in LLAMA.protected
