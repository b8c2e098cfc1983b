"""Headers and configs of large published models, from their shapes alone: names, dtypes, sizes; no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quarkcli.disk.headers import SINGLE
from quarkcli.disk.headers import Header as Stored
from quarkcli.disk.source import Source
from quarkcli.disk.writer import tensor_bytes

Shapes = Iterator[tuple[str, str, tuple[int, ...]]]
TILE = 128
TILES = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [TILE, TILE]}


def plain(name: str, *shape: int) -> Shapes:
    yield name, "BF16", shape


def tiled(name: str, *shape: int) -> Shapes:
    """A weight in fp8 with a scale for every tile."""
    yield name, "F8_E4M3", shape
    yield f"{name}_scale_inv", "F32", tuple(-(-size // TILE) for size in shape)


def outside(vocabulary: int, hidden: int) -> Shapes:
    yield from plain("model.embed_tokens.weight", vocabulary, hidden)
    yield from plain("model.norm.weight", hidden)
    yield from plain("lm_head.weight", vocabulary, hidden)


def norms(block: str, hidden: int) -> Shapes:
    for name in ("input", "post_attention"):
        yield from plain(f"{block}.{name}_layernorm.weight", hidden)


def mlp(prefix: str, hidden: int, inner: int, weight: Callable[..., Shapes]) -> Shapes:
    yield from weight(f"{prefix}.gate_proj.weight", inner, hidden)
    yield from weight(f"{prefix}.up_proj.weight", inner, hidden)
    yield from weight(f"{prefix}.down_proj.weight", hidden, inner)


def llama_70b() -> tuple[dict[str, Any], Shapes]:
    hidden, inner, blocks, heads, kv, vocabulary = 8192, 28672, 80, 64, 8, 128256
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": blocks,
        "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": vocabulary, "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
    }  # fmt: skip

    def tensors() -> Shapes:
        yield from outside(vocabulary, hidden)
        for index in range(blocks):
            block = f"model.layers.{index}"
            yield from norms(block, hidden)
            for name, rows in {"q": hidden, "k": kv * 128, "v": kv * 128, "o": hidden}.items():
                yield from plain(f"{block}.self_attn.{name}_proj.weight", rows, hidden)
            yield from mlp(f"{block}.mlp", hidden, inner, plain)

    return config, tensors()


def deepseek(experts: int, heads: int, dense: int, vocabulary: int, name: str) -> tuple[dict[str, Any], Shapes]:
    hidden, blocks, inner = 7168, 61, 2048
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": name, "num_hidden_layers": blocks,
        "hidden_size": hidden, "num_attention_heads": heads, "n_routed_experts": experts, "num_experts_per_tok": 8,
        "vocab_size": vocabulary, "torch_dtype": "bfloat16", "quantization_config": TILES,
        "max_position_embeddings": 131072,
    }  # fmt: skip

    def tensors() -> Shapes:
        yield from outside(vocabulary, hidden)
        for index in range(blocks):
            block = f"model.layers.{index}"
            yield from norms(block, hidden)
            attention = f"{block}.self_attn"
            yield from tiled(f"{attention}.q_a_proj.weight", 1536, hidden)
            yield from plain(f"{attention}.q_a_layernorm.weight", 1536)
            yield from tiled(f"{attention}.q_b_proj.weight", heads * 192, 1536)
            yield from tiled(f"{attention}.kv_a_proj_with_mqa.weight", 576, hidden)
            yield from plain(f"{attention}.kv_a_layernorm.weight", 512)
            yield from tiled(f"{attention}.kv_b_proj.weight", heads * 256, 512)
            yield from tiled(f"{attention}.o_proj.weight", hidden, heads * 128)
            if index < dense:
                yield from mlp(f"{block}.mlp", hidden, 18432, tiled)
                continue
            yield from plain(f"{block}.mlp.gate.weight", experts, hidden)
            yield f"{block}.mlp.gate.e_score_correction_bias", "F32", (experts,)
            yield from mlp(f"{block}.mlp.shared_experts", hidden, inner, tiled)
            for expert in range(experts):
                yield from mlp(f"{block}.mlp.experts.{expert}", hidden, inner, tiled)

    return config, tensors()


def gpt_oss_120b() -> tuple[dict[str, Any], Shapes]:
    hidden, blocks, experts, heads, kv, vocabulary = 2880, 36, 128, 64, 8, 201088
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": blocks,
        "hidden_size": hidden, "intermediate_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": 64, "num_local_experts": experts, "num_experts_per_tok": 4, "vocab_size": vocabulary,
        "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"},
        "max_position_embeddings": 131072,
    }  # fmt: skip

    def tensors() -> Shapes:
        yield from outside(vocabulary, hidden)
        for index in range(blocks):
            block = f"model.layers.{index}"
            yield from norms(block, hidden)
            attention = f"{block}.self_attn"
            for name, (rows, cols) in {
                "q": (heads * 64, hidden), "k": (kv * 64, hidden), "v": (kv * 64, hidden), "o": (hidden, heads * 64)
            }.items():  # fmt: skip
                yield from plain(f"{attention}.{name}_proj.weight", rows, cols)
                yield from plain(f"{attention}.{name}_proj.bias", rows)
            yield from plain(f"{attention}.sinks", heads)
            yield from plain(f"{block}.mlp.router.weight", experts, hidden)
            yield from plain(f"{block}.mlp.router.bias", experts)
            for name, rows in {"gate_up_proj": 2 * hidden, "down_proj": hidden}.items():
                prefix = f"{block}.mlp.experts.{name}"
                yield f"{prefix}_blocks", "U8", (experts, rows, hidden // 32, 16)
                yield f"{prefix}_scales", "U8", (experts, rows, hidden // 32)
                yield from plain(f"{prefix}_bias", experts, rows)

    return config, tensors()


MODELS: dict[str, Callable[[], tuple[dict[str, Any], Shapes]]] = {
    "Llama-3.3-70B": llama_70b,
    "gpt-oss-120b": gpt_oss_120b,
    "DeepSeek-V3 671B": lambda: deepseek(256, 128, 3, 129280, "deepseek_v3"),
    "Kimi-K2 1T": lambda: deepseek(384, 64, 1, 163840, "kimi_k2"),
}


def source(name: str, folder: Path) -> Source:
    """The model as it was published, with nothing but headers; the tokenizer and the like are those of `folder`."""
    config, tensors = MODELS[name]()
    headers = {tensor: Stored(tensor, dtype, shape, SINGLE, 0, 0) for tensor, dtype, shape in tensors}
    size = sum(tensor_bytes(header.dtype, header.shape) for header in headers.values())
    return Source(folder, name, None, None, json.dumps(config), config, headers, {SINGLE: (size, 1)})
