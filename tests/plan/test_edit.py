"""Edits of a plan: the semantics that NVIDIA ModelOpt 0.47 shows when it is run (facts of its ordered list), and ours
where they differ on purpose: a chain is replaced and never nested, a pattern of an edit that matches nothing is said.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest
import torch

from quarkcli.errors import ConfigError, ModelError, UsageError
from quarkcli.family import Layout
from quarkcli.plan import edit
from quarkcli.plan.compose import Basis, Overrides
from quarkcli.plan.model import Plan
from quarkcli.plan.resolve import resolve
from quarkcli.recipe import catalog
from quarkcli.recipe.recipe import Recipe, from_config, from_scheme
from quarkcli.spec import ObserverSpec, PerChannel, PerGroup, PerTensor, ScaleSpec, TensorSpec

from .layouts import LLAMA, MIXTRAL, decided, plan

DENY = {"quantizer_path": "*", "enable": False}
WEIGHTS = "*weight_quantizer"
INPUTS = "*input_quantizer"
INT8 = {"num_bits": 8, "axis": 0}
INT4 = {"num_bits": 4, "block_sizes": {-1: 32}}
FP8 = {"num_bits": [4, 3]}
UP = "model.layers.0.mlp.up_proj.weight_quantizer"
DOWN = "model.layers.1.mlp.down_proj.weight_quantizer"
NVFP4 = {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}}


def editable(recipe: Recipe | str, layout: Layout = LLAMA, **flags: Any) -> Plan:
    made = from_scheme(recipe) if isinstance(recipe, str) else recipe
    overrides = Overrides(**flags)
    found = resolve(made, overrides, layout)
    found.basis = Basis(made, overrides, layout)
    return found


def of(*entries: dict[str, Any]) -> Plan:
    """A plan of ModelOpt entries behind a deny-all."""
    return editable(from_config([DENY, *entries]))


def rule(path: str, cfg: Any = None, **more: Any) -> dict[str, Any]:
    return {"quantizer_path": path, **({"cfg": cfg} if cfg is not None else {}), **more}


def spec(made: Plan, slot: str = UP) -> TensorSpec | None:
    return dict(made.slots())[slot].spec


def specs(made: Plan) -> dict[str, TensorSpec | None]:
    return {slot: decision.spec for slot, decision in made.slots()}


def executed(made: Plan) -> Plan:
    """What a job makes of an edited plan: everything resolved again, guards included."""
    assert made.basis is not None
    return resolve(made.basis.recipe, made.basis.overrides, made.basis.layout)


# --- order and atomicity ----------------------------------------------------------------------------------------------


def test_entries_apply_in_order_on_top_of_the_plan():
    made = of(rule(WEIGHTS, INT8))
    edit.set_quantizer_by_cfg(made, [rule("*up_proj*weight_quantizer", INT4), rule("*proj.weight_quantizer", FP8)])
    assert {decided(made, slot) for slot in (UP, DOWN)} == {"fp8_e4m3"}  # later wins, not the closer one
    edit.set_quantizer_by_cfg(made, [rule("*up_proj*weight_quantizer", INT4)])
    assert (decided(made, UP), decided(made, DOWN)) == ("int4", "fp8_e4m3")


def test_a_cfg_replaces_everything():
    """The example of the facts: (4,3) per row, then 4 bits in blocks of 16; the axis is gone."""
    made = of(rule(WEIGHTS, {"num_bits": [4, 3], "axis": 0}))
    assert spec(made).granularity == PerChannel(0)
    edit.set_quantizer_by_cfg(made, [rule(WEIGHTS, {"num_bits": 4, "block_sizes": {-1: 16}})])
    assert (spec(made).element, spec(made).granularity) == ("int4", PerGroup(16))


def test_what_is_not_mentioned_is_the_default():
    made = of(rule(WEIGHTS, {"num_bits": 8, "axis": 0, "narrow_range": True}))
    edit.set_quantizer_attributes_full(made, WEIGHTS, {"num_bits": 8})
    assert (spec(made).granularity, spec(made).narrow) == (PerTensor(), False)


def test_a_switch_keeps_the_attributes():
    made = of(rule(WEIGHTS, INT4))
    before = specs(made)
    edit.disable_quantizer(made, WEIGHTS)
    assert not any(specs(made).values())
    edit.enable_quantizer(made, WEIGHTS)
    assert specs(made) == before | {slot: spec(made) for slot in before if slot.endswith("weight_quantizer")}
    assert spec(made) == before[UP]


def test_attributes_of_a_slot_that_is_off_come_back():
    made = of(rule(WEIGHTS, INT8))
    edit.set_quantizer_by_cfg(made, [rule(WEIGHTS, INT4, enable=False)])
    assert spec(made) is None
    edit.set_quantizer_by_cfg(made, [rule(WEIGHTS, enable=True)])
    assert spec(made).element == "int4"


@pytest.mark.parametrize(
    ("before", "after", "stages"),
    [
        (INT4, [INT4, FP8], 2),  # one becomes a chain
        ([INT4, FP8], INT8, 1),  # a chain becomes one
        ([INT4, FP8], [INT4, FP8], 2),  # the same twice: ModelOpt nests them, two by two
        (INT4, [INT8], 1),  # a chain of one is one
    ],
)
def test_chains_are_replaced_and_never_nested(before: Any, after: Any, stages: int):
    made = of(rule("*proj.weight_quantizer", before))
    edit.set_quantizer_by_cfg(made, [rule("*proj.weight_quantizer", after)])
    assert len(spec(made).stages) == stages
    assert executed(made).targets == made.targets


def test_a_switch_is_for_all_stages():
    made = of(rule("*proj.weight_quantizer", [INT4, FP8]))
    before = spec(made)
    edit.disable_quantizer(made, "*up_proj*")
    assert spec(made) is None
    edit.enable_quantizer(made, "*up_proj.weight_quantizer")
    assert spec(made) == before


def test_stages_have_names():
    made = of(rule("*proj.weight_quantizer", [INT4, FP8]))
    edit.disable_quantizer(made, "*weight_quantizer.1")
    assert [stage.element for stage in spec(made).stages] == ["int4"]
    for pattern, message in (
        (WEIGHTS, "a stage of this chain is off"),
        ("*weight_quantizer.1", "one stage of a chain"),
    ):
        with pytest.raises(ConfigError, match=message):
            edit.set_quantizer_attributes_partial(made, pattern, {"element": "int4"})
    edit.enable_quantizer(made, "*weight_quantizer.1")
    edit.set_quantizer_attributes_full(made, f"{UP}.0", {"num_bits": 4, "block_sizes": {-1: 64}})
    assert [stage.granularity for stage in spec(made).stages] == [PerGroup(64), PerTensor()]
    assert spec(made, DOWN).granularity == PerGroup(32)


# --- which slots ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", ["nn.Linear", torch.nn.Linear])
def test_parent_class(linear: Any):
    made = editable("mxfp4_weight_only", unprotect=["embedding", "head"])
    edit.disable_quantizer(made, "*", parent_class=linear)
    on = [slot for slot, value in specs(made).items() if value is not None]
    assert on == ["model.embed_tokens.weight_quantizer"]
    edit.set_quantizer_attributes_partial(made, "*", {"enable": True}, "nn.Embedding")
    edit.disable_quantizer(made, lambda name: True, torch.nn.Embedding)
    assert not any(specs(made).values())


def test_a_class_that_the_pattern_does_not_meet():
    made = editable("mxfp4")
    for parent in ("nn.Modul", "nn.Embedding", torch.nn.Conv2d):
        with pytest.raises(ConfigError, match="selects no quantizer of modules of the class nn") as caught:
            edit.set_quantizer_attributes_partial(made, "*up_proj.weight_quantizer", {"enable": True}, parent)
        assert caught.value.hint == "use parent_class='nn.Linear', or leave it out"


def test_a_function_selects():
    made = editable("mxfp4")
    edit.disable_quantizer(made, lambda name: ".1." in name or name.endswith("input_quantizer"))
    assert {slot.split(".")[2] for slot, value in specs(made).items() if value is not None} == {"0", "2"}
    assert all(target.input is None for target in made.quantized())
    assert executed(made).targets == made.targets


def test_what_a_function_selects_becomes_few_rows():
    made = editable("mxfp4", MIXTRAL)
    before = len(made.entries)
    edit.disable_quantizer(made, lambda name: ".w2." in name or ".0.w1." in name or ".1.self_attn.q" in name)
    moe = r"re:model\.layers\.[0-9]+\.block_sparse_moe\.experts\.[0-9]+\.w2\."
    rows = [entry.quantizer_path for entry in made.entries[before:]]
    assert [row for row in rows if row.startswith("re:")] == [
        f"{moe}{kind}_quantizer" for kind in ("weight", "input", "output", "bias")
    ]
    assert len(rows) == 4 + 2 * 4 + 5  # w2; w1 of expert 0 in two blocks; q_proj's slots and the one of queries
    kept = {target.name for target in made.targets.values() if target.weight is None}
    assert {name for name in kept if ".experts." in name} == {
        name for name in made.targets if name.endswith((".w2", ".0.w1"))
    }
    assert executed(made).targets == made.targets


def test_experts_by_every_spelling():
    made = editable("nvfp4", MIXTRAL)
    for pattern in ("*.block_sparse_moe.experts.1.w1.weight_quantizer", "*mlp.experts.down_proj.weight_quantizer"):
        edit.set_quantizer_attributes_full(made, pattern, FP8)
    by_leaf = {".".join(target.name.split(".")[-2:]): target.weight.element for target in made.quantized()}
    assert by_leaf["1.w1"] == "fp8_e4m3"
    assert by_leaf["0.w1"] == "fp4_e2m1"
    assert {name: element for name, element in by_leaf.items() if name.endswith("w2")} == dict.fromkeys(
        ["0.w2", "1.w2", "2.w2", "3.w2"], "fp8_e4m3"
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda made: edit.disable_quantizer(made, "*dwn_proj.weight_quantizer"),
        lambda made: edit.enable_quantizer(made, "*dwn_proj.weight_quantizer"),
        lambda made: edit.set_quantizer_attributes_full(made, "*dwn_proj.weight_quantizer", INT8),
        lambda made: edit.set_quantizer_attributes_partial(made, "*dwn_proj.weight_quantizer", INT8),
    ],
)
def test_a_pattern_that_matches_nothing(call: Any):
    made = editable("mxfp4")
    with pytest.raises(ConfigError) as caught:
        call(made)
    assert "down_proj" in caught.value.hint
    assert "*dwn_proj" in str(caught.value)
    assert made == plan("mxfp4")


def test_entries_need_not_match_unless_they_say_so():
    made = editable("mxfp4")
    edit.set_quantizer_by_cfg(made, [rule("*block_sparse_moe.gate*", enable=False)])  # one of ModelOpt's exclusions
    assert specs(made) == specs(plan("mxfp4"))
    with pytest.raises(ConfigError, match="matches none of"):
        edit.set_quantizer_by_cfg(made, [rule("*dwn_proj*", enable=False, required=True)])
    with pytest.raises(ConfigError, match="the pattern selects no quantizer"):
        edit.disable_quantizer(made, lambda name: False)


# --- changes in part --------------------------------------------------------------------------------------------------


def test_partial_keeps_the_rest():
    made = of(rule(WEIGHTS, INT4))
    edit.set_quantizer_attributes_partial(made, "*up_proj*", {"num_bits": 8})
    assert (spec(made).element, spec(made).granularity) == ("int8", PerGroup(32))
    assert decided(made, DOWN) == "int4"
    assert specs(made)[UP.replace("weight", "input")] is None  # never had attributes


def test_partial_of_blocks_as_modelopt_writes_them():
    """Their keys are numbers and texts, which do not sort."""
    made = editable("mxfp4")
    edit.set_quantizer_attributes_full(made, WEIGHTS, {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}})
    edit.set_quantizer_attributes_partial(made, WEIGHTS, {"num_bits": 8})
    assert (spec(made).element, spec(made).granularity) == ("int8", PerGroup(64))


def test_partial_leaves_on_and_off_alone():
    made = of(rule(WEIGHTS, INT4), rule("*up_proj*", enable=False))
    edit.set_quantizer_attributes_partial(made, WEIGHTS, {"num_bits": 8})
    assert (spec(made), decided(made, DOWN)) == (None, "int8")
    edit.enable_quantizer(made, "*up_proj*")
    assert spec(made) == spec(made, DOWN)
    edit.set_quantizer_attributes_partial(made, "*up_proj*", {"num_bits": 4, "enable": False})
    assert spec(made) is None


def test_axis_and_blocks_take_each_other_out():
    made = of(rule(WEIGHTS, INT4))
    edit.set_quantizer_attributes_partial(made, WEIGHTS, {"axis": 0})
    assert spec(made).granularity == PerChannel(0)
    edit.set_quantizer_attributes_partial(made, WEIGHTS, {"block_sizes": {-1: 64}})
    assert spec(made).granularity == PerGroup(64)


def test_partial_of_a_chain():
    made = of(rule("*proj.weight_quantizer", [INT4, FP8]))
    edit.set_quantizer_attributes_partial(made, WEIGHTS, [{"block_sizes": {-1: 64}}, {}])
    assert [(s.element, s.granularity) for s in spec(made).stages] == [
        ("int4", PerGroup(64)),
        ("fp8_e4m3", PerTensor()),
    ]
    before = spec(made)
    edit.set_quantizer_attributes_partial(made, WEIGHTS, {"fake_quant": False})  # into every stage
    assert spec(made) == before
    assert all(stage["fake_quant"] is False for stage in dict(made.slots())[UP].cfg)


@pytest.mark.parametrize(
    ("cfg", "change", "message"),
    [
        (INT4, [{"num_bits": 8}], "for a cfg without a chain"),
        ([INT4, FP8], [{"num_bits": 8}], "for a chain of 2"),
        (INT4, {"num_bitz": 8}, "num_bitz"),
        (INT4, {"element": "int8", "num_bits": 8}, "words of different tools"),
        (INT4, {"dtype": "int8"}, "dtype cannot be changed alone"),
        ({"element": "fp16"}, {"num_bits": 8}, "ModelOpt has no word for fp16"),
        (INT4, {}, "no attribute is given"),
        (INT4, "int8", "attributes must be a mapping"),
        (INT4, {"enable": "no"}, "enable must be true or false"),
        ({"element": "int4", "granularity": {"group": 32}}, {"then": {"element": "fp8_e4m3"}}, "make a chain"),
    ],
)
def test_partial_never_changes_the_structure(cfg: Any, change: Any, message: str):
    made = of(rule("*proj.weight_quantizer", cfg))
    before = dict(vars(made))
    with pytest.raises(ConfigError, match=message):
        edit.set_quantizer_attributes_partial(made, "*proj.weight_quantizer", change)
    assert vars(made) == before


def test_partial_of_a_scheme_in_its_own_words():
    made = editable("int4_wo_128")
    edit.set_quantizer_attributes_partial(made, "*down_proj.weight_quantizer", {"granularity": {"group": 64}})
    assert spec(made, DOWN).granularity == PerGroup(64)
    assert spec(made).granularity == PerGroup(128)
    assert spec(made, DOWN).scale == spec(made).scale


MODELOPT_CHANGES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    # of a scheme in our words: change in ModelOpt's -> what becomes of which spec; all else is as it was
    "groups": ("int4_wo_128", {"block_sizes": {-1: 64}}, "weight", {"granularity": PerGroup(64)}),
    "text for an axis": ("int4_wo_128", {"block_sizes": {"-1": 32}}, "weight", {"granularity": PerGroup(32)}),
    "channels": ("int4_wo_128", {"axis": 0}, "weight", {"granularity": PerChannel(0)}),
    "bits": ("int4_wo_128", {"num_bits": 8}, "weight", {"element": "int8", "scale.dtype": "f32"}),
    "another kind": ("int4_wo_128", {"num_bits": [4, 3]}, "weight",
                     {"element": "fp8_e4m3", "scale.dtype": "f32", "scale.rule": "absmax"}),
    "zero points go": ("uint4_wo_128", {"num_bits": "e4m3"}, "weight",
                       {"element": "fp8_e4m3", "scale.dtype": "f32", "scale.rule": "absmax", "zero_point": "none"}),
    "zero points stay": ("uint4_wo_128", {"block_sizes": {-1: 64}}, "weight", {"granularity": PerGroup(64)}),
    "elements under e8m0": ("mxfp4", {"num_bits": [4, 3]}, "weight", {"element": "fp8_e4m3"}),
    "a constant": ("fp8", {"constant_amax": 7.5}, "input", {"scale.constant_amax": 7.5}),
    "a constant over blocks": ("nvfp4", {"constant_amax": 7.5}, "input", {"scale.global_scale.constant_amax": 7.5}),
    "an observer": ("fp8", {"calibrator": "histogram"}, "input", {"observer.name": "histogram"}),
    "no effect": ("nvfp4", {"fake_quant": True}, "weight", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELOPT_CHANGES)
def test_partial_of_a_scheme_in_modelopt_words(case: str):
    scheme, change, kind, expected = MODELOPT_CHANGES[case]
    made = editable(scheme)
    slot = UP.replace("weight_quantizer", f"{kind}_quantizer")
    before = spec(made, slot)
    others = specs(made)
    edit.set_quantizer_attributes_partial(made, slot, change)
    after = specs(made)
    assert leaves(after.pop(slot)) == leaves(before) | expected
    del others[slot]
    assert after == others
    assert specs(executed(made)) == specs(made)


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The fields of a spec by their paths."""
    if not isinstance(value, TensorSpec | ScaleSpec | ObserverSpec):
        return {name: value}
    inner = ((f"{name}.{f.name}".lstrip("."), getattr(value, f.name)) for f in fields(value))
    found = {key: leaf for path, item in inner for key, leaf in leaves(item, path).items()}
    return {key: leaf for key, leaf in found.items() if not key.endswith("observer.parameters")}


