"""Checkpoints of llm-compressor, decoded by compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_name
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

from tests.peers import common

_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_TILES = {"num_key_value_heads": 4, "num_hidden_layers": 1}
_ONE = {"num_hidden_layers": 1}
_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def _ints(**given: Any) -> dict[str, Any]:
    """Returns the arguments of a modifier for integers, usually of 4 bits; `tokens`: inputs of 8 bits, dynamic."""
    tokens = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True, symmetric=False)
    inputs = {"input_activations": tokens} if given.pop("tokens", False) else {}
    arguments = QuantizationArgs(**{"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, **given})
    return {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=arguments, **inputs)}}


def _mixed() -> dict[str, Any]:
    from compressed_tensors.quantization import preset_name_to_scheme

    attention = preset_name_to_scheme("FP8_DYNAMIC", [r"re:.*self_attn\.(q|k|v|o)_proj$"])
    mlp = preset_name_to_scheme("NVFP4", [r"re:.*mlp\.(gate|up|down)_proj$"])
    return {"config_groups": {"attention": attention, "mlp": mlp}}


# name -> (changes of the model, family, modifier, its arguments).
CASES: dict[str, tuple[str, dict[str, Any], Any, Callable[[], dict[str, Any]]]] = {
    "w4a16": ("llama", {}, QuantizationModifier, lambda: {"scheme": "W4A16", "targets": "Linear"}),
    "w4a16-asym": ("llama", _ONE, QuantizationModifier, lambda: {"scheme": "W4A16_ASYM", "targets": "Linear"}),
    "w4a16-g32": ("qwen3", _ONE, QuantizationModifier, lambda: _ints(group_size=32)),
    "w4a16-channel": ("llama", _ONE, QuantizationModifier, lambda: _ints(strategy="channel", group_size=None)),
    "w4a16-gptq-actorder-static": ("llama", _ONE, GPTQModifier, lambda: _ints(actorder="static")),
    "w3a16": ("llama", _ONE, QuantizationModifier, lambda: {"scheme": "W3A16", "targets": "Linear"}),
    "w8a16": ("llama", _ONE, QuantizationModifier, lambda: {"scheme": "W8A16", "targets": "Linear"}),
    "w8a8": ("llama", _ONE, GPTQModifier, lambda: {"scheme": "W8A8", "targets": "Linear"}),
    "w8a8-asym": (
        "llama", _ONE, QuantizationModifier,
        lambda: _ints(num_bits=8, strategy="channel", group_size=None, symmetric=False, tokens=True),
    ),
    "w4a8-asym": ("llama", _ONE, QuantizationModifier, lambda: _ints(symmetric=False, tokens=True)),
    "w4a8": ("llama", _ONE, QuantizationModifier, lambda: {"scheme": "W4A8", "targets": "Linear"}),
    "fp8": ("llama", _ONE, QuantizationModifier, lambda: {"scheme": "FP8", "targets": "Linear"}),
    "fp8-kv": (
        "llama", _ONE, QuantizationModifier,
        lambda: {"scheme": "FP8", "targets": "Linear", "kv_cache_scheme": _CACHE},
    ),
    "fp8-kv-head": (
        "llama", {**_ONE, "num_key_value_heads": 2}, QuantizationModifier,
        lambda: {"scheme": "FP8", "targets": "Linear", "kv_cache_scheme": {**_CACHE, "strategy": "attn_head"}},
    ),
    "fp8-dynamic": ("qwen3", _ONE, QuantizationModifier, lambda: {"scheme": "FP8_DYNAMIC", "targets": "Linear"}),
    "fp8-block": ("llama", _TILES, QuantizationModifier, lambda: {"scheme": "FP8_BLOCK", "targets": "Linear"}),
    "nvfp4": ("llama", {}, QuantizationModifier, lambda: {"scheme": "NVFP4", "targets": "Linear"}),
    "nvfp4a16": ("llama", _ONE, QuantizationModifier, lambda: {"scheme": "NVFP4A16", "targets": "Linear"}),
    "mxfp4": ("llama", _ONE, QuantizationModifier, lambda: {"scheme": "MXFP4", "targets": "Linear"}),
    "mxfp8": ("llama", _ONE, QuantizationModifier, lambda: {"scheme": "MXFP8", "targets": "Linear"}),
    "w4afp8": ("llama", _ONE, QuantizationModifier, lambda: {"scheme": "W4AFP8", "targets": "Linear"}),
    "mixed": ("llama", {}, QuantizationModifier, _mixed),
    "head": ("llama", {"tie_word_embeddings": False}, QuantizationModifier, lambda: _ints()),
    "qwen3-moe-w4a16": ("qwen3_moe", {}, QuantizationModifier, lambda: {"scheme": "W4A16", "targets": "Linear"}),
    "qwen3-moe-nvfp4": ("qwen3_moe", {}, QuantizationModifier, lambda: {"scheme": "NVFP4", "targets": "Linear"}),
    "gpt-oss-w4a16": ("gpt_oss", common.OSS, QuantizationModifier, lambda: {"scheme": "W4A16", "targets": "Linear"}),
    "mixtral-fp8-dynamic": (
        "mixtral", {}, QuantizationModifier, lambda: {"scheme": "FP8_DYNAMIC", "targets": "Linear"},
    ),
}  # fmt: skip
_LEFT = {"head": []}
_USUAL = ["lm_head", "re:.*router$", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$"]


def make(name: str, scratch: Path, to: Path) -> None:
    """Makes one checkpoint and keeps it."""
    family, changes, modifier, arguments = CASES[name]
    rows = common.rows().tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    data.set_format("torch")
    model = common.build(scratch / "source", family, **changes)
    recipe = [modifier(ignore=_LEFT.get(name, _USUAL), **arguments())]
    shape = {"max_seq_length": len(rows[0]), "num_calibration_samples": len(rows)}
    oneshot(model, tokenizer=common.tokenizer(), dataset=data, recipe=recipe, **shape)
    model.save_pretrained(written := scratch / "written", save_compressed=True)
    facts = {"tool": f"llmcompressor {version('llmcompressor')}", "decoder": f"compressed-tensors {_version()}"}
    common.keep(written, to, facts, dict(_decoded(written)))


def _version() -> str:
    return version("compressed-tensors")


def _decoded(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every quantized weight as the library decodes it."""
    given = json.loads((folder / "config.json").read_text())["quantization_config"]
    config, tensors = QuantizationConfig.model_validate(given), common.load(folder)
    for module in (name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        scheme = next(
            scheme for scheme in config.config_groups.values()
            if any(target == "Linear" or match_name(module, target) for target in scheme.targets)
        )  # fmt: skip
        local = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        compressor = BaseCompressor.get_value_from_registry(scheme.format or given["format"])
        yield module, compressor.decompress(local, scheme)["weight"]
