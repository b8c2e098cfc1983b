"""Tiny models, written in the compressed-tensors dialect, loaded by transformers with its own code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from quarkcli import dialects
from quarkcli.dialects import _kinds as kinds
from quarkcli.numerics.quantize import dequantize, quantize, static_scale
from quarkcli.plan.model import Plan
from tests.consumers.loading import passed_over

from .plans import FP8, INT8_TOKEN, PAIRS, Module, linears, llama, moe, plan

CT = dialects.writer("compressed-tensors")
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=96, head_dim=16, **SMALL))
    elif kind == "qwen3_moe":
        sizes = {"intermediate_size": 96, "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=16, **sizes, **SMALL))
    else:
        sizes = {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}
        model = MixtralForCausalLM(MixtralConfig(**sizes, **SMALL))
    return model.to(torch.bfloat16)


def write(source: Path, folder: Path, made: Plan) -> dict[str, torch.Tensor]:
    """The checkpoint of `made` in `folder`; returns the dequantized weights by module name."""
    tensors = load_file(source / "model.safetensors")
    twins = {}
    for item in made.quantized():
        quantized = quantize(tensors.pop(f"{item.name}.weight"), item.weight)
        scale = static_scale(torch.tensor(4.0), item.input) if item.input and item.input.needs_amax else None
        tensors |= CT.tensors(item, quantized, {} if scale is None else {"input": scale})
        twins[item.name] = dequantize(quantized, item.weight)
    for module in made.attention.values():
        tensors |= CT.attention_tensors(module, {"k": torch.tensor(0.01), "v": torch.tensor(0.02)})
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CT.config(made)}))
    return twins


def by_role(module: Module):
    """fp8 attention with static inputs, int4 experts; routers, head and embedding as they are."""
    return PAIRS["int4-32"] if module.expert else linears(PAIRS["fp8"])(module)


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("llama", plan(llama(), linears(PAIRS["nvfp4"]), kv=FP8)),
        ("llama", plan(llama(), lambda m: None if m.role in ("embedding", "k", "q", "v") else PAIRS["int4-32"])),
        ("qwen3_moe", plan(moe(), linears(PAIRS["mxfp4"]))),
        ("mixtral", plan(moe(mixtral=True), by_role)),
        ("qwen3_moe", plan(moe(), linears((kinds.weight_spec("int3 group", "model", 32), INT8_TOKEN)))),
        ("llama", plan(llama(), linears((kinds.weight_spec("mxfp6_e2m3"), kinds.input_spec("mxfp8"))))),
        ("llama", plan(llama(), lambda m: None if m.role == "head" else (kinds.weight_spec("mxfp8"), None))),
    ],
    ids=[
        "llama-nvfp4-kv",
        "llama-int4-head",
        "qwen3_moe-mxfp4",
        "mixtral-fp8-int4",
        "qwen3_moe-int3-int8",
        "llama-mxfp6-mxfp8",
        "llama-mxfp8-embedding",
    ],
)
def test_every_key_finds_its_place_and_its_value(kind: str, made: Plan, tmp_path: Path) -> None:
    assert "transformers" in CT.loaders(made)
    tiny(kind).save_pretrained(tmp_path / "source", save_original_format=True)
    twins = write(tmp_path / "source", tmp_path / "out", made)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert info["unexpected_keys"] == passed_over(load_file(tmp_path / "out" / "model.safetensors"))
    model(torch.arange(20)[None])  # the first pass decompresses
    for name, wanted in twins.items():
        found = in_memory(model, name, made).float()
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
    if made.attention["model.layers.0.self_attn"].slots["k"].spec and not info["unexpected_keys"]:
        assert model.model.layers[1].self_attn.v_scale.item() == pytest.approx(0.02, rel=2**-7)


def in_memory(model: PreTrainedModel, name: str, made: Plan) -> torch.Tensor:
    """The weight of a module; experts are fused in memory, gate above up."""
    expert = made.targets[name].expert
    if expert is None:
        return model.get_submodule(name).weight
    experts = model.get_submodule(expert[0].replace("block_sparse_moe", "mlp"))
    gate_up, down = experts.gate_up_proj[expert[1]], experts.down_proj[expert[1]]
    half = gate_up.shape[0] // 2
    return {"gate": gate_up[:half], "up": gate_up[half:], "down": down}[made.targets[name].role.removeprefix("expert_")]
