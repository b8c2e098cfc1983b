"""Reads facts from config.json under any of the names that models use. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where a config with several towers keeps the language model's part; one may lie inside another.
_TEXT = (
    "text_config", "language_config", "llm_config", "language_model_config", "text_model_config", "thinker_config"
)  # fmt: skip
_POSITIONS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "model_max_length",
    "seq_length", "context_length", "max_context_length",
)  # fmt: skip
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "n_embed", "dim", "model_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num")
_VOCABULARY = ("vocab_size", "padded_vocab_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k", "num_selected_experts")
_INNER = ("attn_config", "ffn_config")  # where DBRX keeps facts about attention and experts
TIED = "tie_word_embeddings"  # head and embedding are one tensor
# Where a config says how the files are quantized.
QUANTIZATION = ("quantization_config", "compression_config")


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """Returns the part of config.json that describes the text model."""
    for key in _TEXT:
        inner = config.get(key)
        if isinstance(inner, dict):
            return text_config(inner)
    return config


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the object that says how the files are quantized, at the top or in the text model's part; else {}."""
    parts = (config, text_config(config))
    found = (part.get(key) for part in parts for key in QUANTIZATION)
    return next((value for value in found if isinstance(value, dict) and value), {})


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json without anything that says how its files are quantized, in inner objects neither."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION
    }


def block_count(config: Mapping[str, object]) -> int | None:
    """Returns the number of decoder blocks."""
    return _number(text_config(config), _BLOCKS)


def hidden_size(config: Mapping[str, object]) -> int | None:
    """Returns the width of the residual stream."""
    return _number(text_config(config), _WIDTHS)


def head_size(config: Mapping[str, object]) -> int | None:
    """Returns the number of features of one head of attention."""
    said = _number(text_config(config), ("head_dim",))
    width, count = hidden_size(config), heads(config)
    return said if said is not None else width // count if width and count else None


def heads(config: Mapping[str, object]) -> int | None:
    """Returns the number of heads of queries."""
    return _number(text_config(config), _HEADS)


def kv_heads(config: Mapping[str, object]) -> int | None:
    """Returns the number of heads of keys and values, where config.json says it apart from that of queries."""
    return _number(text_config(config), _KV_HEADS)


def vocabulary(config: Mapping[str, object]) -> int | None:
    """Returns the number of tokens that the model knows."""
    return _number(text_config(config), _VOCABULARY)


def expert_count(config: Mapping[str, object]) -> int | None:
    """Returns the number of routed experts; None for a model without."""
    return _number(text_config(config), _EXPERTS) or None


def zero_experts(config: Mapping[str, object]) -> int:
    """Returns the number of experts behind the routed ones that compute nothing (LongCat Flash)."""
    return _number(text_config(config), ("zero_expert_num",)) or 0


def active_experts(config: Mapping[str, object]) -> int | None:
    """Returns the number of routed experts of a layer that a token passes."""
    return _number(text_config(config), _ACTIVE) or None


def position_limit(config: Mapping[str, object]) -> int | None:
    """Returns the number of tokens that the model takes in one sequence."""
    limit = _number(text_config(config), _POSITIONS)
    return limit if limit is not None and limit > 0 else None


def _number(config: Mapping[str, object], keys: tuple[str, ...]) -> int | None:
    parts = [config, *(part for name in _INNER if isinstance(part := config.get(name), dict))]
    found = (part.get(key) for part in parts for key in keys)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)