def test_every_scheme_in_modelopt_words_reads_back():
    """What ModelOpt's words mean of any scheme, put into it again, changes nothing."""
    for name in catalog.names("schemes"):
        made = editable(name)
        before = specs(made)
        for slot, decision in list(made.slots()):
            if decision.spec is not None and slot.startswith("model.layers.0.mlp.up_proj"):
                with suppress(ConfigError):  # formats that ModelOpt does not have
                    edit.set_quantizer_attributes_partial(made, slot, {"fake_quant": True})
        assert specs(made) == before, name


def test_partial_of_a_nested_chain():
    chain = {"element": "fp8_e4m3", "then": {"element": "int4", "granularity": {"group": 32}}, "stored": "last"}
    made = of(rule(WEIGHTS, chain))
    edit.set_quantizer_attributes_partial(made, UP, [{}, {"block_sizes": {-1: 64}}])
    assert [stage.granularity for stage in spec(made).stages] == [PerTensor(), PerGroup(64)]
    assert spec(made).stored == "last"
    edit.set_quantizer_attributes_partial(made, UP, {"granularity": {"channel": 0}})  # every stage
    assert [stage.granularity for stage in spec(made).stages] == [PerChannel(0), PerChannel(0)]
    with pytest.raises(ConfigError, match="then cannot be changed alone"):
        edit.set_quantizer_attributes_partial(made, UP, {"then": {"element": "int8"}})


