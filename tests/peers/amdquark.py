"""Checkpoints of amd-quark, decoded by the modules that it imports them into."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["QUARK_DISABLE_COMPILE"] = "1"

import torch
import transformers
from quark.torch import LLMTemplate, ModelQuantizer, export_safetensors, import_model_from_safetensors
from torch.utils.data import DataLoader

from tests.peers import common

_ONE = {"num_hidden_layers": 1}
# name -> (family, changes of the model, scheme, other arguments of the template).
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "fp8": ("llama", _ONE, "fp8", {}),
    "fp8-kv": ("llama", _ONE, "fp8", {"kv_cache_scheme": "fp8"}),
    "fp8-kv-attention": ("llama", _ONE, "fp8", {"kv_cache_scheme": "fp8", "attention_scheme": "fp8"}),
    "fp8-kv-softmax": (
        "llama", {**_ONE, "attn_implementation": "eager"}, "fp8", {"kv_cache_scheme": "fp8", "attention_scheme": "fp8"},
    ),
    "phi3-fp8-kv": ("phi3", _ONE, "fp8", {"kv_cache_scheme": "fp8"}),
    "ptpc": ("qwen3", _ONE, "ptpc_fp8", {}),
    "int8": ("llama", _ONE, "int8", {}),
    "int4-gptq": ("llama", _ONE, "int4_wo_128", {"algorithm": "gptq"}),
    "int4-g32": ("llama", _ONE, "int4_wo_32", {}),
    "int4-channel": ("llama", _ONE, "int4_wo_per_channel", {}),
    "uint4-awq": ("llama", _ONE, "uint4_wo_128", {"algorithm": "awq"}),
    "mxfp4": ("llama", _ONE, "mxfp4", {}),
    "mxfp4-weight-only": ("llama", _ONE, "mxfp4_weight_only", {}),
    "mxfp4-fp8": ("llama", _ONE, "mxfp4_fp8", {}),
    "mxfp6": ("llama", _ONE, "mxfp6_e2m3", {}),
    "nvfp4": ("llama", _ONE, "nvfp4", {}),
    "amdfp4": ("llama", _ONE, "amdfp4", {}),
    "mixed": ("llama", _ONE, "fp8", {"layer_config": {"*mlp*": "mxfp4_weight_only"}}),
    "qwen3-moe-fp8": ("qwen3_moe", {}, "ptpc_fp8", {}),
    "files-ptpc": ("llama", _ONE, "ptpc_fp8", {}),
    "files-mxfp4": ("qwen3", _ONE, "mxfp4", {}),
    "files-int8": ("llama", _ONE, "int8", {}),
    "files-nvfp4": ("llama", _ONE, "nvfp4", {}),
}  # fmt: skip


def make(name: str, scratch: Path, to: Path) -> None:
    """Makes one checkpoint and keeps it."""
    family, changes, scheme, options = CASES[name]
    model = common.build(scratch / "source", family, **changes)
    config = LLMTemplate.get(family).get_config(scheme, **options)
    quantizer, written = ModelQuantizer(config), scratch / "written"
    if name.startswith("files-"):
        quantizer.direct_quantize_checkpoint(str(scratch / "source"), str(written), device="cpu")
    else:
        model = quantizer.freeze(quantizer.quantize_model(model, DataLoader(common.rows(), batch_size=1)))
        with torch.no_grad():
            export_safetensors(model, str(written))
    facts = {"tool": f"amd-quark {version('amd-quark')}", "decoder": "the modules of its import"}
    made = _importable(written, scratch / "copy") if name.startswith("files-") else written
    common.keep(written, to, facts, dict(_decoded(made)))


def _importable(written: Path, to: Path) -> Path:
    """Returns a copy of what it wrote file by file that its own import takes: without inputs, head and with zeros."""
    config, tensors = json.loads((written / "config.json").read_text()), common.load(written)
    given = config["quantization_config"]
    given["exclude"], given["global_quant_config"]["input_tensors"] = ["lm_head"], None
    if "int8" in str(given["global_quant_config"]["weight"]):
        scales = [name for name in tensors if name.endswith(".weight_scale")]
        tensors |= {name.replace("_scale", "_zero_point"): torch.zeros((), dtype=torch.int8) for name in scales}
    common.save(to, config, tensors)
    return to


def _decoded(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type in common.EXPERTS:  # it does not import its own files, where experts stay whole
        yield from _rows(common.load(folder))
        return
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = import_model_from_safetensors(model, str(folder))
    for name, module in model.named_modules():
        if getattr(module, "weight_quantizer", None) is not None:
            yield name, module._get_qweight(module.weight)


def _rows(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, scale in tensors.items():
        if name.endswith(".weight_scale"):
            weight = tensors[f"{name.removesuffix('.weight_scale')}.weight"]
            yield name.removesuffix(".weight_scale"), (weight.float() * scale.float()[:, None]).to(torch.bfloat16)
