"""The `quantization_config` of existing checkpoints as recipes: what made them."""

from __future__ import annotations

from typing import Any

import pytest

from quarkcli.errors import ConfigError
from quarkcli.recipe import recipe
from quarkcli.recipe.attributes import compressed_tensors, native, to_spec
from quarkcli.recipe.checkpoint_config import read
from quarkcli.recipe.match import matches
from quarkcli.recipe.normalize import Canonical, Normalized
from quarkcli.spec import (
    ObserverSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    ScaleSpec,
    TensorSpec,
)

F32 = ScaleSpec("f32", "absmax")
Q = "model.layers.0.self_attn.q_proj"


def found(data: Any) -> Normalized:
    config = read(data)
    assert config is not None
    return config


def spec_of(entries: list[Canonical], slot: str) -> TensorSpec | None:
    """What a slot of a linear ends with."""
    last = None
    for entry in entries:
        if matches(entry.quantizer_path, [slot]) and entry.parent_class in (None, "nn.Linear"):
            last = entry.cfg
    return to_spec(last, weight=".weight_" in slot) if last is not None else None


def specs(config: Normalized, module: str = Q) -> list[str | None]:
    both = (spec_of(config.entries, f"{module}.{kind}_quantizer") for kind in ("weight", "input"))
    return [spec.describe() if spec else None for spec in both]


# --- ModelOpt ---------------------------------------------------------------------------------------------------------

NVFP4 = "fp4_e2m1 group 16, e4m3 over f32"


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ("FP8", ["fp8_e4m3 tensor, f32, absmax"] * 2),
        ("FP8_PER_CHANNEL_PER_TOKEN", ["fp8_e4m3 channel 0, f32, absmax", "fp8_e4m3 token, f32 dynamic, absmax"]),
        ("fp8_pb_wo", ["fp8_e4m3 tile 128x128, f32, absmax", None]),
        ("NVFP4", [f"{NVFP4}, absmax", f"{NVFP4} dynamic, absmax"]),
        ("W4A16_NVFP4", [f"{NVFP4}, absmax", None]),
        ("W4A8_NVFP4_FP8", ["fp4_e2m1 group 32, e4m3 over f32, absmax", "fp8_e4m3 tensor, f32, absmax"]),
        ("W4A16_AWQ", ["int4 group 128, model, absmax", None]),
        ("W4A8_AWQ", ["int4 group 128, model, absmax, then fp8_e4m3 tensor, f32, absmax (first stored)",
                      "fp8_e4m3 tensor, f32, absmax"]),
        ("W8A8_SQ_PER_CHANNEL", ["int8 channel 0, f32, absmax", "int8 tensor, f32, absmax"]),
        ("W8A16", ["int8 channel 0, f32, absmax", None]),
        ("mxfp4", ["fp4_e2m1 group 32, e8m0, rceil", "fp4_e2m1 group 32, e8m0 dynamic, rceil"]),
        ("MXFP8", ["fp8_e4m3 group 32, e8m0, rceil", "fp8_e4m3 group 32, e8m0 dynamic, rceil"]),
        ("W4A8_MXFP4_FP8", ["fp4_e2m1 group 32, e8m0, rceil", "fp8_e4m3 tensor, f32, absmax"]),
    ],
)  # fmt: skip
def test_modelopt_algorithms(algo: str, expected: list[str]) -> None:
    data = {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head", "model.layers.1.self_attn*"]}
    config = found(data)
    assert specs(config) == expected
    assert specs(config, "lm_head") == specs(config, "model.layers.1.self_attn.q_proj") == [None, None]
    assert "does not say which algorithm" in config.notes[0][1] and config.kv == []


def test_both_files_of_modelopt_say_the_same() -> None:
    nested = {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"],
        },
    }  # fmt: skip
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    flat = {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"},
        "config_groups": {"group_0": {"input_activations": weights, "weights": weights, "targets": ["Linear"]}},
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    }  # fmt: skip
    one, other = found(nested), found({"architectures": ["x"], "quantization_config": flat})
    assert [e.as_dict() for e in one.entries] == [e.as_dict() for e in other.entries]
    assert [e.as_dict() for e in one.kv] == [e.as_dict() for e in other.kv]
    assert [e.quantizer_path for e in one.kv] == ["*.k_bmm_quantizer", "*.v_bmm_quantizer"]
    assert one.entries[1].place == ("quantization", "quant_algo")
    assert other.entries[1].place == ("quantization_config", "quant_algo")