def test_partial_in_our_words_of_modelopt_attributes():
    made = of(rule(WEIGHTS, INT4), rule("*down_proj.weight_quantizer", [INT4, FP8]))
    edit.set_quantizer_attributes_partial(made, WEIGHTS, {"granularity": {"group": 64}})
    assert (spec(made).element, spec(made).granularity) == ("int4", PerGroup(64))
    assert [(s.element, s.granularity) for s in spec(made, DOWN).stages] == [
        ("int4", PerGroup(64)),
        ("fp8_e4m3", PerGroup(64)),
    ]


def test_the_old_name_of_partial():
    made = of(rule(WEIGHTS, INT4))
    with pytest.warns(DeprecationWarning, match="set_quantizer_attributes_partial"):
        edit.set_quantizer_attribute(made, WEIGHTS, {"num_bits": 8})
    assert (spec(made).element, spec(made).granularity) == ("int8", PerGroup(32))


# --- for a while ------------------------------------------------------------------------------------------------------


def test_a_context_restores():
    made = of(rule(WEIGHTS, INT4))
    before = dict(vars(made))
    with edit.set_quantizer_by_cfg_context(made, [DENY, rule(INPUTS, FP8), rule(WEIGHTS, [INT4, FP8])]) as inside:
        assert inside is made
        assert len(spec(made).stages) == 2
        edit.disable_quantizer(made, "*up_proj*")
        with edit.set_quantizer_by_cfg_context(made, [rule(WEIGHTS, FP8)]):
            assert decided(made, UP) == "fp8_e4m3"
        assert (spec(made), len(spec(made, DOWN).stages)) == (None, 2)
    assert vars(made) == before


