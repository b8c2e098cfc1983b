"""Checkpoints in the forms of models that were published quantized, packed here; transformers decodes what it can.

Their makers' tools are not open, or need a GPU. Nothing of quark has a part in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.peers import common

Tensors = dict[str, torch.Tensor]
# What a form is: the config, the tensors of a weight, and the weights of the model as they are decoded.
Form = Callable[[Tensors], tuple[dict[str, Any], Tensors, Tensors]]

_TILE = 128
_FP8_MAX = 448.0
_TILES = {"num_key_value_heads": 4, "num_hidden_layers": 1}
_MLA = {
    "num_attention_heads": 1, "num_key_value_heads": 1, "q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 128,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "head_dim": 64, "first_k_dense_replace": 0, "n_routed_experts": 2,
    "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 128, "n_shared_experts": 1,
    "num_hidden_layers": 1,
}  # fmt: skip
_LINEAR = re.compile(r"layers\.\d+\..*(?<!norm)(?<!mlp\.gate)(?<!router)\.weight$")


def _transformers_fp8(tensors: Tensors) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Tiles of 128, by the operations with which transformers quantizes and dequantizes."""
    gates = [name.removesuffix(".weight") for name in tensors if name.endswith("mlp.gate.weight")]
    given = transformers.FineGrainedFP8Config(modules_to_not_convert=["lm_head", *gates])
    quantizer = SimpleNamespace(quantization_config=given)
    written, decoded = dict(tensors), {}
    for name in filter(_LINEAR.search, tensors):
        made = Fp8Quantize(quantizer).convert({name: tensors[name]})
        written |= made
        weight, scale = made.values()
        decoded[name.removesuffix(".weight")] = Fp8Dequantize(quantizer)._dequantize_one(weight, scale, torch.bfloat16)
    return given.to_dict(), written, decoded


def _deepseek(tensors: Tensors) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Tiles of 128, of which some end within a weight; multipliers are called their inverse."""
    written, decoded = dict(tensors), {}
    for name in filter(_LINEAR.search, tensors):
        weight = tensors[name].float()
        rows, cols = (-(-size // _TILE) for size in weight.shape)
        whole = torch.nn.functional.pad(weight, (0, cols * _TILE - weight.shape[1], 0, rows * _TILE - weight.shape[0]))
        amax = whole.reshape(rows, _TILE, cols, _TILE).abs().amax((1, 3))
        scale = amax / _FP8_MAX
        spread = scale.repeat_interleave(_TILE, 0).repeat_interleave(_TILE, 1)[: weight.shape[0], : weight.shape[1]]
        written[name] = (weight / spread).to(torch.float8_e4m3fn)
        written[f"{name}_scale_inv"] = scale
        decoded[name.removesuffix(".weight")] = (written[name].float() * spread).to(torch.bfloat16)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [_TILE, _TILE]}
    return config, written, decoded


def _mistral(tensors: Tensors) -> tuple[dict[str, Any], Tensors, Tensors]:
    """One scale for a weight and one for its input."""
    written, decoded = dict(tensors), {}
    for name in filter(_LINEAR.search, tensors):
        module, scale = name.removesuffix(".weight"), (tensors[name].float().abs().max() / _FP8_MAX)
        written[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        written[f"{module}.weight_scale_inv"] = scale
        written[f"{module}.activation_scale"] = torch.tensor(0.02)
        decoded[module] = (written[name].float() * scale).to(torch.bfloat16)
    config = {
        "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    return config, written, decoded


def _kimi(tensors: Tensors) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Routed experts alone, in groups of 32; eight codes in a word, the first lowest."""
    written, decoded, size = dict(tensors), {}, 32
    for name in (name for name in tensors if ".mlp.experts." in name):
        module, weight = name.removesuffix(".weight"), written.pop(name).float()
        groups = weight.reshape(weight.shape[0], -1, size)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16)
        codes = (groups / scale.float()).round().clamp(-8, 7)
        decoded[module] = (codes * scale.float()).to(torch.bfloat16).reshape(weight.shape)
        words = (codes.reshape(weight.shape[0], -1, 8).long() + 8) << torch.arange(0, 32, 4)
        written[f"{module}.weight_packed"] = words.sum(-1).to(torch.int64).to(torch.int32)
        written[f"{module}.weight_scale"] = scale.squeeze(-1)
        written[f"{module}.weight_shape"] = torch.tensor(weight.shape)
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "group_size": size, "strategy": "group", "dynamic": False,
        "block_structure": None, "actorder": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "kv_cache_scheme": None, "global_compression_ratio": None, "config_groups": {"group_0": group},
        "ignore": [
            "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        ],
    }  # fmt: skip
    return config, written, decoded


def _gpt_oss(tensors: Tensors) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Experts in one tensor for all, [experts, out, groups, bytes], gates and ups in turn."""
    written, decoded = dict(tensors), {}
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    for name in (name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))):
        weight = written.pop(name).float().transpose(1, 2)
        groups = weight.reshape(*weight.shape[:2], -1, 32)
        exponent = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True))) - 2
        scaled = groups / torch.exp2(exponent)
        codes = (scaled.abs().unsqueeze(-1) - values).abs().argmin(-1) + 8 * (scaled < 0)
        written[f"{name}_blocks"] = (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
        written[f"{name}_scales"] = (exponent.squeeze(-1) + 127).to(torch.uint8)
        whole = convert_moe_packed_tensors(written[f"{name}_blocks"], written[f"{name}_scales"]).transpose(1, 2)
        prefix = name.rpartition(".")[0]
        for expert, matrix in enumerate(whole):
            parts = {"down_proj": matrix} if name.endswith("down_proj") else _gates_and_ups(matrix)
            decoded |= {f"{prefix}.{expert}.{leaf}": part for leaf, part in parts.items()}
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {"quant_method": "mxfp4", "modules_to_not_convert": left}, written, decoded


def _gates_and_ups(matrix: torch.Tensor) -> Tensors:
    return {"gate_proj": matrix[::2], "up_proj": matrix[1::2]}


# name -> (family, changes of the model, form).
CASES: dict[str, tuple[str, dict[str, Any], Form]] = {
    "qwen3-fp8": ("qwen3", _TILES, _transformers_fp8),
    "qwen3-moe-fp8": ("qwen3_moe", {"num_key_value_heads": 4}, _transformers_fp8),
    "deepseek-v3": ("deepseek_v3", _MLA, _deepseek),
    "mistral-fp8": ("mistral", {"num_hidden_layers": 1}, _mistral),
    "kimi-k2": ("deepseek_v3", _MLA, _kimi),
    "gpt-oss": ("gpt_oss", common.OSS, _gpt_oss),
}


def make(name: str, scratch: Path, to: Path) -> None:
    """Makes one checkpoint and keeps it."""
    family, changes, form = CASES[name]
    common.build(scratch / "source", family, **changes)
    config, tensors, decoded = form(common.load(scratch / "source"))
    whole = json.loads((scratch / "source" / "config.json").read_text())
    common.save(written := scratch / "written", {**whole, **_named(name), "quantization_config": config}, tensors)
    facts = {"tool": "none: packed by tests/peers/published.py", "decoder": f"transformers {transformers.__version__}"}
    common.keep(written, to, facts, decoded)


def _named(name: str) -> Mapping[str, Any]:
    """Returns how a model calls itself that is of another's family."""
    return {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]} if name == "kimi-k2" else {}
