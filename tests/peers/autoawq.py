"""Checkpoints of AutoAWQ, decoded by its own `dequantize_gemm`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from awq import AutoAWQForCausalLM, __version__
from awq.utils.packing_utils import dequantize_gemm

from tests.peers import common

_ONE = {"num_hidden_layers": 1, "num_key_value_heads": 2}  # it searches outputs in steps of 64
_TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on."
# name -> (family, changes of the model, settings).
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemm": ("llama", _ONE, {"q_group_size": 128}),
    "g32-left-out": ("qwen3", _ONE, {"q_group_size": 32, "modules_to_not_convert": ["o_proj"]}),
}


def make(name: str, scratch: Path, to: Path) -> None:
    """Makes one checkpoint and keeps it."""
    family, changes, settings = CASES[name]
    common.build(scratch / "source", family, **changes)
    model = AutoAWQForCausalLM.from_pretrained(str(scratch / "source"), device_map="cpu")
    config = {"zero_point": True, "w_bit": 4, "version": "GEMM", **settings}
    model.quantize(common.tokenizer(), quant_config=config, calib_data=[_TEXT] * 8, max_calib_seq_len=128)
    model.save_quantized(str(written := scratch / "written"))
    facts = {"tool": f"autoawq {__version__}", "decoder": "its dequantize_gemm"}
    common.keep(written, to, facts, dict(_decoded(common.load(written), settings["q_group_size"])))


def _decoded(tensors: dict[str, torch.Tensor], size: int) -> Iterator[tuple[str, torch.Tensor]]:
    for module in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        codes, zeros, scales = (tensors[f"{module}.{leaf}"] for leaf in ("qweight", "qzeros", "scales"))
        yield module, dequantize_gemm(codes, zeros, scales, 4, size).T
