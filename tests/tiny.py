"""Tiny random checkpoints of real model families, built with transformers itself."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.llama import modeling_llama

BASE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
    "rope_theta": 150000.0,
}
# Family -> (class, model type, what differs from BASE). Never 2 * expert intermediate == hidden: orientation of a
# square matrix cannot be told.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", {}),
    "llama_tied": ("LlamaForCausalLM", "llama", {"tie_word_embeddings": True}),
    "qwen2_sliding": (
        "Qwen2ForCausalLM",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gptj": (
        "GPTJForCausalLM",
        "gptj",
        {
            "n_embd": 128,
            "n_layer": 3,
            "n_head": 4,
            "rotary_dim": 16,
            "n_positions": 256,
            "n_inner": 256,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 32},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "mixtral",
        {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "gpt_oss",
        {
            "intermediate_size": 96,
            "head_dim": 32,
            "sliding_window": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": YARN,
        },
    ),
    # Experts that no registry reaches: scored before they run, with all tokens; and stacked in two dimensions.
    "llama4_text": (
        "Llama4ForCausalLM",
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 96,
            "intermediate_size_mlp": 256,
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
        },
    ),
    "dbrx": (
        "DbrxForCausalLM",
        "dbrx",
        {
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 256,
            # The base that transformers uses whatever the config says, so that both compute the same.
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    # Blocks of four kinds, masks of two ranks, experts without a gate.
    "nemotron_h": (
        "NemotronHForCausalLM",
        "nemotron_h",
        {
            "num_hidden_layers": None,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 2,
            "ssm_state_size": 16,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "moe_shared_expert_intermediate_size": 96,
        },
    ),
    # Blocks return a pair, and later ones read the second output of earlier ones.
    "glm_moe_dsa": (
        "GlmMoeDsaForCausalLM",
        "glm_moe_dsa",
        {
            "num_key_value_heads": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "indexer_types": ["full", "shared", "shared"],
            "index_topk": 8,
            "index_head_dim": 32,
            "index_n_heads": 2,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    # Blocks share a dict of keys and values, and read a second input of their own.
    "gemma4_text": (
        "Gemma4ForCausalLM",
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512,
            "num_kv_shared_layers": 2,
            "global_head_dim": 64,
        },
    ),
}
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
OWN_KEYS = {"gptj", "dbrx"}  # families whose config has none of BASE's size keys


@dataclass(frozen=True)
class Header:
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    tensors: dict[str, torch.Tensor]

    @property
    def headers(self) -> dict[str, Header]:
        return {name: Header(SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for name, t in self.tensors.items()}

    def pick(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name] for name in names}

    def plain(self, **arguments: Any) -> Any:
        """The model as transformers loads it."""
        config = json.loads((self.folder / "config.json").read_text())
        return getattr(transformers, config["architectures"][0]).from_pretrained(self.folder, **arguments)

    def rewrite(self, tensors: dict[str, torch.Tensor]) -> Checkpoint:
        """The same model with other file tensors."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        return Checkpoint(self.folder, tensors)

    def patch_config(self, **changes: Any) -> Checkpoint:
        """Set keys of config.json; None removes a key."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return self


def build(family: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Checkpoint:
    """Write the tiny checkpoint of `family` to `folder` in the names its published files have.

    Every tensor gets random values that matter, norms and biases included, so that two ways of running differ.
    """
    name, kind, own = FAMILIES[family]
    base = {key: BASE[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")} if family in OWN_KEYS else BASE
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = {key: value for key, value in (base | own | changes).items() if value is not None}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # what the class itself draws: gpt-oss' sinks
        model = getattr(transformers, name)(CONFIG_MAPPING[kind](**deepcopy(config))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.ndim >= 2 else parameter + noise)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, save_original_format=True)
    return Checkpoint(folder, load_file(folder / "model.safetensors"))


def tokens(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token numbers [rows, length]."""
    return torch.randint(3, BASE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padding(rows: int = 2, length: int = 24, pad: int = 5) -> torch.Tensor:
    """Attention mask [rows, length] whose first row starts with `pad` padding positions."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :pad] = 0
    return mask


def hide_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama computes attention in code of its own from now on, where nothing can look, as classes of no library do."""

    def forward(
        self: Any, hidden_states: torch.Tensor, position_embeddings: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        linears = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (linear(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in linears)
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