def test_modelopt_mixed_precision_and_group_size() -> None:
    layers = {Q: {"quant_algo": "FP8"}, "model.layers.0.mlp.up_proj": {"quant_algo": "W4A16_AWQ", "group_size": 64}}
    config = found({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert specs(config) == ["fp8_e4m3 tensor, f32, absmax"] * 2
    assert specs(config, "model.layers.0.mlp.up_proj") == ["int4 group 64, model, absmax", None]
    assert specs(config, "model.layers.0.mlp.down_proj") == [None, None]


def test_modelopt_names_a_list_of_experts() -> None:
    """It stands for all of them, wherever it is written; one that is named by itself has its own."""
    experts = "model.layers.1.mlp.experts"
    layers = {f"{experts}.3.up_proj": {"quant_algo": "FP8"}, experts: {"quant_algo": "W8A16"}}
    config = found({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert specs(config, f"{experts}.12.up_proj") == ["int8 channel 0, f32, absmax", None]
    assert specs(config, f"{experts}.3.up_proj") == ["fp8_e4m3 tensor, f32, absmax"] * 2
    assert specs(config, "model.layers.10.mlp.experts.3.up_proj") == [None, None]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quant_algo": "NVFP4_SVD"}, "is not supported: no checkpoint format here holds a low-rank part"),
        ({"quant_algo": "NVFP5"}, "quant_algo 'NVFP5' is unknown (did you mean 'NVFP4'?)"),
        ({"quant_algo": "W4A16_AWQ", "group_size": "128"}, "group_size must be a positive whole number"),
        (
            {"quant_algo": "FP8", "kv_cache_scheme": "NVFP4_AFFINE"},
            "KV cache format 'NVFP4_AFFINE' is not supported, only",
        ),
        ({"quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 4, "type": "int"}}, "is not supported, only"),
        ({"quant_algo": "FP8", "ignore": "lm_head"}, "must be a list of patterns"),
    ],
)
def test_modelopt_refusals(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read({"quant_method": "modelopt", **more})
    assert message in caught.value.what


# --- compressed-tensors -----------------------------------------------------------------------------------------------

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group", "dynamic": False}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
MX = {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group", "scale_dtype": "torch.uint8"}
NV = {
    "num_bits": 4,
    "type": "float",
    "group_size": 16,
    "strategy": "tensor_group",
    "scale_dtype": "torch.float8_e4m3fn",
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (INT4, TensorSpec("int4", PerGroup(128), ScaleSpec("model", "half_range"))),
        ({**INT4, "symmetric": False}, TensorSpec("uint4", PerGroup(128), ScaleSpec("model", "half_range"), "int")),
        ({"num_bits": 4, "group_size": -1}, TensorSpec("int4", PerChannel(0), ScaleSpec("model", "half_range"))),
        ({}, TensorSpec("int8", PerTensor(), ScaleSpec("f32", "half_range"))),
        (FP8, TensorSpec("fp8_e4m3", PerTensor(), F32)),
        ({**FP8, "strategy": "channel"}, TensorSpec("fp8_e4m3", PerChannel(0), F32)),
        ({**FP8, "strategy": "block", "block_structure": [128, 128]}, TensorSpec("fp8_e4m3", PerTile(128, 128), F32)),
        (MX, TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even"))),
        (NV, TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "absmax", global_scale=F32))),
    ],
)
def test_arguments_of_weights(arguments: dict[str, Any], expected: TensorSpec) -> None:
    assert compressed_tensors.to_spec(arguments, weight=True) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (TOKEN, TensorSpec("fp8_e4m3", PerToken(), ScaleSpec("f32", "absmax", "dynamic"))),
        ({**FP8, "observer": "static_minmax"}, TensorSpec("fp8_e4m3", PerTensor(), F32)),
        ({**FP8, "observer": "mse"},
         TensorSpec("fp8_e4m3", PerTensor(), F32, observer=ObserverSpec("mse", (("steps", 40.0), ("shrink", 0.4))))),
        ({**NV, "dynamic": "local"}, TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "absmax", "dynamic", F32))),
        ({**MX, "dynamic": True}, TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even", "dynamic"))),
    ],
)  # fmt: skip
def test_arguments_of_activations(arguments: dict[str, Any], expected: TensorSpec) -> None:
    assert compressed_tensors.to_spec(arguments, weight=False) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 4}, "unknown argument 'bits'; did you mean 'num_bits'?"),
        ({"num_bits": 5}, "type int with num_bits 5 is not supported"),
        ({"num_bits": 8, "type": "fp"}, "type fp with num_bits 8"),
        ({"strategy": "attn_head"}, "strategy 'attn_head' is not supported"),
        ({"strategy": "group"}, "granularity.group must be a positive whole number"),
        ({"strategy": "block"}, "granularity {'tile': None} is unknown"),
        ({"dynamic": True}, "dynamic True does not fit a weight"),
        ("int8", "arguments must be a mapping, not"),
    ],
)
def test_arguments_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compressed_tensors.to_spec(arguments, weight=True)
    assert message in f"{caught.value.what}; {caught.value.hint}"
    with pytest.raises(ConfigError, match="observer 'imatrix_mse' is not supported"):
        compressed_tensors.to_spec({"observer": "imatrix_mse"}, weight=False)