@pytest.mark.parametrize("cfg", [[rule(WEIGHTS, INT8)], [rule(WEIGHTS, {"num_bitz": 8})]])
def test_a_context_restores_after_an_exception(cfg: Any):
    made = of(rule(WEIGHTS, INT4))
    before = dict(vars(made))
    with pytest.raises((ZeroDivisionError, ConfigError)), edit.set_quantizer_by_cfg_context(made, cfg):
        assert decided(made, UP) == "int8"
        raise ZeroDivisionError
    assert vars(made) == before


# --- what is refused, and when ----------------------------------------------------------------------------------------


def test_every_step_of_an_edit_may_be_empty_but_not_the_end():
    made = editable("mxfp4")
    edit.set_quantizer_by_cfg(made, [DENY])
    with pytest.raises(ConfigError, match="quantizes nothing"):
        executed(made)
    edit.enable_quantizer(made, "*up_proj.weight_quantizer")
    assert {target.name.rsplit(".", 1)[-1] for target in executed(made).quantized()} == {"up_proj"}


def test_an_edit_may_overrule_what_was_asked_for():
    """The guard against flags without effect is for accidents."""
    flags = {"layers": ["*up_proj=fp8"]}
    with pytest.raises(ConfigError, match="switches quantizers on, but all of them end switched off"):
        plan("mxfp4", **flags, exclude=["*up_proj"])
    made = editable("mxfp4", **flags)
    edit.disable_quantizer(made, "*up_proj*")
    assert spec(executed(made)) is None


