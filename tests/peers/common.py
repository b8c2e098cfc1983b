"""Tiny models for other tools to quantize, and what is kept of what they wrote. Imports nothing of quark.

Runs in the environments of those tools, whatever release of torch and transformers they want.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 64
# Groups of 128 inputs fit every linear, and tiles of 128 those of a MODEL that asks for as many heads of k and v.
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "num_hidden_layers": 1},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2, "num_hidden_layers": 1},
}
DISTINCT = 32  # rows
OSS: dict[str, Any] = {
    "num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8,
    "attn_implementation": "eager",
}  # fmt: skip
FACTS = "peer.json"
_KEPT = {
    "config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
}


def build(folder: Path, family: str = "llama", attn_implementation: str = "sdpa", **changes: Any) -> Any:
    """Writes a random model in bf16, the same for one release of torch, and returns it loaded by transformers."""
    torch.manual_seed(20)
    config = transformers.AutoConfig.for_model(family, **{**BASE, **EXPERTS.get(family, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
        if name.startswith("model.layers.") and weight.dim() > 1 and not name.endswith("bias"):
            halves = weight.data.chunk(2, -2) if name.endswith("gate_up_proj") else [weight.data]
            weight.data = torch.cat([repeated(half) for half in halves], -2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.bfloat16, attn_implementation=attn_implementation).eval()


def repeated(weight: torch.Tensor) -> torch.Tensor:
    """Returns the weight with the first rows again and again, which git packs into a fraction."""
    times = max(1, weight.shape[-2] // DISTINCT)
    return torch.cat([weight[..., : weight.shape[-2] // times, :]] * times, -2).contiguous()


def tokenizer() -> Any:
    """Returns one token per byte of lower-case text and common signs, and one for all others."""
    known = ["<unk>", "<s>", "</s>", *"Ġabcdefghijklmnopqrstuvwxyz0123456789.,:;()[]=_-+*/'\"#Ċ"]
    inner = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(known)}, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert len(known) <= VOCABULARY
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def rows(count: int = 4, width: int = 32) -> torch.Tensor:
    """Returns token rows to calibrate with."""
    return torch.randint(3, VOCABULARY, (count, width), generator=torch.Generator().manual_seed(20))


def digest(weight: torch.Tensor) -> str:
    """Returns the sha256 of the values in their own dtype; zero is added so that no zero is negative."""
    flat = (weight.detach() + torch.zeros((), dtype=weight.dtype)).contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def keep(written: Path, to: Path, facts: Mapping[str, Any], decoded: Mapping[str, torch.Tensor]) -> None:
    """Copies the files that describe the model, with the facts of how they were made and hashes of decoded weights.

    What is `known` of a checkpoint that is made anew stays.
    """
    assert decoded
    known = json.loads((to / FACTS).read_text()).get("known") if (to / FACTS).exists() else None
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for file in sorted(written.iterdir()):
        if file.name in _KEPT:
            shutil.copyfile(file, to / file.name)
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in decoded.values()}
    assert len(dtypes) == 1, dtypes
    text = {
        **facts,
        **({"known": known} if known else {}),
        "dtype": dtypes.pop(),
        "decoded": {name: digest(decoded[name]) for name in sorted(decoded)},
    }
    (to / FACTS).write_text(json.dumps(text, indent=1) + "\n")


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a checkpoint that no tool here writes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Returns every tensor of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
