"""Small mixture models whose every value is a formula: no generator of random numbers can change between releases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quarkcli.disk.embedded import EMBEDDED

HIDDEN, INNER, EXPERTS, HEADS, LAYERS = 128, 256, 2, 2, 2
_HEAD = HIDDEN // HEADS
_WORD = 0xFFFFFFFF


def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 with heavy tails, and zeros: exact integer arithmetic on the position, then products that IEEE fixes."""
    count = torch.tensor(shape).prod().item()
    word = torch.arange(int(count), dtype=torch.int64) + int.from_bytes(name.encode(), "little") % 1_000_003
    for factor in (2654435761, 2246822519, 3266489917):
        word = (word * factor) & _WORD
        word = word ^ (word >> 15)
    uniform = (word >> 8).float() / 2**23 - 1.0
    made = uniform * uniform * uniform * 0.25
    made[::97] = 0.0
    return made.reshape(shape)


def _common(dtype: torch.dtype, vocabulary: int, more: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN), "lm_head.weight": (vocabulary, HIDDEN)
    }  # fmt: skip
    for layer in range(LAYERS):
        attention = {f"self_attn.{leaf}_proj.weight": (HIDDEN, HIDDEN) for leaf in "qkvo"}
        shapes |= {f"model.layers.{layer}.{leaf}": shape for leaf, shape in {**attention, **more}.items()}
    norms = [f"model.layers.{i}.{leaf}_layernorm.weight" for i in range(LAYERS) for leaf in ("input", "post_attention")]
    made = {name: values(name, shape).to(dtype) for name, shape in shapes.items()}
    return made | {name: torch.ones(HIDDEN, dtype=dtype) for name in (*norms, "model.norm.weight")}


def _config(kind: str, model: str, dtype: str, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [model], "model_type": kind, "dtype": dtype, "hidden_size": HIDDEN, "head_dim": _HEAD,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "vocab_size": vocabulary, "max_position_embeddings": 256, "num_experts_per_tok": 1, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


def per_expert(vocabulary: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Qwen3-MoE: a matrix per expert and projection, float32."""
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (EXPERTS, HIDDEN)}
    shapes |= {f"self_attn.{leaf}_norm.weight": (_HEAD,) for leaf in "qk"}
    for expert in range(EXPERTS):
        for leaf, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            shapes[f"mlp.experts.{expert}.{leaf}_proj.weight"] = shape
    config = _config(
        "qwen3_moe", "Qwen3MoeForCausalLM", "float32", vocabulary, num_experts=EXPERTS, moe_intermediate_size=INNER,
        intermediate_size=INNER, decoder_sparse_step=1, norm_topk_prob=True, mlp_only_layers=[],
    )  # fmt: skip
    return config, _common(torch.float32, vocabulary, shapes)


def fused(vocabulary: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """gpt-oss: all experts in one tensor, [in, out], gate and up row by row in turn, with biases, bfloat16."""
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.router.weight": (EXPERTS, HIDDEN), "mlp.router.bias": (EXPERTS,), "self_attn.sinks": (HEADS,),
        "mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * INNER), "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * INNER),
        "mlp.experts.down_proj": (EXPERTS, INNER, HIDDEN), "mlp.experts.down_proj_bias": (EXPERTS, HIDDEN),
        **{f"self_attn.{leaf}_proj.bias": (HIDDEN,) for leaf in "qkvo"},
    }  # fmt: skip
    config = _config(
        "gpt_oss", "GptOssForCausalLM", "bfloat16", vocabulary, num_local_experts=EXPERTS, intermediate_size=INNER
    )
    return config, _common(torch.bfloat16, vocabulary, shapes)


SOURCES = {"per_expert": per_expert, "fused": fused}


def build(name: str, folder: Path, vocabulary: int = 64) -> Path:
    """Write a source; with the embedded model's vocabulary it gets that model's tokenizer."""
    config, tensors = SOURCES[name](vocabulary)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    dense = {tensor: value.contiguous() for tensor, value in tensors.items()}
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    if vocabulary == json.loads((EMBEDDED / "config.json").read_text())["vocab_size"]:
        for file in EMBEDDED.glob("tokenizer*"):
            shutil.copy(file, folder)
    return folder
