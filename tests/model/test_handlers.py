"""What handlers see is what independent hooks see on the model transformers loads, and what they return is used."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quarkcli.errors import DataError
from quarkcli.model import experts
from quarkcli.model.handlers import Handlers
from quarkcli.model.runner import Runner
from tests import tiny
from tests.model.drive import plain_logits, record, runner_of, through

DTYPES = (torch.float32, torch.bfloat16)


class Watch:
    """An expert handler that keeps what it sees."""

    def __init__(self) -> None:
        self.observed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.inputs: dict[int, torch.Tensor] = {}
        self.hidden: dict[int, torch.Tensor] = {}

    def observe(self, module: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor) -> None:
        self.observed.append((hidden, top_k_index))

    def gate_up_input(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        self.inputs[expert] = x
        return x

    def down_input(self, expert: int, h: torch.Tensor) -> torch.Tensor:
        self.hidden[expert] = h
        return h


def experts_of(runner: Runner, i: int) -> str:
    return next(name for name in runner.block_tensors(i) if runner.expert_module(name) is not None)


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "gptj"])
def test_linear_handlers_see_the_inputs_of_the_plain_model(family: str, tmp_path: Path) -> None:
    checkpoint = tiny.build(family, tmp_path)
    plain = checkpoint.plain()
    linears = [name for name, part in plain.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]
    expected: dict[str, torch.Tensor] = {}
    for name in linears:
        plain.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: expected.__setitem__(name, args[0].clone())
        )
    plain_logits(plain, tiny.tokens())
    seen: dict[str, torch.Tensor] = {}

    def around(runner: Runner, i: int) -> AbstractContextManager[None]:
        names = [f"{name}.weight" for name in linears if f"{name}.weight" in runner.block_tensors(i)]
        keep = {name: (lambda x, name=name: seen.__setitem__(name.removesuffix(".weight"), x)) for name in names}
        return runner.handlers(i, Handlers(linear=keep))

    through(runner_of(checkpoint), checkpoint, tiny.tokens(), around=around)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


def test_linear_handler_replaces_the_input(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    plain = checkpoint.plain()
    plain.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0].round(decimals=1),))

    def around(runner: Runner, i: int) -> AbstractContextManager[None]:
        coarse = {"model.layers.1.mlp.down_proj.weight": lambda x: x.round(decimals=1)}
        return runner.handlers(i, Handlers(linear=coarse if i == 1 else {}))

    got = through(runner_of(checkpoint), checkpoint, tiny.tokens(), around=around)
    assert torch.equal(got, plain_logits(plain, tiny.tokens()))


def test_head_input_can_be_seen_outside_the_blocks(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    runner, seen = runner_of(checkpoint), []
    runner.load_outside(checkpoint.tensors)
    recording = runner.record(tiny.tokens())
    with runner.handlers(None, Handlers(linear={"lm_head.weight": seen.append})):
        logits = runner.logits(recording, recording.hidden)
    assert torch.equal(F.linear(seen[0], checkpoint.tensors["lm_head.weight"]), logits)


def watching(runner: Runner, i: int) -> AbstractContextManager[None]:
    """Handlers that change nothing on the experts of block `i`, if it has some."""
    names = [name for name in runner.block_tensors(i) if runner.expert_module(name) is not None]
    return runner.handlers(i, Handlers(experts={name: Watch() for name in names[:1]}))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "dbrx", "nemotron_h"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_handled_experts_are_the_classes_own_forward_exactly(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = tiny.build(family, tmp_path, dtype)
    got = through(runner_of(checkpoint), checkpoint, tiny.tokens(), tiny.left_padding(), watching)
    assert torch.equal(got, plain_logits(checkpoint.plain(), tiny.tokens(), tiny.left_padding()))


def test_rows_of_zeros_behind_an_experts_rows_change_nothing(tmp_path: Path) -> None:
    """Experts get few numbers of rows to multiply, since a kernel is kept for each; what they return is the same."""
    checkpoint = tiny.build("qwen3_moe", tmp_path, torch.bfloat16)
    runner = runner_of(checkpoint)
    runner.load_block(0, checkpoint.tensors)
    name = experts_of(runner, 0)
    module = runner.expert_module(name)
    assert module is not None
    rows: set[int] = set()

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows.add(len(x))
        return linear(x, weight, bias)

    x = torch.randn(70, tiny.BASE["hidden_size"], generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = runner.expert_hidden(module, 0, x)
    linear = F.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", counted)
        for count in range(1, 70):
            assert torch.equal(runner.expert_hidden(module, 0, x[:count]), whole[:count])
    assert rows == {1, 32, 64, 96}


def test_handled_llama4_experts_skip_what_is_not_routed(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama4_text", tmp_path)
    got = through(runner_of(checkpoint), checkpoint, tiny.tokens(), around=watching)
    # Fewer rows per matmul than the class's own, so sums may be ordered otherwise.
    torch.testing.assert_close(got, plain_logits(checkpoint.plain(), tiny.tokens()), rtol=0, atol=2e-6)
    runner, watch = runner_of(checkpoint), Watch()
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(0, checkpoint.tensors)
    before = runner.run_block(0, recording, recording.hidden)
    runner.load_block(1, checkpoint.tensors)
    with runner.handlers(1, Handlers(experts={experts_of(runner, 1): watch})):
        runner.run_block(1, recording, before)
    [(hidden, index)] = watch.observed
    assert len(hidden) == len(index) == 2 * 24  # one expert per token
    plain, parts = checkpoint.plain(), []
    plain.model.layers[1].feed_forward.experts.register_forward_pre_hook(lambda module, args: parts.append(args[0]))
    plain_logits(plain, tiny.tokens())
    # Token by token, which is the order of masks.
    torch.testing.assert_close(hidden, parts[0].view(-1, 2 * 24, hidden.shape[-1]).sum(0))
    assert {e: len(rows) for e, rows in watch.inputs.items()} == dict(enumerate(torch.bincount(index[:, 0]).tolist()))


def test_expert_handler_sees_routing_and_gated_hidden(tmp_path: Path) -> None:
    checkpoint = tiny.build("qwen3_moe", tmp_path)
    runner, watch = runner_of(checkpoint), Watch()
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(0, checkpoint.tensors)
    with runner.handlers(0, Handlers(experts={experts_of(runner, 0): watch})):
        runner.run_block(0, recording, recording.hidden)
    plain, seen = checkpoint.plain(), {}
    plain.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(enumerate((*args, *kwargs.values()))), with_kwargs=True
    )
    plain_logits(plain, tiny.tokens())
    [(hidden, index)] = watch.observed
    assert torch.equal(hidden, seen[0])
    assert torch.equal(index, seen[1])
    assert sum(len(rows) for rows in watch.inputs.values()) == index.numel()
    for expert, rows in watch.inputs.items():
        # Routed rows, compared as a set: the loop goes by choice, then token.
        wanted = hidden[(index == expert).any(dim=1)]
        assert torch.equal(torch.unique(rows, dim=0), torch.unique(wanted, dim=0))
        gate, up = (
            checkpoint.tensors[f"model.layers.0.mlp.experts.{expert}.{which}_proj.weight"] for which in ("gate", "up")
        )
        # One fused matmul in the module, two here: summation order may differ.
        torch.testing.assert_close(watch.hidden[expert], F.silu(rows @ gate.T) * (rows @ up.T), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "dbrx"])
def test_expert_hidden_is_what_the_module_computes(family: str, tmp_path: Path) -> None:
    checkpoint = tiny.build(family, tmp_path)
    runner, watch = runner_of(checkpoint), Watch()
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(0, checkpoint.tensors)
    name = experts_of(runner, 0)
    with runner.handlers(0, Handlers(experts={name: watch})):
        runner.run_block(0, recording, recording.hidden)
    module = runner.expert_module(name)
    assert module is not None
    for expert, rows in watch.inputs.items():
        assert torch.equal(runner.expert_hidden(module, expert, rows), watch.hidden[expert])


def test_experts_without_flags_are_run_as_their_class_does() -> None:
    step = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    sizes = SimpleNamespace(num_local_experts=4, hidden_size=32, moe_intermediate_size=24, hidden_act="silu")
    module, watch = step.Step3p7Experts(sizes, swiglu_limit=0.1), Watch()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    hidden, index = torch.randn(9, 32, generator=generator), torch.randint(4, (9, 1), generator=generator)
    weights = torch.rand(9, 1, generator=generator)
    with torch.no_grad():
        expected = module(hidden, index, weights)
        with experts.handled(module, watch):
            torch.testing.assert_close(module(hidden, index, weights), expected)
    assert {expert: len(rows) for expert, rows in watch.inputs.items()} == dict(Counter(index.flatten().tolist()))


def test_gpt_oss_expert_hidden_follows_its_formula(tmp_path: Path) -> None:
    checkpoint = tiny.build("gpt_oss", tmp_path)
    runner = runner_of(checkpoint)
    runner.load_block(0, checkpoint.tensors)
    prefix = "model.layers.0.mlp.experts."
    module = runner.expert_module(prefix + "down_proj")
    assert module is not None
    x = 30 * torch.randn(7, 128, generator=torch.Generator().manual_seed(0))  # large enough to reach the clamps
    weight, bias = (checkpoint.tensors[prefix + name][2].double() for name in ("gate_up_proj", "gate_up_proj_bias"))
    both = x.double() @ weight + bias
    gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    wanted = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    assert bool((both.abs() > 7).any())
    torch.testing.assert_close(runner.expert_hidden(module, 2, x).double(), wanted, rtol=1e-4, atol=1e-4)


def test_expert_handler_changes_what_projections_read(tmp_path: Path) -> None:
    checkpoint = tiny.build("mixtral", tmp_path)
    runner = runner_of(checkpoint)
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(0, checkpoint.tensors)

    class Silence(Watch):
        def down_input(self, expert: int, h: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(h)

    outputs: list[torch.Tensor] = []
    hook = runner.expert_module(experts_of(runner, 0)).register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, output: outputs.append(output)
    )
    with runner.handlers(0, Handlers(experts={experts_of(runner, 0): Silence()})):
        runner.run_block(0, recording, recording.hidden)
    runner.run_block(0, recording, recording.hidden)
    hook.remove()
    assert not outputs[0].any()
    assert outputs[1].any()


def test_attention_tap_sees_rotated_keys_and_values(tmp_path: Path) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    checkpoint = tiny.build("llama", tmp_path)
    plain, projected, rotary = checkpoint.plain(), {}, {}
    attention = plain.model.layers[1].self_attn
    for which in ("q", "k", "v"):
        getattr(attention, which + "_proj").register_forward_hook(
            lambda module, args, output, which=which: projected.__setitem__(which, output)
        )
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: rotary.update(cos_sin=kwargs["position_embeddings"]), with_kwargs=True
    )
    expected = plain_logits(plain, tiny.tokens())
    heads = {which: t.view(2, 24, -1, 32).transpose(1, 2) for which, t in projected.items()}
    q, k = apply_rotary_pos_emb(heads["q"], heads["k"], *rotary["cos_sin"])
    seen: list[Any] = []

    def around(runner: Runner, i: int) -> AbstractContextManager[None]:
        taps = {"model.layers.1.self_attn.k_proj.weight": lambda *qkv: seen.append(qkv)} if i == 1 else {}
        return runner.handlers(i, Handlers(attention=taps))  # type: ignore[arg-type]

    assert torch.equal(through(runner_of(checkpoint), checkpoint, tiny.tokens(), around=around), expected)
    assert len(seen) == 1
    assert all(torch.equal(got, wanted) for got, wanted in zip(seen[0], (q, k, heads["v"]), strict=True))


# gemma2 and gpt_oss use eager attention by default, the others sdpa.
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])
def test_attention_tap_replaces_values(family: str, tmp_path: Path) -> None:
    checkpoint = tiny.build(family, tmp_path)
    runner = runner_of(checkpoint)
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(0, checkpoint.tensors)
    normal = runner.run_block(0, recording, recording.hidden)
    seen: list[torch.Tensor] = []
    prefix = "model.layers.0.self_attn."
    with runner.handlers(
        0,
        Handlers(
            linear={prefix + "o_proj.weight": seen.append},
            attention={prefix + "k_proj.weight": lambda q, k, v: (q, k, torch.zeros_like(v))},
        ),
    ):
        runner.run_block(0, recording, recording.hidden)
    assert len(seen) == 1
    assert not seen[0].any()
    assert torch.equal(runner.run_block(0, recording, recording.hidden), normal)


def test_only_the_named_attention_is_tapped(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    runner, other = runner_of(checkpoint), runner_of(checkpoint)
    calls: list[int] = []
    recording = record(other, checkpoint, tiny.tokens())
    other.load_block(0, checkpoint.tensors)
    with runner.handlers(
        0, Handlers(attention={"model.layers.0.self_attn.k_proj.weight": lambda *qkv: calls.append(1)})
    ):  # type: ignore[arg-type,return-value]
        other.run_block(0, recording, recording.hidden)
    assert calls == []


def test_attention_without_the_registry_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    calls: list[int] = []

    def around(runner: Runner, i: int) -> AbstractContextManager[None]:
        tap = {f"model.layers.{i}.self_attn.k_proj.weight": lambda *qkv: calls.append(1)}
        return runner.handlers(i, Handlers(attention=tap))  # type: ignore[arg-type]

    seen = through(runner_of(checkpoint), checkpoint, tiny.tokens(), around=around)
    assert calls
    calls.clear()
    tiny.hide_attention(monkeypatch)
    torch.testing.assert_close(through(runner_of(checkpoint), checkpoint, tiny.tokens(), around=around), seen)
    assert calls == []


def test_an_exception_restores_everything(tmp_path: Path) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    checkpoint = tiny.build("gpt_oss", tmp_path)
    runner = runner_of(checkpoint)
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(0, checkpoint.tensors)
    normal = runner.run_block(0, recording, recording.hidden)
    before = dict(ALL_ATTENTION_FUNCTIONS)

    class Broken(Watch):
        def down_input(self, expert: int, h: torch.Tensor) -> torch.Tensor:
            raise DataError("broken handler")

    with (
        pytest.raises(DataError, match="broken handler"),
        runner.handlers(
            0,
            Handlers(
                linear={"model.layers.0.self_attn.q_proj.weight": lambda x: x * 2},
                experts={experts_of(runner, 0): Broken()},
                attention={"model.layers.0.self_attn.k_proj.weight": lambda q, k, v: (q, k * 2, v)},
            ),
        ),
    ):
        runner.run_block(0, recording, recording.hidden)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert torch.equal(runner.run_block(0, recording, recording.hidden), normal)


def test_tensors_of_another_place_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny.build("qwen3_moe", tmp_path)
    runner = runner_of(checkpoint)
    for arguments in (
        {"linear": {"model.layers.1.self_attn.q_proj.weight": lambda x: None}},
        {"linear": {"no.such.weight": lambda x: None}},
        {"experts": {"model.layers.0.self_attn.q_proj.weight": Watch()}},
        {"attention": {"lm_head.weight": lambda q, k, v: None}},
    ):
        with pytest.raises(KeyError), runner.handlers(0, Handlers(**arguments)):  # type: ignore[arg-type]
            pass
    assert runner.expert_module("model.layers.0.self_attn.q_proj.weight") is None
