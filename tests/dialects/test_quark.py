"""The quark dialect against what amd-quark 0.13 printed and exported (values copied from its output)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from quarkcli import dialects, servers
from quarkcli.errors import ConfigError, ModelError
from quarkcli.plan.model import Decision, Plan
from quarkcli.spec import PerGroup, PerTensor, PerTile, PerToken, ScaleSpec, TensorSpec

from .plans import (
    FP8,
    FP8_TOKEN,
    INT8_TENSOR,
    NVFP4_INPUT,
    PAIRS,
    Module,
    Pair,
    attention,
    int4,
    linears,
    llama,
    moe,
    plan,
)  # fmt: skip
from .test_quark_roundtrip import SCHEMES, awkward, slotted, written
from .test_roundtrip import Header, headers

QUARK = dialects.writer("quark")

# json of amd-quark 0.13's LLMTemplate("llama").get_config(scheme) for each scheme; `scale_type` float means the
# model's dtype there, where we store float32 scales for everything but int4.
FP8_SPEC = {
    "dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": "per_tensor", "ch_axis": None, "group_size": None,
    "block_size": None, "symmetric": True, "round_method": "half_even", "scale_type": "float32",
    "zero_point_type": "int32", "scale_format": None, "scale_calculation_mode": None, "mx_element_dtype": None,
    "observer_cls": "PerTensorMinMaxObserver", "is_scale_quant": False, "enable_buffer_reuse": False,
    "max_input_numel": 4194304,
}  # fmt: skip
CHANNEL = {"qscheme": "per_channel", "ch_axis": 0, "observer_cls": "PerChannelMinMaxObserver"}
TOKEN = {**CHANNEL, "ch_axis": 1, "is_dynamic": True}
INT4_SPEC = {
    **FP8_SPEC, "dtype": "int4", "qscheme": "per_group", "ch_axis": -1, "group_size": 32, "scale_type": "float",
    "observer_cls": "PerGroupMinMaxObserver",
}  # fmt: skip
FP4_SPEC = {
    **FP8_SPEC, "dtype": "fp4", "qscheme": "per_group", "ch_axis": -1, "symmetric": None,
    "observer_cls": "PerBlockMXObserver",
}  # fmt: skip
MX_SPEC = {
    **FP4_SPEC, "group_size": 32, "scale_format": "e8m0", "scale_calculation_mode": "even", "scale_type": "float",
}  # fmt: skip
NV_SPEC = {**FP4_SPEC, "group_size": 16, "scale_format": "float32"}
NV_GLOBAL = {**FP8_SPEC, "is_scale_quant": True}
DYNAMIC = {"is_dynamic": True}
INT8_SPEC = {**FP8_SPEC, "dtype": "int8"}
INT4_ROW = {**INT4_SPEC, **CHANNEL, "group_size": None}
AMD_SPEC = {**FP4_SPEC, "group_size": 16, "scale_type": "float8_e5m3", "scale_format": "e5m3"}
AMD_GLOBAL = {**NV_GLOBAL, "dtype": "fp8_e5m3"}
# Formats of their own leave most to Quark.
OWN_SPEC = {
    **dict.fromkeys(FP8_SPEC), "zero_point_type": "int32", "is_scale_quant": False, "enable_buffer_reuse": False,
    "max_input_numel": 4194304, "ch_axis": -1, "scale_calculation_mode": "even",
}  # fmt: skip
MX6_SPEC = {**OWN_SPEC, "dtype": "mx6", "group_size": 16}
INT8_MX_SPEC = {**OWN_SPEC, "dtype": "mx", "mx_element_dtype": "int8", "group_size": 32}
TILE_SPEC = {
    **FP8_SPEC, "qscheme": "per_block", "block_size": [128, 128], "observer_cls": "PerBlock2DMinMaxObserver",
}  # fmt: skip
GROUP_INPUT = {
    **FP8_SPEC, "qscheme": "per_group", "ch_axis": -1, "group_size": 128, "observer_cls": "PerGroupMinMaxObserver",
}  # fmt: skip
LAYERS: dict[str, tuple[Any, Any]] = {
    "int4_wo_32": (INT4_SPEC, None),
    "int4_wo_per_channel": (INT4_ROW, None),
    "int4_wa_64": ({**INT4_SPEC, "group_size": 64}, {**INT4_SPEC, "group_size": 64, **DYNAMIC}),
    "uint4_wo_128": ({**INT4_SPEC, "dtype": "uint4", "group_size": 128, "symmetric": False}, None),
    "uint4_wo_per_channel": ({**INT4_ROW, "dtype": "uint4", "symmetric": False}, None),
    "fp8": (FP8_SPEC, FP8_SPEC),
    "ptpc_fp8": ({**FP8_SPEC, **CHANNEL}, {**FP8_SPEC, **TOKEN}),
    "fp8_block128": (TILE_SPEC, {**GROUP_INPUT, **DYNAMIC}),
    "int8": (INT8_SPEC, INT8_SPEC),
    "int8_dynamic": ({**INT8_SPEC, **CHANNEL}, {**INT8_SPEC, **TOKEN}),
    "mxfp4": (MX_SPEC, {**MX_SPEC, **DYNAMIC}),
    "mxfp4_weight_only": (MX_SPEC, None),
    "mxfp4_fp8": (MX_SPEC, FP8_SPEC),
    "mxfp4_mxfp6_e2m3": (MX_SPEC, {**MX_SPEC, "dtype": "fp6_e2m3", **DYNAMIC}),
    "mxfp6_e3m2": ({**MX_SPEC, "dtype": "fp6_e3m2"}, {**MX_SPEC, "dtype": "fp6_e3m2", **DYNAMIC}),
    "nvfp4": ([NV_SPEC, NV_GLOBAL], [{**NV_SPEC, **DYNAMIC}, NV_GLOBAL]),
    "amdfp4": (AMD_SPEC, {**AMD_SPEC, **DYNAMIC}),
    "amdfp4_g32": ({**AMD_SPEC, "group_size": 32}, {**AMD_SPEC, "group_size": 32, **DYNAMIC}),
    "amdfp4_global16": ([NV_SPEC, AMD_GLOBAL], [{**NV_SPEC, **DYNAMIC}, AMD_GLOBAL]),
    "int4_fp8": ([FP8_SPEC, {**INT4_ROW, "scale_type": "float32"}], {**FP8_SPEC, **DYNAMIC}),
    "mx6": (MX6_SPEC, MX6_SPEC),
    "mx9": ({**MX6_SPEC, "dtype": "mx9"}, {**MX6_SPEC, "dtype": "mx9"}),
    "bfp16": ({**MX6_SPEC, "dtype": "bfp16", "group_size": 8},) * 2,
    "mxint8": (INT8_MX_SPEC, INT8_MX_SPEC),
}


@pytest.mark.parametrize("scheme", LAYERS)
def test_specs_are_those_of_the_peer(scheme: str) -> None:
    config = json.loads(json.dumps(QUARK.config(plan(llama(), linears(SCHEMES[scheme])))))
    weight, source = LAYERS[scheme]
    assert config["global_quant_config"] == {
        "weight": weight, "input_tensors": source, "output_tensors": None, "bias": None, "target_device": None,
    }  # fmt: skip
    assert config["layer_quant_config"] == config["layer_type_quant_config"] == config["kv_cache_quant_config"] == {}
    assert config["exclude"] == ["lm_head"]
    assert config["export"] == {
        "kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder", "weight_format": "real_quantized",
        "weight_merge_groups": None,
    }  # fmt: skip
    assert (config["quant_method"], config["quant_mode"], config["version"]) == ("quark", "eager_mode", "0.13")


def test_cache_entries() -> None:
    config = QUARK.config(plan(llama(), linears(PAIRS["fp8"]), kv=FP8, tied_head="model.head"))
    entry = {**config["global_quant_config"], "output_tensors": FP8_SPEC}
    assert config["layer_quant_config"] == {"*k_proj": entry, "*v_proj": entry} == config["kv_cache_quant_config"]
    assert config["export"]["kv_cache_group"] == ["*k_proj", "*v_proj"]
    assert config["kv_cache_post_rope"] is True
    assert config["exclude"] == ["lm_head", "model.head"]
    module = attention("model.layers.0.self_attn", FP8)
    names = [info.name for info in QUARK.attention_infos(module)]
    assert names == ["model.layers.0.self_attn.k_proj.output_scale", "model.layers.0.self_attn.v_proj.output_scale"]


def test_the_most_frequent_pair_is_global_and_names_come_before_globs() -> None:
    def choose(module: Module) -> Pair | None:
        if module.role in ("q", "k", "v"):
            return PAIRS["ptpc" if ".1." in module.name else "fp8"]
        return linears(PAIRS["mxfp4"])(module)

    config = QUARK.config(plan(llama(layers=3), choose, kv=FP8))
    assert config["global_quant_config"]["weight"] == MX_SPEC
    keys = list(config["layer_quant_config"])
    assert keys[-2:] == ["*k_proj", "*v_proj"]
    assert {key for key in keys if "k_proj" in key} == {"model.layers.1.self_attn.k_proj", "*k_proj"}
    assert "model.layers.0.self_attn.q_proj" in keys
    # What a server fuses must be equal key for key, outputs aside.
    for index in range(3):
        block = f"model.layers.{index}.self_attn"
        found = [
            config["layer_quant_config"].get(f"{block}.{name}") or config["layer_quant_config"][f"*{name}"]
            for name in ("k_proj", "v_proj")
        ]
        found.append(config["layer_quant_config"][f"{block}.q_proj"])
        assert len({json.dumps({**entry, "output_tensors": None}) for entry in found}) == 1
    outputs = [entry["output_tensors"] for key, entry in config["layer_quant_config"].items() if key[-6:] != "q_proj"]
    assert all(output == FP8_SPEC for output in outputs)


def test_experts_are_named_by_layer() -> None:
    def choose(module: Module) -> Pair | None:
        if module.expert is None:
            return linears(PAIRS["fp8"])(module)
        return {"0": PAIRS["mxfp4"], "1": None}.get(module.name.split(".")[2], PAIRS["fp8"])

    config = QUARK.config(plan(moe(layers=4), choose))
    assert list(config["layer_quant_config"]) == ["model.layers.0.mlp.experts*"]
    assert config["global_quant_config"]["weight"] == FP8_SPEC
    routers = [f"model.layers.{index}.mlp.gate" for index in range(4)]
    assert set(config["exclude"]) == {*routers, "model.layers.1.mlp.experts", "lm_head"}


def with_attention(slots: dict[str, TensorSpec], made: Plan | None = None) -> Plan:
    made = made or plan(llama(), linears(PAIRS["fp8"]))
    for name in made.attention:
        decisions = {kind: Decision(slots.get(kind), 0) for kind in "qkvp"}
        made.attention[name] = replace(attention(name, None), slots=decisions)
    return made


def test_attention_entries_are_those_of_the_peer() -> None:
    made = with_attention(dict.fromkeys("qkvp", FP8))
    config = QUARK.config(made)
    entry = {**config["global_quant_config"], "output_tensors": FP8_SPEC}
    assert config["layer_quant_config"] == {"*q_proj": entry, "*k_proj": entry, "*v_proj": entry}
    assert config["softmax_quant_spec"] == FP8_SPEC
    assert config["export"]["kv_cache_group"] == list(config["kv_cache_quant_config"]) == ["*k_proj", "*v_proj"]
    block = "model.layers.0.self_attn"
    names = {info.name for info in QUARK.attention_infos(made.attention[block])}
    assert names == {
        f"{block}.q_proj.output_scale", f"{block}.k_proj.output_scale", f"{block}.v_proj.output_scale",
        f"{block}.prob_output_scale",
    }  # fmt: skip


def test_a_cache_of_nvfp4_has_scales_of_the_second_stage() -> None:
    made = with_attention(dict.fromkeys("kv", NVFP4_INPUT))
    outputs = QUARK.config(made)["layer_quant_config"]["*v_proj"]["output_tensors"]
    assert outputs == [{**NV_SPEC, **DYNAMIC}, NV_GLOBAL]
    block = "model.layers.1.self_attn"
    assert [info.name for info in QUARK.attention_infos(made.attention[block])] == [
        f"{block}.k_proj.output_scale_2", f"{block}.v_proj.output_scale_2",
    ]  # fmt: skip


GROUPS = TensorSpec("fp8_e4m3", PerGroup(32), ScaleSpec("f32"))
TOKENS_OF_TWO = replace(FP8, then=INT8_TENSOR)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ((int4(48), None), "64 input features are not a multiple of the group of 48 of int4"),
        (
            (FP8, replace(FP8_TOKEN, granularity=PerGroup(48))),
            "64 input features are not a multiple of the group of 48",
        ),
        ((FP8_TOKEN, None), "the scales of a stored weight are fixed"),
        ((FP8, GROUPS), "quark stores one static scale for its input, and fp8_e4m3 group 32"),
        ((FP8, TOKENS_OF_TWO), "quark stores one static scale for its input"),
    ],
)
def test_refusals_name_module_and_spec(pair: Pair, words: str) -> None:
    refusals = QUARK.refusals(plan(llama(), lambda m: pair if m.role == "q" else None))
    assert len(refusals) == 1
    assert refusals[0].startswith("model.layers.0.self_attn.q_proj (and 1 more): ")
    assert words in refusals[0]


@pytest.mark.parametrize(
    ("spec", "shape", "words"),
    [
        (SCHEMES["int4_wo_per_channel"][0], (16, 20), "20 input features are not a multiple of 8"),
        (SCHEMES["int4_wo_per_channel"][0], (20, 16), "20 zero points in a row are not a multiple of 8"),
        (TensorSpec("int3", PerTensor(), ScaleSpec("f32", "half_range")), (8, 20), "into 3 bytes"),
        (TensorSpec("fp6_e2m3", PerTile(8, 8), ScaleSpec("f32")), (8, 18), "18 input features are not a multiple of 4"),
        (TensorSpec("fp4_e2m1", PerTensor(), ScaleSpec("f32")), (8, 7), "2 of them into a byte"),
    ],
)
def test_codes_fill_whole_cells(spec: TensorSpec, shape: tuple[int, int], words: str) -> None:
    (refusal,) = QUARK.refusals(plan([Module("m", shape, "up")], linears((spec, None))))
    assert refusal.startswith("m: ") and words in refusal


def test_attention_refusals() -> None:
    dynamic = TensorSpec("fp8_e4m3", PerToken(), ScaleSpec("f32", "absmax", "dynamic"))
    (refusal,) = QUARK.refusals(with_attention({"k": dynamic}, plan(llama(layers=1), linears(PAIRS["fp8"]))))
    assert refusal.startswith("model.layers.0.self_attn.k_bmm_quantizer: quark needs a stored scale for attention k")
    made = with_attention({"q": FP8})
    last = "model.layers.1.self_attn"
    made.attention[last] = replace(made.attention[last], slots=attention(last, None).slots)
    assert QUARK.refusals(made) == [
        f"{last}: quark describes attention q once for the whole model, and here it differs"
    ]
    both = slotted(with_attention({"v": FP8}), only="v_proj", output=FP8)
    (refusal,) = QUARK.refusals(both)
    assert "quark has one place for the output of v_proj, and attention v needs it" in refusal


def test_int4_needs_output_features_in_eights() -> None:
    made = plan([Module("m.up_proj", (20, 64), "up")], linears((int4(32), None)))
    (refusal,) = QUARK.refusals(made)
    assert refusal.startswith("m.up_proj: 20 output features are not a multiple of 8") and "int4 group 32" in refusal
    assert QUARK.loaders(made) == set()


def joined(leaf: str, latent: bool = False, **slots: TensorSpec) -> Plan:
    """A block in which one linear makes k and v. `slots`: what is quantized of attention, k and v by default."""
    block = "model.layers.0.self_attn"
    modules = [
        Module(f"{block}.{leaf}", (192, 64), "kv_b" if latent else "qkv"),
        Module(f"{block}.o_proj", (64, 64), "o"),
    ]
    made = plan(modules, linears(PAIRS["fp8"]))
    specs = slots or {"k": FP8, "v": FP8}
    decisions = {kind: Decision(specs.get(kind), 0) for kind in "qkvp"}
    name = f"{block}.{leaf}"
    made.attention[block] = replace(attention(block, FP8), k_proj=name, v_proj=name, slots=decisions, latent=latent)
    return made


@pytest.mark.parametrize(("leaf", "latent"), [("qkv_proj", False), ("query_key_value", False), ("kv_b_proj", True)])
def test_one_linear_of_k_and_v_has_one_scale(leaf: str, latent: bool) -> None:
    """Names and keys as amd-quark 0.13 exported them for Phi-3 and DeepSeek-V3 (`kv_cache_scheme="fp8"`)."""
    made = joined(leaf, latent)
    module = made.attention["model.layers.0.self_attn"]
    assert QUARK.refusals(made) == []
    assert QUARK.joined(module) == set("kv" if latent else "qkv")
    config = json.loads(json.dumps(QUARK.config(made)))
    assert (
        config["layer_quant_config"]
        == config["kv_cache_quant_config"]
        == {f"*{leaf}": {**config["global_quant_config"], "output_tensors": FP8_SPEC}}
    )
    assert config["export"]["kv_cache_group"] == [f"*{leaf}"]
    assert config["kv_cache_post_rope"] is False
    (info,) = QUARK.attention_infos(module)
    assert info == (f"{module.name}.{leaf}.output_scale", "F32", ())
    scale = torch.tensor(0.25)
    tensors = QUARK.attention_tensors(module, {"k": scale, "v": scale})
    assert tensors == {info.name: scale}
    view = read(config, written(made)[1] | tensors)
    assert view.targets[f"{module.name}.{leaf}"].output is None
    stored = view.attention[module.name]
    assert stored.specs == {"k": FP8, "v": FP8} and set(stored.scales.values()) == {info.name}
    assert QUARK.reader.decode_attention(stored, tensors) == {"k": scale, "v": scale}


def test_what_one_scale_cannot_say() -> None:
    assert "quark has one scale for all outputs of" in QUARK.refusals(joined("qkv_proj", k=FP8, v=NVFP4_INPUT))[0]
    assert "on a q_proj" in QUARK.refusals(joined("qkv_proj", q=FP8, k=FP8, v=FP8))[0]
    assert QUARK.joined(joined("qkv_proj", q=FP8).attention["model.layers.0.self_attn"]) == frozenset()
    two = joined("qkv_proj")
    two.attention["other"] = replace(attention("other", FP8))
    assert any(
        "quark describes the KV cache once for the whole model, and here it differs" in text
        for text in QUARK.refusals(two)
    )
    assert QUARK.loaders(joined("qkv_proj")) == {"transformers"}
    (reason,) = servers.server("vllm").refusals(servers.planned(joined("qkv_proj"), QUARK))
    assert "it looks for scales of the KV cache on k_proj and v_proj, and here one is on" in reason


def test_a_latent_cache_is_for_who_asks() -> None:
    """No server reads a scale of k and v there, so that `auto` refuses; a dialect without a name for it does, too."""
    made = joined("kv_b_proj", latent=True)
    assert dialects.choose("quark", made) == [QUARK]
    with pytest.raises(ConfigError, match="compressed latent") as caught:
        dialects.choose("auto", made)
    assert "--kv-cache none" in caught.value.hint and "--dialect quark" in caught.value.hint
    assert caught.value.where == "model.layers.0.self_attn.k_bmm_quantizer"
    for writer in dialects.writers():
        assert bool(writer.refusals(made)) == (writer is not QUARK)
        if writer is not QUARK:  # the hint is not to ask `auto`
            with pytest.raises(ConfigError, match="compressed latent"):
                dialects.choose(writer.name, made)


@pytest.mark.parametrize(
    ("keys", "leaves", "kinds"),
    [
        (["*kv_a_proj_with_mqa", "*kv_b_proj"], ["kv_a_proj_with_mqa", "kv_b_proj"],
         {"k": "kv_b_proj", "v": "kv_b_proj"}),
        (["*language_model.*k_proj", "*language_model.*v_proj"], ["k_proj", "v_proj"], {"k": "k_proj", "v": "v_proj"}),
        (["*self_attn.k_proj", "*self_attn.v_proj", "*self_attn.kv_a_proj_with_mqa"], ["k_proj", "v_proj"],
         {"k": "k_proj", "v": "v_proj"}),
    ],
)  # fmt: skip
def test_caches_as_the_peers_templates_name_them(keys: list[str], leaves: list[str], kinds: dict[str, str]) -> None:
    """Of modules that are left out, which only `kv_cache_quant_config` names."""
    layer = {"weight": None, "input_tensors": None, "output_tensors": FP8_SPEC, "bias": None}
    config = {
        "quant_method": "quark", "global_quant_config": {"weight": FP8_SPEC, "input_tensors": FP8_SPEC},
        "layer_quant_config": {}, "kv_cache_quant_config": dict.fromkeys(keys, layer), "exclude": [],
        "export": {"kv_cache_group": keys, "pack_method": "reorder", "weight_format": "real_quantized"},
    }  # fmt: skip
    block = "model.language_model.layers.0.self_attn"
    view = read(config, {f"{block}.{leaf}.output_scale": torch.tensor(0.5) for leaf in leaves})
    assert view.attention[block].scales == {kind: f"{block}.{leaf}.output_scale" for kind, leaf in kinds.items()}


def read(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    return QUARK.reader.view(config, headers(tensors))


def test_a_file_of_the_peer_is_read() -> None:
    """It stores scales in the model's dtype, says nothing of some keys, and has entries by class."""
    spec = {**FP8_SPEC, "scale_type": "float"}
    layer = {"weight": spec, "input_tensors": {**spec, "scale_type": None}, "output_tensors": None, "bias": None}
    config = {"quant_method": "quark", "layer_type_quant_config": {"Linear": layer}, "exclude": [], "export": {}}
    tensors = {
        "m.weight": torch.randn(8, 16).to(torch.float8_e4m3fn),
        "m.weight_scale": torch.tensor(0.5, dtype=torch.bfloat16),
        "m.input_scale": torch.tensor(0.25, dtype=torch.bfloat16),
    }
    stored = read(config, tensors).targets["m"]
    assert stored.weight == stored.input == replace(FP8, scale=ScaleSpec("model"))
    decoded = QUARK.reader.decode(stored, tensors)
    assert (float(decoded.weight.params.scale), float(decoded.input)) == (0.5, 0.25)