def test_enabling_needs_attributes():
    made = editable("mxfp4")
    with pytest.raises(ConfigError, match="none of the selected quantizers has attributes") as caught:
        edit.enable_quantizer(made, "*k_bmm_quantizer")
    assert caught.value.where == "enable_quantizer('*k_bmm_quantizer')"
    assert caught.value.hint == "use set_quantizer_attributes_full"
    edit.set_quantizer_attributes_full(made, "*[kv]_bmm_quantizer", FP8)
    assert decided(made, "model.layers.0.self_attn.k_bmm_quantizer") == "fp8_e4m3"


@pytest.mark.parametrize(
    ("attributes", "error"),
    [
        ({"num_bitz": 8}, "num_bitz"),
        ({"num_bits": 4, "block_sizes": {-1: 24}}, "not a multiple"),
        ({}, "cfg is empty"),
        ("int8", "must be a mapping"),
        ({"num_bits": 8, "rotate": True}, "rotate"),
    ],
)
def test_wrong_attributes_leave_the_plan_as_it_was(attributes: Any, error: str):
    made = editable("mxfp4")
    before = dict(vars(made))
    with pytest.raises((ConfigError, ModelError), match=error):
        edit.set_quantizer_attributes_full(made, WEIGHTS, attributes)
    assert vars(made) == before


