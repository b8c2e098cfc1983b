"""Patterns that are suggested in place of one that matched nothing: they match, and are near it."""

from __future__ import annotations

import pytest

from quarkcli.recipe.match import Patterns, module_pattern, slot_pattern
from quarkcli.recipe.nearby import examples, hint, suggestions

BLOCK = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"]
DENSE = ["model.embed_tokens", *(f"model.layers.{i}.{leaf}" for i in range(4) for leaf in BLOCK), "lm_head"]
SPARSE = [f"model.layers.{i}.mlp.experts.{e}.{leaf}" for i in (3, 5, 9) for e in range(8) for leaf in ("w1", "w2")]
SLOTS = [f"{name}.{kind}_quantizer" for name in DENSE for kind in ("weight", "input")]


@pytest.mark.parametrize(
    ("typed", "names", "near"),
    [
        # what is left out
        ("layers.0.*", DENSE, "model.layers.0.*"),
        ("0.mlp", DENSE, "model.layers.0.mlp.*"),
        ("*mlp", DENSE, "*.mlp.*"),
        ("*.mlp", DENSE, "*.mlp.*"),
        ("model.layers.0", DENSE, "model.layers.0.*"),
        ("model.layers.0.mlp", DENSE, "model.layers.0.mlp.*"),
        ("up_proj", DENSE, "*.up_proj"),
        ("model.layers.0.mlp.up", DENSE, "model.layers.0.mlp.up*"),
        ("*.mlp.weight_quantizer", SLOTS, "*.mlp.*.weight_quantizer"),
        ("*up_proj.weight", SLOTS, "*.up_proj.weight_quantizer"),
        # what is too much
        ("*.lm_head", DENSE, "lm_head"),
        ("lm_head.*", DENSE, "lm_head"),
        ("lm_head.weight", DENSE, "lm_head"),
        ("*.mlp.q_proj", DENSE, "*.q_proj"),
        ("model.layers.1.q_proj", DENSE, "model.layers.1.*.q_proj"),
        # what is misspelt
        ("mödel*", DENSE, "model*"),
        ("LM_Head", DENSE, "lm_head"),
        ("*dwn_proj", DENSE, "*down_proj"),
        ("*dwn_proj*", SLOTS, "*down_proj*"),
        ("*dwn_proj.weight_quantizer", SLOTS, "*down_proj.weight_quantizer"),
        ("*.mlpp.*", SLOTS, "*.mlp.*"),
        ("model.layers.*.mlp.up_prj", DENSE, "model.layers.*.mlp.up_proj"),
        ("layer.0.selfattn", DENSE, "model.layers.0.self_attn.*"),
        # a number that no name has
        ("model.layers.4.*", DENSE, "model.layers.3.*"),
        ("*.experts.10.*", SPARSE, "*.experts.7.*"),
        # expressions
        ("re:down_proj", DENSE, "re:.*down_proj"),
        ("re:mlp|lm", DENSE, "re:.*(?:mlp|lm).*"),
        ("re:(?i).*DWN_PROJ", DENSE, "re:(?i).*down_proj"),
        (r"re:layers\.0", DENSE, r"re:.*layers\.0.*"),
    ],
)
def test_the_nearest_that_matches(typed: str, names: list[str], near: str) -> None:
    found = suggestions(typed, names)
    assert found[0] == near
    assert typed not in found
    assert all(any(map(Patterns().matcher(one), names)) for one in found)


@pytest.mark.parametrize("typed", ["zzzzzz", "*zzz*", "*", "", "zzz.weight_quantizer", "re:zzz", "re:(", "."])
def test_nothing_is_near(typed: str) -> None:
    assert suggestions(typed, SLOTS) == []
    assert hint(typed, DENSE).startswith("run 'quark plan")
    assert suggestions(typed, []) == []


def test_numbers_that_exist_are_said() -> None:
    assert hint("layers.9.mlp", DENSE).endswith("In place of 9 the model has 0 to 3")
    assert hint("*.layers.4.*", SPARSE).endswith("In place of 4 the model has 3, 5, 9")


def test_names_and_no_patterns() -> None:
    assert examples("up_proj", DENSE) == examples("*up_proj", DENSE) == ["model.layers.0.mlp.up_proj"]
    assert examples("model.layers.9.mlp.up_proj", DENSE) == ["model.layers.3.mlp.up_proj"]
    assert examples("model.layers.0.mlp", DENSE) == [f"model.layers.0.{leaf}" for leaf in BLOCK[2:]]
    assert examples("zzz", DENSE) == []


@pytest.mark.parametrize("module", ["*q_proj", "*", "re:.*q_proj", "re:a|b", "re:(?i)(?:a|b)"])
def test_the_module_pattern_of_a_slot_pattern(module: str) -> None:
    assert module_pattern(slot_pattern(module, "weight_quantizer")) == module


def test_flags_of_an_expression_stay_at_its_beginning() -> None:
    assert Patterns().matcher(slot_pattern("re:(?i).*DOWN_PROJ", "weight_quantizer"))("a.down_proj.weight_quantizer")
