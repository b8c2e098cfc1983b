"""Checkpoints of nvidia-modelopt, decoded by its own tensor classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import from_quantized_weight
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, NVFP4QTensor

from tests.peers import common

_ONE = {"num_hidden_layers": 1}
_HEADS = {"num_key_value_heads": 4, "num_hidden_layers": 1}
# name -> (family, changes of the model, preset, presets of which entries are added, only for the MLP when it is "mlp").
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, str]]] = {
    "fp8-kv": ("llama", _ONE, "FP8_DEFAULT_CFG", {"FP8_KV_CFG": ""}),
    "fp8-untied": ("qwen3", {**_ONE, "tie_word_embeddings": False}, "FP8_DEFAULT_CFG", {}),
    "nvfp4-kv": ("llama", {}, "NVFP4_DEFAULT_CFG", {"FP8_KV_CFG": ""}),
    "nvfp4-mlp": ("llama", _ONE, "NVFP4_MLP_ONLY_CFG", {}),
    "w4a16-nvfp4": ("qwen3", _ONE, "W4A16_NVFP4_CFG", {}),
    "mixed": ("llama", _ONE, "NVFP4_DEFAULT_CFG", {"FP8_DEFAULT_CFG": "mlp"}),
    "int4-awq": ("llama", _ONE, "INT4_AWQ_CFG", {}),
    "w4a8-awq": ("llama", _ONE, "W4A8_AWQ_BETA_CFG", {}),
    "int8-smoothquant": ("llama", _ONE, "INT8_SMOOTHQUANT_CFG", {}),
    "int8-weight-only": ("llama", _ONE, "INT8_WEIGHT_ONLY_CFG", {}),
    "mxfp4": ("llama", _ONE, "MXFP4_DEFAULT_CFG", {}),
    "w4a8-nvfp4-fp8": ("llama", _ONE, "W4A8_NVFP4_FP8_CFG", {}),
    "fp8-blocks": ("llama", _HEADS, "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", {}),
    "qwen3-moe-nvfp4": ("qwen3_moe", {}, "NVFP4_DEFAULT_CFG", {}),
}


def make(name: str, scratch: Path, to: Path) -> None:
    """Makes one checkpoint and keeps it."""
    family, changes, preset, added = CASES[name]
    model = common.build(scratch / "source", family, **changes)
    config = copy.deepcopy(getattr(mtq, preset))
    for other, where in added.items():
        config["quant_cfg"] += [_narrowed(entry, where) for entry in getattr(mtq, other)["quant_cfg"] if _adds(entry)]
    rows = common.rows()
    model = mtq.quantize(model, config, lambda quantized: quantized(rows))
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=str(written := scratch / "written"))
    facts = {"tool": f"nvidia-modelopt {version('nvidia-modelopt')}", "decoder": "its QTensor classes, float32"}
    common.keep(written, to, facts, dict(_decoded(written)))


def _adds(entry: dict[str, Any]) -> bool:
    return bool(entry.get("enable", True)) and entry["quantizer_name"] != "*"


def _narrowed(entry: dict[str, Any], where: str) -> dict[str, Any]:
    own = copy.deepcopy(entry)
    if where:
        own["quantizer_name"] = f"*{where}{own['quantizer_name']}"
    return own


def _decoded(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every quantized weight, with what inputs are multiplied by before it."""
    tensors = common.load(folder)
    for module in (name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        local = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        found = _weight(local["weight"], local["weight_scale"], local.get("weight_scale_2"))
        before = local.get("pre_quant_scale")
        yield module, found if before is None else found * before.float()


def _weight(codes: torch.Tensor, scale: torch.Tensor, outer: torch.Tensor | None) -> torch.Tensor:
    rows, cols = codes.shape
    wide = torch.Size((rows, cols * 2))
    if codes.dtype == torch.uint8 and scale.dtype == torch.float8_e4m3fn:
        size = cols * 2 // scale.shape[1]
        made = NVFP4QTensor(wide, torch.float32, codes)
        return made.dequantize(torch.float32, scale=scale, double_scale=outer, block_sizes={-1: size})
    if codes.dtype == torch.uint8 and scale.dtype == torch.uint8:
        return MXFP4QTensor(wide, torch.float32, codes).dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
    if codes.dtype == torch.uint8:  # two rows in one; the inverse of `pack_int4_in_uint8`, for which it has none
        signed = torch.stack([codes & 15, codes >> 4], 1).reshape(rows * 2, cols).to(torch.int8)
        signed = torch.where(signed > 7, signed - 16, signed)
        return signed.float() * scale.repeat_interleave(cols // scale.shape[1], 1)
    if codes.dtype == torch.int8:
        return from_quantized_weight(codes, scale, "int8_sq", torch.float32)
    if scale.dim() == 4:
        sizes = {-1: 128, -2: 128}
        return FP8QTensor(codes.shape, torch.float32, codes).dequantize(
            torch.float32, scale=scale.reshape(scale.shape[0], scale.shape[2]), block_sizes=sizes
        )
    return FP8QTensor(codes.shape, torch.float32, codes).dequantize(torch.float32, scale=scale)