def test_an_input_in_the_older_wrapper_is_read() -> None:
    made = plan([Module("m", (8, 64), "up")], linears(SCHEMES["mxfp4"]))
    config, tensors, _, _ = written(made)
    config["global_quant_config"]["input_tensors"] = {**INT8_MX_SPEC, "mx_element_dtype": "fp6_e3m2"}
    assert read(config, tensors).targets["m"].input == SCHEMES["mxfp6_e3m2"][1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dtype": "int5"}, "dtype=int5"),
        ({"qscheme": "per_row"}, "qscheme=per_row"),
        ({"is_dynamic": True}, "weights of dtype=fp8_e4m3"),
        ({"symmetric": False}, "symmetric=False"),
        ({"qscheme": "per_group", "group_size": None}, "this version cannot read weights of"),
        ({"qscheme": "per_block", "block_size": [128]}, "this version cannot read weights of"),
        ({"scale_type": "float7"}, "this version cannot read weights of"),
        ({"dtype": "uint8"}, "dtype=uint8"),
        ({"tensor_spec": {"element": "fp9"}}, "this version cannot read weights of"),
        ({"tensor_spec": 7}, "this version cannot read weights of"),
    ],
)
def test_an_unknown_spec_is_refused_with_its_module(changed: dict[str, Any], words: str) -> None:
    config, tensors, _, _ = written(plan([Module("m", (8, 64), "up")], linears((FP8, None))))
    config["global_quant_config"]["weight"] |= changed
    with pytest.raises(ModelError, match=r"^m: ") as caught:
        read(config, tensors)
    assert words in str(caught.value)


