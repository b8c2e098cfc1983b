"""The quark dialect against what amd-quark 0.13 printed and exported (values copied from its output)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from quarkcli import dialects
from quarkcli.numerics.quantize import dequantize

from .plans import (
    FP8,
    FP8_CHANNEL,
    INT8_TENSOR,
    MXFP4,
    PAIRS,
    Module,
    Pair,
    attention,
    int4,
    linears,
    llama,
    moe,
    plan,
    target,
)  # fmt: skip
from .test_roundtrip import written

QUARK = dialects.get("quark")
BOTH = {"vllm", "transformers"}

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
LAYERS = {
    "int4-32": (INT4_SPEC, None),
    "fp8": (FP8_SPEC, FP8_SPEC),
    "ptpc": ({**FP8_SPEC, **CHANNEL}, {**FP8_SPEC, **TOKEN}),
    "int8-static": ({**FP8_SPEC, "dtype": "int8"}, {**FP8_SPEC, "dtype": "int8"}),
    "mxfp4": (MX_SPEC, {**MX_SPEC, **DYNAMIC}),
    "mxfp4-weight-only": (MX_SPEC, None),
    "nvfp4": ([NV_SPEC, NV_GLOBAL], [{**NV_SPEC, **DYNAMIC}, NV_GLOBAL]),
}


@pytest.mark.parametrize("scheme", LAYERS)
def test_specs_are_those_of_the_peer(scheme: str) -> None:
    config = json.loads(json.dumps(QUARK.config(plan(llama(), linears(PAIRS[scheme])))))
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


def nibbles(word: int) -> list[int]:
    return [(word >> (4 * index)) & 15 for index in range(8)]


def test_int4_layout_decoded_by_hand() -> None:
    """Two's complement nibbles, AWQ order 0 2 4 6 1 3 5 7 along the output, everything transposed."""
    item = target(Module("m", (16, 64), "up"), (int4(32), None))
    quantized, _, tensors = written(QUARK, item)
    packed = tensors["m.weight"].numpy().view(np.uint32)
    assert packed.shape == (64, 2)
    decoded = np.zeros((16, 64))
    for column in range(64):
        for word in range(2):
            for slot, code in enumerate(nibbles(int(packed[column, word]))):
                row = 8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[slot]
                decoded[row, column] = code - 16 if code > 7 else code
    scale = tensors["m.weight_scale"].double().numpy()  # [groups, out]
    values = decoded * np.repeat(scale.T, 32, axis=1)
    np.testing.assert_array_equal(values, dequantize(quantized, item.weight).double().numpy())
    assert not tensors["m.weight_zero_point"].any()


def test_zero_points_of_int8_are_stored_as_the_peer_does() -> None:
    item = target(Module("m", (16, 64), "up"), PAIRS["int8-static"])
    _, source, tensors = written(QUARK, item)
    assert {name.removeprefix("m.") for name in tensors} == {
        "weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point",
    }  # fmt: skip
    torch.testing.assert_close(tensors["m.input_scale"], source, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scheme", "loaders"),
    [
        ("fp8", BOTH),
        ("ptpc", BOTH),
        ("int8-static", BOTH),
        ("int8-token", BOTH),
        ("int4-32", BOTH),
        ("mxfp4", BOTH),
        ("mxfp4-weight-only", BOTH),
        ("nvfp4", {"vllm"}),
        ("nvfp4-weight-only", set()),
        ("fp8-weight-only", {"transformers"}),
        ("int8-channel", {"transformers"}),
    ],
)
def test_loaders(scheme: str, loaders: set[str]) -> None:
    assert QUARK.loaders(plan(llama(), linears(PAIRS[scheme]))) == loaders
    assert QUARK.loaders(plan(moe(), linears(PAIRS[scheme]))) == loaders - {"transformers"}


def test_a_quantized_head_does_not_load_in_vllm() -> None:
    made = plan(llama(), lambda m: None if m.role == "embedding" else PAIRS["fp8"])
    assert QUARK.loaders(made) == {"transformers"}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ((int4(48), None), "not a multiple of the group of 48"),
        ((FP8_CHANNEL, INT8_TENSOR), "quark cannot hold weight fp8_e4m3 channel 0"),
        ((MXFP4, INT8_TENSOR), "quark cannot hold weight fp4_e2m1 group 32"),
    ],
)
def test_refusals_name_module_and_spec(pair: Pair, words: str) -> None:
    refusals = QUARK.refusals(plan(llama(), lambda m: pair if m.role == "q" else None))
    assert len(refusals) == 1
    assert refusals[0].startswith("model.layers.0.self_attn.q_proj (and 1 more): ")
    assert words in refusals[0]


def test_int4_needs_output_features_in_eights() -> None:
    made = plan([Module("m.up_proj", (20, 64), "up")], linears((int4(32), None)))
    (refusal,) = QUARK.refusals(made)
    assert refusal.startswith("m.up_proj: 20 output features are not a multiple of 8") and "int4 group 32" in refusal
    assert QUARK.loaders(made) == set()


def test_a_fused_qkv_has_no_place_for_cache_scales() -> None:
    made = plan(llama(layers=1), linears(PAIRS["fp8"]), kv=FP8)
    module = made.attention["model.layers.0.self_attn"]
    fused = type(module)(module.name, 0, f"{module.name}.qkv_proj", f"{module.name}.qkv_proj", module.slots)
    made.attention[module.name] = fused
    assert len(QUARK.refusals(made)) == 2
    assert "qkv_proj" in QUARK.refusals(made)[0]
