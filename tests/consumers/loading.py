"""transformers and compressed-tensors as readers of what the job wrote."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.utils.match import match_name
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM, logging

from tests import runs

CACHE_SCALES = (".k_scale", ".v_scale")


@cache
def knows_caches() -> bool:
    """True when transformers and compressed-tensors, as installed and tried without quark, keep the scales of a cache.

    The one renamed an argument of attention in 5.24 by which the other, up to 0.20, tells that it has a cache.
    """
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    fp8 = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
    model = LlamaForCausalLM(config)
    apply_quantization_config(model, QuantizationConfig(config_groups={}, kv_cache_scheme=fp8))
    return all(f"model.layers.0.self_attn{name}" in model.state_dict() for name in CACHE_SCALES)


def passed_over(names: Iterable[str]) -> set[str]:
    """Those of a checkpoint's tensors that transformers, as installed, will call unexpected: scales of a cache."""
    return set() if knows_caches() else {name for name in names if name.endswith(CACHE_SCALES)}


def load(
    folder: Path, dtype: torch.dtype = torch.bfloat16, *, static: bool = False, decoded: bool = False
) -> tuple[Any, dict[str, set[str]]]:
    """(model, keys by what is wrong with them).

    static    keep the modules quantized, so that input scales apply
    decoded   ask for float weights, as one must where there are zero points
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    keep = {"quantization_config": CompressedTensorsConfig(dequantize=decoded)} if static or decoded else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **keep)
    return model.eval(), {kind: set(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}


def log_probabilities(model: Any, rows: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """Of the next token at every position but the last of a row, float32 [rows, width - 1, vocabulary]."""
    with torch.no_grad():
        return torch.cat([model(part).logits[:, :-1].float().log_softmax(-1) for part in rows.split(batch)])


def perplexity(scores: torch.Tensor, rows: torch.Tensor) -> float:
    """Over every position but a row's first."""
    return math.exp(-float(scores.gather(-1, rows[:, 1:, None]).double().mean()))


def divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL of `other` from `base` per token, in nats."""
    return float(torch.nn.functional.kl_div(other, base, log_target=True, reduction="none").sum(-1).double().mean())


def windows(tokenizer: Any, text: str, width: int) -> torch.Tensor:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return torch.tensor(ids[: len(ids) // width * width]).view(-1, width)


def scheme_of(config: dict[str, Any], name: str) -> QuantizationScheme:
    """The one scheme the library applies to a linear of that name."""
    assert not any(match_name(name, pattern) for pattern in config["ignore"]), name
    read = QuantizationConfig.model_validate(config)
    found = [
        scheme
        for scheme in read.config_groups.values()
        if any(target == "Linear" or match_name(name, target) for target in scheme.targets)
    ]
    assert len(found) == 1, name
    return found[0]


def decompress(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every quantized weight by module name, float32, as compressed-tensors decodes the files."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    out = {}
    for name in tensors:
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        scheme = scheme_of(config, module)
        local = {
            key.removeprefix(f"{module}."): value for key, value in tensors.items() if key.startswith(f"{module}.")
        }
        if local["weight_scale"].dtype == torch.bfloat16:
            local["weight_scale"] = local["weight_scale"].float()  # the result has the dtype of the scale
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        out[module] = compressor.decompress(local, scheme)["weight"].float()
    return out


def in_float32(folder: Path, more: frozenset[str] = frozenset()) -> torch.nn.Module:
    """fp4 is decompressed to bfloat16 whatever is asked for, so the rest follows only then.

    more   tensors that transformers passes over, beside those of the cache
    """
    model, wrong = load(folder, static=True)
    unexpected = passed_over(runs.read_all(folder)) | more
    assert wrong == {"missing": set(), "unexpected": unexpected, "mismatched": set()}
    model(torch.arange(8)[None])
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    tensors = runs.read_all(folder)
    for name in passed_over(tensors):
        if name.endswith(".k_scale"):
            module = name.removesuffix(".k_scale")
            scales = (tensors[f"{module}.{kind}_scale"].bfloat16().float() for kind in "kv")  # as the rest is loaded
            cache = RoundedCache(*scales)
            model.get_submodule(module).register_forward_pre_hook(cache.put, with_kwargs=True)
    return model


class RoundedCache:
    """What compressed-tensors puts in a cache's place, where it does not know the attention for one with a cache."""

    def __init__(self, k_scale: torch.Tensor, v_scale: torch.Tensor) -> None:
        self.scales = k_scale, v_scale

    def put(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "cache": self}

    def update(self, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        codes = (
            (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn) for x, scale in zip((k, v), self.scales, strict=True)
        )
        return tuple(code.float() * scale for code, scale in zip(codes, self.scales, strict=True))