def test_what_is_left_over_or_unpacked_is_refused() -> None:
    config, tensors, _, _ = written(plan(llama(layers=1), linears(PAIRS["fp8"])))
    stray = {**tensors, "model.layers.0.self_attn.k_proj.output_scale": torch.tensor(1.0)}
    with pytest.raises(ModelError, match="no output that this scale belongs to"):
        read(config, stray)
    with pytest.raises(ModelError, match="pack_method 'shuffle'"):
        read({**config, "export": {"pack_method": "shuffle"}}, tensors)
    with pytest.raises(ModelError, match="holds no codes"):
        read({**config, "export": {"weight_format": "fake_quantized"}}, tensors)


def test_a_tensor_of_the_model_is_not_taken_for_the_scale_of_an_output() -> None:
    config, tensors, _, _ = written(plan(llama(layers=1), linears(PAIRS["fp8"])))
    own = {"model.layers.0.altup.correct_output_scale": torch.ones(8)}
    assert set(read(config, tensors | own).targets) == set(read(config, tensors).targets)


def test_a_cast_is_named_and_nothing_else_is_taken_for_one() -> None:
    """Casts have no scale: an unquantized matrix of the same dtype beside them stays an ordinary tensor."""
    cast = TensorSpec("bf16", PerTensor(), None)
    made = plan(llama(layers=1), lambda m: (cast, None) if m.role in ("up", "down") else None)
    config, tensors, _, _ = written(made)
    assert config["global_quant_config"]["weight"] is None
    others = {f"{t.name}.weight": awkward(t.shape) for t in made.targets.values() if t.weight is None}
    assert list(read(config, {**others, **tensors}).targets) == [
        "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj",
    ]  # fmt: skip


def test_missing_scales_are_refused_when_writing() -> None:
    made = slotted(plan([Module("m", (8, 64), "up")], linears((FP8, FP8))), bias=INT8_TENSOR)
    target = made.targets["m"]
    _, _, weights, biases = written(made)
    with pytest.raises(ValueError, match="m has a static input"):
        QUARK.tensors(target, weights["m"], {}, biases["m"])
    with pytest.raises(ValueError, match="m has a quantized bias"):
        QUARK.tensors(target, weights["m"], {"input": torch.tensor(1.0)})


def test_a_matrix_is_asked_for() -> None:
    config, tensors, _, _ = written(plan([Module("m", (8, 64), "up")], linears((FP8, None))))
    with pytest.raises(ModelError, match="is not a matrix"):
        QUARK.reader.view(config, {**headers(tensors), "m.weight": Header("F8_E4M3", (512,))})
