"""File tensors and parameters: complete, in expert order, in the shapes and dtypes transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quarkcli.errors import ModelError
from quarkcli.model import names
from tests import tiny
from tests.model.drive import plain_logits, runner_of, through


def fused(checkpoint: tiny.Checkpoint) -> tiny.Checkpoint:
    """Per-expert files rewritten in the stacked form that transformers has in memory."""
    state = checkpoint.plain().state_dict()
    stacked = [name for name in state if ".experts." in name]
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if ".experts." not in name}
    return checkpoint.rewrite(rest | {name: state[name].clone() for name in stacked})


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_file_tensor_is_found_once(family: str, tmp_path: Path) -> None:
    checkpoint = tiny.build(family, tmp_path)
    runner = runner_of(checkpoint)
    blocks = [runner.block_tensors(i) for i in range(runner.num_blocks)]
    found = [*runner.outside_tensors(), *(name for block in blocks for name in block)]
    assert sorted(found) == sorted(checkpoint.tensors)
    assert runner.unknown_tensors() == []


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3_moe", "mixtral", "gpt_oss", "gptj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_weights_and_buffers_are_transformers_own(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = tiny.build(family, tmp_path, dtype)
    runner = runner_of(checkpoint)
    runner.load_outside(checkpoint.tensors)
    for i in range(runner.num_blocks):
        runner.load_block(i, checkpoint.tensors)
    model, plain = runner._skeleton.model, checkpoint.plain()
    expected = dict(plain.named_parameters(remove_duplicate=False)) | dict(plain.named_buffers())
    got = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def test_twelve_experts_keep_their_order(tmp_path: Path) -> None:
    checkpoint = tiny.build("qwen3_moe", tmp_path, num_experts=12, num_hidden_layers=1)
    runner = runner_of(checkpoint)
    runner.load_block(0, checkpoint.tensors)
    module = runner.expert_module("model.layers.0.mlp.experts.10.up_proj.weight")
    assert module is not None
    assert runner.expert_count(module) == 12
    for expert in range(12):
        name = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(module.down_proj[expert], checkpoint.tensors[name])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_files_with_stacked_experts_give_the_same_model(family: str, tmp_path: Path) -> None:
    checkpoint = tiny.build(family, tmp_path)
    expected = plain_logits(checkpoint.plain(), tiny.tokens())
    stacked = fused(checkpoint)
    runner = runner_of(stacked)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in runner.block_tensors(0))
    assert torch.equal(through(runner, stacked, tiny.tokens()), expected)


def test_experts_one_by_one_fill_a_class_that_has_no_rule_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of such a class have fused experts, and quark writes one by one."""
    monkeypatch.setattr(names, "get_model_conversion_mapping", lambda model: [])
    checkpoint = tiny.build("qwen3_moe", tmp_path)
    runner = runner_of(checkpoint)
    assert torch.equal(through(runner, checkpoint, tiny.tokens()), plain_logits(checkpoint.plain(), tiny.tokens()))


def test_nothing_is_guessed_where_experts_lie_in_another_way(tmp_path: Path) -> None:
    checkpoint = tiny.build("gpt_oss", tmp_path)
    own = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.endswith("experts.down_proj")}
    single = {
        f"{name.removesuffix('.down_proj')}.{expert}.down_proj.weight": tensor[expert].T.contiguous()
        for name, tensor in checkpoint.tensors.items() if name.endswith("experts.down_proj")
        for expert in range(len(tensor))
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"no tensor in the files fills the parameters? model.layers.0.mlp.experts"):
        runner_of(checkpoint.rewrite(own | single)).load_block(0, own | single)


def test_multi_token_prediction_is_unknown_and_in_file_order(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    more = {f"mtp.layers.{i}.weight": torch.zeros(4, 4) for i in (1, 0)}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    checkpoint = tiny.Checkpoint(tmp_path, more | checkpoint.tensors)
    runner = runner_of(checkpoint)
    assert runner.unknown_tensors() == list(more)
    assert not set(more) & set(runner.block_tensors(0) + runner.outside_tensors())


def test_tied_head_needs_and_shares_the_embedding(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama_tied", tmp_path)
    assert "lm_head.weight" not in checkpoint.tensors
    runner = runner_of(checkpoint)
    for _ in range(2):  # also after unloading
        runner.load_outside(checkpoint.pick(runner.outside_tensors()))
        model = runner._skeleton.model
        assert model.lm_head.weight is model.model.embed_tokens.weight
        runner.unload_outside()
        assert model.lm_head.weight.is_meta
        assert model.model.rotary_emb.inv_freq.is_meta


def test_head_that_differs_from_the_embedding_is_not_tied(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path).patch_config(tie_word_embeddings=True)
    got = through(runner_of(checkpoint), checkpoint, tiny.tokens())
    assert torch.equal(got, plain_logits(checkpoint.plain(), tiny.tokens()))


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    left = {name: t for name, t in checkpoint.tensors.items() if "layers.1." not in name}
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight.* and 6 more"):
        runner_of(tiny.Checkpoint(tmp_path, left))


def test_missing_expert_is_an_error(tmp_path: Path) -> None:
    checkpoint = tiny.build("qwen3_moe", tmp_path)
    left = {name: t for name, t in checkpoint.tensors.items() if "layers.1.mlp.experts.2.up_proj" not in name}
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts"):
        runner_of(tiny.Checkpoint(tmp_path, left))


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    name = "model.layers.2.mlp.down_proj.weight"
    with pytest.raises(ModelError, match=r"down_proj.*\[128, 64\].*\[128, 256\]"):
        runner_of(tiny.Checkpoint(tmp_path, checkpoint.tensors | {name: torch.zeros(128, 64)}))


def test_block_that_is_given_too_little_says_what(tmp_path: Path) -> None:
    checkpoint = tiny.build("qwen3_moe", tmp_path)
    runner = runner_of(checkpoint)
    names = runner.block_tensors(0)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        runner.load_block(0, {name: checkpoint.tensors[name] for name in names if "q_proj" not in name})
    absent = "model.layers.0.mlp.experts.3.gate_proj.weight"
    with pytest.raises(ModelError, match=absent):
        runner.load_block(0, {name: checkpoint.tensors[name] for name in names if name != absent})


def test_part_of_a_loaded_block_can_be_replaced(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    runner = runner_of(checkpoint)
    runner.load_block(0, checkpoint.tensors)
    name = "model.layers.0.mlp.up_proj.weight"
    runner.load_block(0, {name: torch.ones(256, 128)})
    block = runner._skeleton.blocks[0]
    assert bool((block.mlp.up_proj.weight == 1).all())
    assert torch.equal(block.mlp.gate_proj.weight, checkpoint.tensors[name.replace("up_proj", "gate_proj")])