@pytest.mark.parametrize("scheme", ["int4_wo_128", "uint4_wo_128", "mxfp4", "nvfp4", "ptpc_fp8", "int8"])
def test_our_schemes_in_their_words(scheme: str) -> None:
    """What compressed-tensors calls the schemes of the same name."""
    args = {
        "int4_wo_128": (INT4, None), "uint4_wo_128": ({**INT4, "symmetric": False}, None),
        "mxfp4": (MX, {**MX, "dynamic": True}), "nvfp4": (NV, {**NV, "dynamic": "local"}),
        "ptpc_fp8": ({**FP8, "strategy": "channel"}, TOKEN), "int8": ({}, {}),
    }[scheme]  # fmt: skip
    model = recipe.scheme_model(scheme)
    own = [native.to_spec(cfg) if cfg else None for cfg in (model.weight, model.input)]
    theirs = [compressed_tensors.to_spec(a, weight=i == 0) if a is not None else None for i, a in enumerate(args)]
    assert theirs == own


def test_groups_by_how_closely_they_name_modules() -> None:
    config = found({
        "quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head", "re:.*1.mlp"],
        "config_groups": {
            "names": {"targets": [Q], "weights": MX},
            "patterns": {"targets": ["re:.*self_attn"], "weights": FP8, "input_activations": FP8},
            "later": {"targets": ["re:.*q_proj"], "weights": NV},
            "classes": {"targets": ["Linear"], "weights": INT4, "input_activations": None},
        },
        "kv_cache_scheme": FP8,
    })  # fmt: skip
    assert specs(config)[0] == "fp4_e2m1 group 32, e8m0, even"
    assert specs(config, "model.layers.1.self_attn.q_proj") == ["fp8_e4m3 tensor, f32, absmax"] * 2
    assert specs(config, "model.layers.0.mlp.q_proj")[0] == f"{NVFP4}, absmax"
    assert specs(config, "model.layers.0.mlp.up_proj") == ["int4 group 128, model, half_range", None]
    assert specs(config, "model.layers.1.mlp.up_proj") == specs(config, "lm_head") == [None, None]
    assert [e.quantizer_path for e in config.kv] == ["*.k_bmm_quantizer", "*.v_bmm_quantizer"]
    assert config.entries[0].quantizer_path == "*" and not config.entries[0].enable


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "config_groups must be a mapping"),
        ({"config_groups": {"a": 4}}, "a config group must be a mapping"),
        ({"config_groups": {"a": {"targets": "Linear", "weights": INT4}}}, "must be a list of patterns"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 7}}}}, "num_bits 7 is not supported"),
        (
            {"config_groups": {}, "transform_config": {"a": 1}},
            "'transform_config' is not supported",
        ),
        ({"config_groups": {}, "kv_cache_scheme": {"strategy": "attn_head"}}, "strategy 'attn_head' is not supported"),
    ],
)
def test_compressed_tensors_refusals(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read({"quant_method": "compressed-tensors", **more})
    assert message in caught.value.what


# --- which one it is --------------------------------------------------------------------------------------------------


def test_dispatch() -> None:
    spec = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    config = found({"quantization_config": {"quant_method": "quark", "global_quant_config": {"weight": spec}}})
    assert specs(config) == ["fp8_e4m3 tensor, model, absmax", None]
    assert config.entries[1].place == ("quantization_config", "global_quant_config", "weight")
    for data in (None, [], {"quantize": {}}, {"schema": "quark/recipe/1"}, {"*": {"enable": False}}):
        assert read(data) is None
    with pytest.raises(ConfigError) as caught:
        read({"quant_method": "awq", "bits": 4})
    assert caught.value.what == "quark cannot read quant_method 'awq'"
