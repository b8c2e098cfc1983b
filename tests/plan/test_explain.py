"""What a plan says of one slot."""

from __future__ import annotations

import json
import re

import pytest

from quarkcli.errors import ConfigError
from quarkcli.plan.explain import explain
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.entries import Entry, Origin

from .layouts import MIXTRAL, lay_out, llama, plan
from .test_order import FP8, INT4, INT8, UP, recipe

SLOT = f"{UP}.weight_quantizer"


def written(pattern: str, line: int, cfg: object = None, enable: bool = True, parent: str | None = None) -> Entry:
    return Entry(pattern, cfg, enable, parent, False, Origin("own.yaml", line, 5), f"own.yaml:{line}:5", False)  # type: ignore[arg-type]


def test_every_entry_in_order_with_its_place() -> None:
    made = plan(
        recipe(
            written("*.weight_quantizer", 4, INT4),
            written("*down_proj*", 5, INT8),
            written("*up_proj*", 6, None, False),
            written("*mlp*", 7, INT8, True, "nn.Embedding"),
            written("*weight_quantizer.1", 8, None, False),
            written(f"re:.*{UP[-7:]}\\.weight_quantizer", 9, FP8),
        )
    )
    found = explain(made, SLOT)
    assert [(str(m.entry.origin), m.effect, m.decides) for m in found.matches] == [
        ("row deny", "switches off", False),
        ("own.yaml:4:5", "replaces", False),
        ("own.yaml:6:5", "switches off", False),
        ("own.yaml:7:5", "only for nn.Embedding; this is nn.Linear", False),
        ("own.yaml:8:5", "is about a stage of a chain that this quantizer does not have", False),
        ("own.yaml:9:5", "replaces", True),
    ]
    assert [m.after and m.after.element for m in found.matches] == [None, "int4", None, None, None, "fp8_e4m3"]
    assert found.spec == made.targets[UP].weight
    assert (found.role, found.parent_class, found.idle) == ("up", "nn.Linear", None)
    assert found.facts() == {"spec": found.spec.describe(), "rule": ["absmax"], "granularity": ["tensor"]}


@pytest.mark.parametrize("overrides", [{}, {"exclude": ["*mlp*"], "include": ["*up_proj"]}, {"kv_cache": "fp8"}])
def test_it_is_what_the_plan_says(overrides: dict[str, object]) -> None:
    own = recipe(("*.weight_quantizer", INT4, True), ("*input_quantizer", INT8, True), ("*o_proj*", None, False))
    made = plan(own, MIXTRAL, **overrides) if "include" not in overrides else plan(own, **overrides)
    for slot, decision in made.slots():
        found = explain(made, slot)
        assert found.slot == slot
        assert found.spec == decision.spec
        assert (found.decided.index if found.decided else None) == decision.entry
        assert found.matches[-1].after == decision.spec


def test_a_flag_brings_back_what_was_there() -> None:
    made = plan(recipe(("*.weight_quantizer", INT4, True)), exclude=["*mlp*"], include=["*up_proj"])
    found = explain(made, SLOT)
    assert found.decided is not None
    assert found.decided.effect == "restores what was set before the exclusions"
    assert str(found.decided.entry.origin) == "--include '*up_proj'"


def test_a_chain() -> None:
    chain = [{"num_bits": 4, "block_sizes": {-1: 32}}, {"num_bits": [4, 3]}]
    made = plan(recipe(("*.weight_quantizer", chain, True), ("*weight_quantizer.1", INT8, True)))
    found = explain(made, f"{SLOT}.1")
    assert [match.effect for match in found.matches] == ["switches off", "replaces", "replaces stage 1"]
    assert found.facts()["granularity"] == [{"group": 32}, "tensor"]
    assert len(found.facts()["rule"]) == 2


def test_other_names_are_tried_and_told() -> None:
    made = plan("mxfp4", MIXTRAL, layers=["*mlp.experts.gate_proj=fp8"])
    own = "model.layers.1.block_sparse_moe.experts.2.w1.weight_quantizer"
    found = explain(made, "model.layers.1.mlp.experts.2.gate_proj.weight_quantizer")
    assert found.slot == own == explain(made, own.removesuffix(".weight_quantizer")).slot
    assert found.decided is not None and str(found.decided.entry.origin) == "--layer '*mlp.experts.gate_proj=fp8'"
    assert "model.layers.1.mlp.experts.gate_proj.weight_quantizer" in found.names
    softmax = explain(plan("mxfp4", attention="fp8"), "model.layers.0.self_attn.softmax_quantizer")
    assert softmax.slot == "model.layers.0.self_attn.p_bmm_quantizer"
    assert softmax.spec is not None


def test_why_a_slot_with_a_spec_stays_off() -> None:
    made = plan(recipe(("*.weight_quantizer", INT4, True), ("*.input_quantizer", INT8, True),
                       ("*.bias_quantizer", INT8, True), ("*up_proj.weight_quantizer", None, False)))  # fmt: skip
    assert explain(made, f"{UP}.input_quantizer").idle == "its weight is not quantized"
    assert explain(made, "model.layers.0.mlp.down_proj.bias_quantizer").idle == "the model has no such tensor"
    assert explain(made, "model.layers.0.mlp.down_proj.input_quantizer").idle is None


def test_what_is_shared() -> None:
    made = plan("nvfp4", MIXTRAL)
    experts = "model.layers.0.block_sparse_moe.experts"
    weight = explain(made, f"{experts}.1.w1.weight_quantizer")
    assert weight.sharers == (f"{experts}.1.w1", f"{experts}.1.w3")
    down = explain(made, f"{experts}.1.w2.input_quantizer")  # one range for all experts of the layer
    assert down.readers == tuple(f"{experts}.{expert}.w2" for expert in range(4))
    assert explain(made, f"{experts}.1.w2.weight_quantizer").sharers == ()
    assert explain(plan("mxfp4", MIXTRAL), f"{experts}.1.w1").sharers == ()  # a scale for every group


def test_unknown_slots() -> None:
    with pytest.raises(ConfigError, match=r"no quantizer is called 'model.layers.0.mlp.upproj'") as caught:
        explain(plan("mxfp4"), "model.layers.0.mlp.upproj")
    assert "up_proj" in str(caught.value.hint)


@pytest.mark.parametrize(
    "asked", ["up_proj", "*up_proj", "model.layers.9.mlp.up_proj", "model.layers.0.mlp.upproj.weight_quantizer"]
)
def test_what_is_suggested_can_be_asked_for(asked: str) -> None:
    made = plan("mxfp4")
    with pytest.raises(ConfigError) as caught:
        explain(made, asked)
    names = re.findall("'([^']+)'", str(caught.value.hint))
    assert names
    assert all("up_proj" in explain(made, name).slot for name in names)


def test_json() -> None:
    made = plan("nvfp4", lay_out(llama(), "llama"), exclude=["*down_proj"])
    for slot in (SLOT, "model.layers.0.mlp.down_proj.input_quantizer", "model.layers.0.self_attn.k_bmm_quantizer"):
        found = json.loads(json.dumps(explain(made, slot).as_json()))
        assert found["schema"] == "quark/explanation/1"
        assert found["slot"] == slot
        decided = [match for match in found["matches"] if match["decides"]]
        assert [match["index"] for match in decided] == [found["decided_by"]]
    assert json.loads(json.dumps(explain(made, SLOT).as_json()))["spec"] == spec_to_yaml(made.targets[UP].weight)  # type: ignore[arg-type]
