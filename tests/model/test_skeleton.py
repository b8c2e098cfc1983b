"""Which model is built, and the errors a user gets when none can be."""

from __future__ import annotations

import json
import logging
from logging.handlers import BufferingHandler
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers

from quarkcli.disk.checkpoint import LogicalHeader
from quarkcli.errors import DataError, ModelError
from quarkcli.model.library import quiet
from quarkcli.model.runner import Runner
from quarkcli.model.skeleton import build_skeleton
from tests import tiny
from tests.model.drive import plain_logits, runner_of, through

CUSTOM_CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class StrangeConfig(PreTrainedConfig):
    model_type = "strange"

    def __init__(self, hidden_size=16, num_hidden_layers=2, vocab_size=512, **kwargs):
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
        super().__init__(**kwargs)


class StrangeBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.register_buffer("scale", torch.arange(1, config.hidden_size + 1).float(), persistent=False)

    def forward(self, hidden):
        return hidden + torch.tanh(self.up(hidden * self.scale))


class StrangeForCausalLM(PreTrainedModel):
    config_class = StrangeConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(StrangeBlock(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutputWithPast(logits=self.head(hidden))
"""


def write_config(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def strange(folder: Path) -> tiny.Checkpoint:
    """A model that transformers does not know, with code of its own."""
    (folder / "modeling_strange.py").write_text(CUSTOM_CODE)
    code = "modeling_strange."
    auto_map = {"AutoConfig": code + "StrangeConfig", "AutoModelForCausalLM": code + "StrangeForCausalLM"}
    write_config(folder, model_type="strange", architectures=["StrangeForCausalLM"], auto_map=auto_map)
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (512, 16), "head.weight": (512, 16)}
    shapes |= {f"layers.{i}.up.weight": (16, 16) for i in range(2)}
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tiny.Checkpoint(folder, tensors)


def test_no_config_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        Runner(tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        Runner(tmp_path, {})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        Runner(tmp_path, {})


def test_unknown_model_type_points_to_data_free_schemes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'grok-1'") as error:
        Runner(write_config(tmp_path, model_type="grok-1", architectures=["Grok1ModelForCausalLM"]), {})
    assert "no calibration data" in error.value.hint
    assert error.value.where.endswith("config.json")


def test_model_that_cannot_be_built_is_a_model_error(tmp_path: Path) -> None:
    tiny.build("llama", tmp_path).patch_config(hidden_act="no_such_activation")
    with pytest.raises(ModelError, match="no_such_activation"):
        Runner(tmp_path, {})


def test_encoder_without_text_decoder_blocks_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        Runner(write_config(tmp_path, model_type="vit", architectures=["ViTModel"]), {})


def test_known_architecture_under_an_unknown_type(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    expected = plain_logits(checkpoint.plain(), tiny.tokens())
    checkpoint.patch_config(model_type="llama_of_a_vendor")
    assert torch.equal(through(runner_of(checkpoint), checkpoint, tiny.tokens()), expected)


def test_own_code_is_refused_without_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    checkpoint = strange(tmp_path)
    with pytest.raises(ModelError, match=r"modeling_strange\.py") as error:
        runner_of(checkpoint)
    assert "--trust-remote-code" in error.value.hint


def test_own_code_runs_with_the_flag_and_keeps_its_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    checkpoint = strange(tmp_path)
    runner = runner_of(checkpoint, trust_remote_code=True)
    assert all(parameter.is_meta for parameter in runner._skeleton.model.parameters())
    t = checkpoint.tensors
    hidden = t["embed.weight"][tiny.tokens()]
    for i in range(2):
        hidden = hidden + torch.tanh((hidden * torch.arange(1, 17).float()) @ t[f"layers.{i}.up.weight"].T)
    for _ in range(2):  # the second time after unloading
        got = through(runner, checkpoint, tiny.tokens())
        torch.testing.assert_close(got, hidden @ t["head.weight"].T, rtol=1e-5, atol=1e-5)


def test_quantization_config_and_attention_wishes_are_dropped(tmp_path: Path) -> None:
    checkpoint = tiny.build("qwen3", tmp_path)
    expected = plain_logits(checkpoint.plain(), tiny.tokens())
    checkpoint.patch_config(
        quantization_config={"quant_method": "fp8"}, attn_implementation="flash_attention_2", output_hidden_states=True
    )
    assert torch.equal(through(runner_of(checkpoint), checkpoint, tiny.tokens()), expected)


def test_dtype_falls_back_to_the_files(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path, torch.bfloat16).patch_config(dtype=None, torch_dtype=None)
    assert runner_of(checkpoint).dtype == torch.bfloat16
    assert build_skeleton(tmp_path, {}).dtype == torch.float32
    headers = {
        "a.bias": LogicalHeader("F32", (4,)),
        "b.weight": LogicalHeader("BF16", (64, 64)),
        "c": LogicalHeader("U8", (99, 99)),
    }
    assert build_skeleton(tmp_path, headers).dtype == torch.bfloat16  # most values, not the first tensor


def test_tokens_that_the_embedding_has_no_row_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(tiny.build("llama", tmp_path, vocab_size=64))
    runner.check_tokens(torch.tensor([[0, 63]]))
    with pytest.raises(DataError, match="the tokenizer gives token 64, but the model's embedding has only 64 rows"):
        runner.check_tokens(torch.tensor([[0, 64]]))

    def silent() -> None:
        raise NotImplementedError

    monkeypatch.setattr(runner._skeleton.model, "get_input_embeddings", silent)
    runner.check_tokens(torch.tensor([[0, 64]]))  # own code that does not say


def test_dtype_of_the_text_part(tmp_path: Path) -> None:
    """Where only the text model's config says it, servers compute in that."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99, "head_dim": 32}
    text = {"model_type": "gemma3_text", "intermediate_size": 64, "num_key_value_heads": 1, **sizes}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text | {"dtype": "bfloat16"},
        "vision_config": vision,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build_skeleton(tmp_path, {}).dtype == torch.bfloat16
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    assert build_skeleton(tmp_path, {}).dtype == torch.bfloat16  # no model computes in what it is stored in


def test_router_logits_in_the_config_do_not_break_recording(tmp_path: Path) -> None:
    checkpoint = tiny.build("qwen3_moe", tmp_path).patch_config(output_router_logits=True)
    runner = runner_of(checkpoint)
    runner.load_outside(checkpoint.tensors)
    assert runner.record(tiny.tokens()).last == 2


def test_dbrx_rotary_base_is_the_one_its_config_says(tmp_path: Path) -> None:
    tiny.build("dbrx", tmp_path, attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0})
    model = build_skeleton(tmp_path, {}).model
    assert model.config.rope_parameters["rope_theta"] == 500000.0


def test_quiet_gives_settings_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the caller shows everything that transformers logs, and hands it on."""
    shown = BufferingHandler(10)
    log, theirs = logging.getLogger("transformers"), logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(log, "handlers", [shown])
    monkeypatch.setattr(log, "propagate", True)
    before, offline = log.level, huggingface_hub.constants.HF_HUB_OFFLINE
    log.setLevel(logging.DEBUG)
    try:
        with pytest.raises(ValueError), quiet():
            theirs.critical("inside")
            assert not log.propagate and huggingface_hub.constants.HF_HUB_OFFLINE
            raise ValueError
        theirs.debug("outside")
    finally:
        log.setLevel(before)
    assert [record.getMessage() for record in shown.buffer] == ["outside"]
    assert log.propagate and offline == huggingface_hub.constants.HF_HUB_OFFLINE


def test_building_and_running_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny.build("gpt_oss", tmp_path)
    transformers.logging.set_verbosity_debug()
    capfd.readouterr()
    try:
        through(runner_of(checkpoint), checkpoint, tiny.tokens())
    finally:
        transformers.logging.set_verbosity_error()
    assert capfd.readouterr() == ("", "")
