"""AMD Quark's QConfig -> ordered entries, in its own precedence; its algorithms -> steps of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quarkcli.errors import ConfigError
from quarkcli.recipe import load
from quarkcli.recipe.attributes import to_spec
from quarkcli.recipe.match import matches
from quarkcli.recipe.normalize import Canonical, normalize
from quarkcli.recipe.quark_config import read

SCHEMES = json.loads((Path(__file__).parent.parent / "data" / "quark_schemes.json").read_text())
FP8: dict[str, Any] = SCHEMES["fp8"]
SPEC: dict[str, Any] = FP8["weight"]
GLOBAL = {"global_quant_config": FP8}


def outputs(layer: dict[str, Any]) -> dict[str, Any]:
    return {**layer, "output_tensors": SPEC}


def decided(entries: list[Canonical], slot: str, parent: str = "nn.Linear") -> Any:
    """The cfg that a slot ends with: the last entry that matches decides, and one without cfg only switches."""
    cfg, on = None, False
    for entry in entries:
        if matches(entry.quantizer_path, [slot]) and entry.parent_class in (None, parent):
            cfg, on = (entry.cfg if entry.cfg is not None else cfg), entry.enable
    return cfg if on else None


def dtype(entries: list[Canonical], slot: str, parent: str = "nn.Linear") -> Any:
    cfg = decided(entries, slot, parent)
    return cfg and cfg["dtype"]


def refused(data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(data)
    return caught.value.what


def test_precedence() -> None:
    """Global, then layer type, then layers, of which the first that matches wins whole, then exclude."""
    found = read({
        "global_quant_config": FP8,
        "layer_type_quant_config": {"Linear": SCHEMES["int8"]},
        "layer_quant_config": {"*down_proj": SCHEMES["mxfp4"], "*mlp*": SCHEMES["int4_wo_128"]},
        "exclude": ["lm_head", "*.0.mlp.up_proj"],
    }).entries  # fmt: skip
    assert found[0].as_dict() == {"quantizer_path": "*", "cfg": None, "enable": False}
    q, up, down = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj")
    assert [dtype(found, f"{name}.weight_quantizer") for name in (q, up, down)] == ["int8", "int4", "fp4"]
    assert [dtype(found, f"{name}.input_quantizer") for name in (q, up, down)] == ["int8", None, "fp4"]
    assert dtype(found, "model.layers.0.mlp.up_proj.weight_quantizer") is None
    assert dtype(found, "lm_head.weight_quantizer") is None
    assert dtype(found, "lm_head2.weight_quantizer") == "int8"  # a whole name
    assert dtype(found, "model.embed_tokens.weight_quantizer", "nn.Embedding") is None  # linears only


def test_a_layer_replaces_all_slots() -> None:
    found = read({"global_quant_config": outputs(FP8), "layer_quant_config": {"a.b": {"weight": SPEC}}}).entries
    assert dtype(found, "a.c.output_quantizer") == "fp8_e4m3"
    assert [dtype(found, f"a.b.{kind}_quantizer") for kind in ("weight", "input", "output", "bias")] == [
        "fp8_e4m3", None, None, None,
    ]  # fmt: skip


def test_cache_and_attention_stand_apart() -> None:
    """As LLMTemplate writes kv_cache_scheme and attention_scheme fp8."""
    kv = {"*k_proj": outputs(FP8), "*v_proj": outputs(FP8)}
    found = read({
        **GLOBAL, "layer_quant_config": {**kv, "*q_proj": outputs(FP8)}, "kv_cache_quant_config": kv,
        "softmax_quant_spec": SPEC, "exclude": ["*self_attn*"], "kv_cache_post_rope": False,
    })  # fmt: skip
    paths = ["*.k_bmm_quantizer", "*.v_bmm_quantizer", "*.q_bmm_quantizer", "*.p_bmm_quantizer"]
    assert sorted(entry.quantizer_path for entry in found.kv) == sorted(paths)
    assert all(entry.cfg == SPEC and entry.enable for entry in found.kv)
    everything = found.entries + found.kv
    assert dtype(everything, "model.layers.0.self_attn.k_bmm_quantizer", "nn.Module") == "fp8_e4m3"
    # Excluded, and the output is that of the cache alone.
    assert dtype(everything, "model.layers.0.self_attn.k_proj.weight_quantizer") is None
    assert dtype(everything, "model.layers.0.self_attn.k_proj.output_quantizer") is None


@pytest.mark.parametrize(
    ("pattern", "slots"),
    [
        ("*k_proj", ["*.k_bmm_quantizer"]),
        ("*self_attn.v_proj", ["*self_attn.v_bmm_quantizer"]),
        ("model.layers.*.attn.k_proj", ["model.layers.*.attn.k_bmm_quantizer"]),
        ("*query_key_value", ["*.k_bmm_quantizer", "*.v_bmm_quantizer"]),
        ("*kv_b_proj", ["*.k_bmm_quantizer", "*.v_bmm_quantizer"]),
    ],
)
@pytest.mark.parametrize("where", ["top", "export"])
def test_a_kv_group(pattern: str, slots: list[str], where: str) -> None:
    group = {"kv_cache_group": [pattern], "min_kv_scale": 0.5}
    data = {**GLOBAL, "layer_quant_config": {pattern: outputs(FP8)}}
    found = read(data | (group if where == "top" else {"export": group}))
    assert [entry.quantizer_path for entry in found.kv] == slots
    for entry in found.kv:
        spec = to_spec(entry.cfg or {}, weight=False)
        assert spec.scale is not None and spec.scale.minimum == 0.5
    assert decided(found.entries, "model.layers.0.attn.k_proj.output_quantizer") is None


def test_an_output_of_a_full_name_is_the_projections_own() -> None:
    name = "model.layers.0.self_attn.k_proj"
    found = read({**GLOBAL, "layer_quant_config": {name: outputs(FP8)}})
    assert dtype(found.entries, f"{name}.output_quantizer") == "fp8_e4m3" and found.kv == []


def test_the_form_of_the_old_documentation() -> None:
    """Globs with outputs on k and v, and no group: they were exported as scales of the cache."""
    found = read({**GLOBAL, "layer_quant_config": {"*v_proj": outputs(FP8), "*k_proj": outputs(FP8)}})
    assert [entry.quantizer_path for entry in found.kv] == ["*.v_bmm_quantizer", "*.k_bmm_quantizer"]
    assert (
        all(
            "output_tensors of a pattern for k or v projections quantize the KV cache" in text
            for _, text in found.notes
        )
        and len(found.notes) == 2
    )


def test_wrappers_and_old_names() -> None:
    plain = read(GLOBAL).entries
    spec = {"QuantizationSpec": {**SPEC, "dtype": "Dtype.fp8_e4m3"}}
    old = {"Config": {"global_quant_config": {"QuantizationConfig": {"weight": spec, "input_tensors": [spec]}}}}
    found = read(old).entries
    assert [entry.quantizer_path for entry in found] == [entry.quantizer_path for entry in plain]
    assert [to_spec(e.cfg, weight=True) for e in found if e.cfg] == [
        to_spec(e.cfg, weight=True) for e in plain if e.cfg
    ]
    assert found[1].place == (
        "Config", "global_quant_config", "QuantizationConfig", "weight",
    )  # fmt: skip
    new = {"QConfig": {"global_quant_config": {"QLayerConfig": {"weight": {"QTensorConfig": SPEC}}}}}
    assert read(new).entries[1].cfg == SPEC


def test_classes() -> None:
    for name in ("Linear", "nn.Linear", "torch.nn.Linear", "<class 'torch.nn.modules.linear.Linear'>"):
        assert {e.parent_class for e in read({"layer_type_quant_config": {name: FP8}}).entries[1:]} == {"nn.Linear"}
    found = read({"layer_type_quant_config": {"Conv2d": FP8}})
    assert found.entries[1].parent_class == "nn.Conv2d" and found.notes[0][1].endswith(" of class Conv2d")


@pytest.mark.parametrize(
    ("name", "shown"),
    [("LlamaAttention", "LlamaAttention"), ("<class 'models.llama.LlamaMLP'>", "models.llama.LlamaMLP")],
)
def test_a_class_that_is_not_of_torch_is_noted_as_the_file_has_it(name: str, shown: str) -> None:
    ((_, note),) = read({"layer_type_quant_config": {name: FP8}}).notes
    assert note == f"quark does not quantize anything in modules of class {shown}"


def test_what_has_no_meaning_here_is_noted() -> None:
    data = {
        **GLOBAL, "quant_mode": "fx_graph_mode", "quant_flow": "per_block", "gpu_resident_blocks": 2, "version": "0.13",
        "quant_method": "quark", "export": {"pack_method": "order", "weight_format": "real_quantized"},
        "shared_scale_groups": [["q_proj", "k_proj"]],
    }  # fmt: skip
    keys = [path[-1] for path, _ in read(data).notes]
    assert keys == ["quant_mode", "shared_scale_groups", "quant_flow", "gpu_resident_blocks", "pack_method"]
    quiet = {**GLOBAL, "quant_mode": "QuantizationMode.eager_mode", "quant_flow": "standard", "algo_config": None,
             "export": {"pack_method": "reorder", "kv_cache_group": [], "weight_merge_groups": None}}  # fmt: skip
    assert read(quiet).notes == []


@pytest.mark.parametrize(
    ("groups", "slots"),
    [
        (None, None),
        ([], []),
        ([["q_proj", "k_proj"]], [["*q_proj.weight_quantizer", "*k_proj.weight_quantizer"]]),
        ([["*o_proj", "*down_proj"]], [["*o_proj.weight_quantizer", "*down_proj.weight_quantizer"]]),
    ],
)
def test_groups_are_taken_as_asked_for(groups, slots) -> None:
    found = read({**GLOBAL, "shared_scale_groups": groups}).share
    assert (found if found is None else [patterns for patterns, _ in found]) == slots


@pytest.mark.parametrize(("said", "read_as"), [(False, "own"), (True, "shared"), (None, "shared")])
def test_whether_experts_share_an_input_scale(said: bool | None, read_as: str) -> None:
    found = read({**GLOBAL, "sync_moe_expert_input_amax": said})
    assert found.expert_inputs == read_as and not found.differs


def test_embeddings_are_quantized_without_a_note() -> None:
    found = read({"layer_type_quant_config": {"Embedding": FP8}})
    assert found.entries[1].parent_class == "nn.Embedding" and not found.notes


def test_the_entries_are_canonical() -> None:
    kv = {"*k_proj": outputs(FP8)}
    found = read({**GLOBAL, "layer_quant_config": kv, "kv_cache_quant_config": kv, "exclude": ["lm_head"]})
    for entries in (found.entries, found.kv):
        again = normalize([entry.as_dict() for entry in entries])
        assert [entry.as_dict() for entry in again.entries] == [entry.as_dict() for entry in entries]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "a Quark config must be a mapping with 'global_quant_config'"),
        ({}, "'global_quant_config' is missing"),
        ({**GLOBAL, "excludes": []}, "unknown key 'excludes' (did you mean 'exclude'?)"),
        ({**GLOBAL, "exclude": "lm_head"}, "exclude must be a list of patterns"),
        ({**GLOBAL, "exclude": [5]}, "exclude must be a list of patterns"),
        ({**GLOBAL, "layer_quant_config": []}, "layer_quant_config must be a mapping"),
        ({**GLOBAL, "layer_quant_config": {"*": 5}}, "a layer's config must be a mapping with"),
        ({"global_quant_config": {"weights": SPEC}}, "unknown key 'weights' (did you mean 'weight'?)"),
        ({"global_quant_config": {"weight": 4}}, "cfg must be a mapping or a list of mappings"),
        ({"global_quant_config": {"weight": {**SPEC, "dtype": "fp9"}}}, "dtype 'fp9' is not supported (did you mean"),
        ({"global_quant_config": {"input_tensors": {**SPEC, "observer_cls": "LSQObserver"}}}, "'LSQObserver' is not"),
        ({**GLOBAL, "softmax_quant_spec": {"dtype": "int8"}}, "'is_dynamic' is missing"),
        ({**GLOBAL, "kv_cache_group": ["*k_proj"]}, "'*k_proj' of kv_cache_group has no entry"),
        ({**GLOBAL, "min_kv_scale": -1}, "min_kv_scale must be a number from 0 on"),
        ({**GLOBAL, "min_kv_scale": "1"}, "min_kv_scale must be a number"),
        ({**GLOBAL, "shared_scale_groups": ["q_proj"]}, "must be a list of lists of names, not ['q_proj']"),
        ({**GLOBAL, "quant_mode": "eager"}, "quant_mode 'eager' is unknown"),
        ({**GLOBAL, "export": []}, ""),
        ({**GLOBAL, "export": {"pack": 1}}, "unknown key 'pack'"),
        ({**GLOBAL, "algo_config": {"name": "svdquant"}}, "'svdquant' is not supported"),
    ],
)  # fmt: skip
def test_refusals(data: Any, message: str) -> None:
    if not message:  # an empty list says nothing
        assert read(data).entries
        return
    assert message in refused(data)


def test_problems_have_places() -> None:
    text = "global_quant_config:\n  weight: {dtype: fp9}\n  input: null\nexclude: lm_head\n"
    document = load.parse(text, "q.yaml")
    with pytest.raises(ConfigError) as caught:
        read(document.data, lambda path: str(document.origin(*path)))
    head, *lines = caught.value.what.splitlines()
    assert head == "3 problems"
    assert [line.split()[0] for line in lines] == ["q.yaml:3:3:", "q.yaml:2:3:", "q.yaml:4:1:"]


_KEYS = st.sampled_from([
    "global_quant_config", "layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config", "kv_cache_group",
    "softmax_quant_spec", "exclude", "algo_config", "export", "quant_mode", "min_kv_scale", "*k_proj", "weight",
    "output_tensors", "dtype", "qscheme", "shared_scale_groups", "name", "scaling_layers", "Config", "is_dynamic",
])  # fmt: skip
_LEAVES = (
    st.none() | st.booleans() | st.integers(-1, 9) | st.sampled_from(["fp8_e4m3", "mx", "per_tensor", "gptq", "x"])
)
_ANY = st.recursive(
    _LEAVES | st.sampled_from([SPEC, FP8, outputs(FP8)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=15,
)


@given(st.dictionaries(_KEYS, _ANY, max_size=5) | _ANY)
def test_anything_is_read_or_refused(data: Any) -> None:
    try:
        found = read(data)
    except ConfigError:
        return
    for entry in found.entries + found.kv:
        if entry.cfg is not None:
            weight = "weight" in entry.quantizer_path or "bias" in entry.quantizer_path
            assert to_spec(entry.cfg, weight=weight).bits_per_value(64, 64) > 0