def test_full_with_enable_false():
    made = editable("mxfp4")
    edit.set_quantizer_attributes_full(made, "*up_proj.weight_quantizer", INT8 | {"enable": False})
    assert spec(made) is None
    edit.enable_quantizer(made, "*up_proj.weight_quantizer")
    assert spec(made).element == "int8"


def test_a_plan_without_a_basis():
    with pytest.raises(UsageError, match="cannot be edited"):
        edit.disable_quantizer(plan("mxfp4"), "*up_proj*")


def test_legacy_shapes_warn():
    made = editable("mxfp4")
    with pytest.warns(DeprecationWarning, match="legacy form"):
        edit.set_quantizer_by_cfg(made, {"default": {"enable": False}, "*up_proj.weight_quantizer": INT8})
    assert {target.weight.element for target in made.quantized()} == {"int8"}


def test_edits_have_an_origin():
    made = editable("mxfp4")
    edit.set_quantizer_by_cfg(made, [rule("*up_proj*", enable=False), rule(WEIGHTS, INT8, required=True)])
    edit.disable_quantizer(made, "*up_proj*")
    assert [str(entry.origin) for entry in made.entries[-3:]] == [
        "set_quantizer_by_cfg quant_cfg[0]", "set_quantizer_by_cfg quant_cfg[1]", "disable_quantizer('*up_proj*')",
    ]  # fmt: skip
    assert made.kept[f"{UP.removesuffix('_quantizer')}"] == "disable_quantizer('*up_proj*')"
