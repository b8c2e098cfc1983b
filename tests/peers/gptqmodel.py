"""Checkpoints of GPTQModel, decoded by its own plain linear."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its pool of one processor is too small for itself

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

from tests.peers import common

_ONE = {"num_hidden_layers": 1}
# name -> (family, changes of the model, settings).
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "int4": ("llama", _ONE, {"bits": 4, "group_size": 128, "desc_act": False}),
    "int4-desc-act": ("llama", _ONE, {"bits": 4, "group_size": 32, "desc_act": True}),
    "int4-asym": ("llama", _ONE, {"bits": 4, "group_size": 128, "desc_act": False, "sym": False}),
    "int8-channel": ("llama", _ONE, {"bits": 8, "group_size": -1, "desc_act": False, "act_group_aware": False}),
    "int3": ("llama", _ONE, {"bits": 3, "group_size": 128, "desc_act": False}),
    "int4-v2": ("qwen3", _ONE, {"bits": 4, "group_size": 128, "desc_act": False, "format": "gptq_v2"}),
    "dynamic": ("llama", _ONE, {
        "bits": 4, "group_size": 128, "desc_act": False,
        "dynamic": {r"-:.*\.o_proj$": {}, r"+:.*\.down_proj$": {"bits": 8, "group_size": 64}},
    }),
    "dynamic-split": ("llama", _ONE, {
        "bits": 4, "group_size": 128, "desc_act": False, "dynamic": {r"-:.*\.k_proj$": {}},
    }),
    "awq": (
        "llama", {**_ONE, "num_key_value_heads": 2},
        {"bits": 4, "group_size": 128, "quant_method": "awq", "format": "gemm"},
    ),
}  # fmt: skip


def make(name: str, scratch: Path, to: Path) -> None:
    """Makes one checkpoint and keeps it."""
    family, changes, settings = CASES[name]
    common.build(scratch / "source", family, **changes)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in common.rows(16)]
    model = GPTQModel.load(str(scratch / "source"), QuantizeConfig(**settings), device="cpu")
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    model.save(str(written := scratch / "written"))
    common.tokenizer().save_pretrained(written)
    facts = {"tool": f"GPTQModel {version('gptqmodel')}", "decoder": "its TorchLinear"}
    common.keep(written, to, facts, dict(_decoded(written)))


def _decoded(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            yield name, module.dequantize_weight().T
        elif hasattr(module, "qweight"):
            yield name, dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, module.group_size).T
