"""Outputs of linears and softmax outputs: what is seen is what transformers computes, and what is returned is used."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quarkcli.model.handlers import Handlers
from quarkcli.model.runner import Runner
from tests import tiny
from tests.model.drive import plain_logits, record, runner_of, through

ATTENTION = "model.layers.1.self_attn."


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_output_handlers_see_what_modules_return(family: str, tmp_path: Path) -> None:
    checkpoint = tiny.build(family, tmp_path)
    plain, expected, seen = checkpoint.plain(), {}, {}
    linears = [name for name, part in plain.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]
    for name in linears:
        plain.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: expected.__setitem__(name, output.clone())
        )
    plain_logits(plain, tiny.tokens())

    def around(runner: Runner, i: int) -> AbstractContextManager[None]:
        names = [name for name in linears if f"{name}.weight" in runner.block_tensors(i)]
        keep = {f"{name}.weight": (lambda y, name=name: seen.__setitem__(name, y.clone())) for name in names}
        return runner.handlers(i, Handlers(outputs=keep))

    through(runner_of(checkpoint), checkpoint, tiny.tokens(), around=around)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


def test_output_handler_replaces_the_output(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    plain = checkpoint.plain()
    plain.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: output.round(decimals=1))

    def around(runner: Runner, i: int) -> AbstractContextManager[None]:
        coarse = {"model.layers.1.mlp.up_proj.weight": lambda y: y.round(decimals=1)}
        return runner.handlers(i, Handlers(outputs=coarse if i == 1 else {}))

    got = through(runner_of(checkpoint), checkpoint, tiny.tokens(), around=around)
    assert torch.equal(got, plain_logits(plain, tiny.tokens()))


def softmax_of(checkpoint: Any, **arguments: Any) -> tuple[list[torch.Tensor], list[Any]]:
    """Softmax outputs, and (q, k, v), of block 1 under `Runner(**arguments)`."""
    runner = runner_of(checkpoint, **arguments)
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(1, checkpoint.tensors)
    seen: list[torch.Tensor] = []
    operands: list[Any] = []
    tensor = f"{ATTENTION}k_proj.weight"
    with runner.handlers(
        1,
        Handlers(
            attention={tensor: lambda *qkv: operands.append(qkv)},
            softmax={tensor: lambda p: seen.append(p.clone())},
        ),
    ):
        runner.run_block(1, recording, recording.hidden)
    return seen, operands


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_softmax_tap_sees_the_formula_in_float64(family: str, tmp_path: Path) -> None:
    """softmax(q k^T / sqrt(d)) over the tokens up to one's own; two heads of q share one of k."""
    [p], [(q, k, _)] = softmax_of(tiny.build(family, tmp_path), eager=True)
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / q.shape[-1] ** 0.5
    later = torch.ones(24, 24).triu(1).bool()
    expected = scores.masked_fill(later, -torch.inf).softmax(-1)
    assert p.shape == (2, 4, 24, 24)
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-7)


def test_softmax_tap_sees_the_column_of_sinks(tmp_path: Path) -> None:
    [p], _ = softmax_of(tiny.build("gpt_oss", tmp_path), eager=True)
    assert p.shape[-1] == 24 + 1
    torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]))


def test_softmax_is_only_seen_in_eager_attention(tmp_path: Path) -> None:
    seen, operands = softmax_of(tiny.build("llama", tmp_path))
    assert seen == []
    assert len(operands) == 1


def test_eager_attention_is_the_eager_model_and_leaves_nothing_behind(tmp_path: Path) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    checkpoint = tiny.build("llama", tmp_path)
    before, calls = dict(ALL_ATTENTION_FUNCTIONS), []

    def around(runner: Runner, i: int) -> AbstractContextManager[None]:
        tensor = f"model.layers.{i}.self_attn.k_proj.weight"
        return runner.handlers(i, Handlers(softmax={tensor: lambda p: calls.append(1)}))

    got = through(runner_of(checkpoint, eager=True), checkpoint, tiny.tokens(), tiny.left_padding(), around)
    eager = checkpoint.plain(attn_implementation="eager")
    assert torch.equal(got, plain_logits(eager, tiny.tokens(), tiny.left_padding()))
    assert len(calls) == 3
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_softmax_tap_replaces_what_values_are_weighted_with(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    runner = runner_of(checkpoint, eager=True)
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(1, checkpoint.tensors)
    seen: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    tensor = f"{ATTENTION}k_proj.weight"
    with runner.handlers(
        1,
        Handlers(
            linear={f"{ATTENTION}o_proj.weight": seen.append},
            attention={tensor: lambda q, k, v: values.append(v)},  # type: ignore[func-returns-value]
            softmax={tensor: lambda p: torch.eye(24).expand_as(p)},
        ),
    ):
        runner.run_block(1, recording, recording.hidden)
    # Every token looks at itself alone, so that heads return their own values.
    own = values[0].repeat_interleave(2, dim=1).transpose(1, 2).reshape(2, 24, -1)
    torch.testing.assert_close(seen[0], own)


def test_softmax_elsewhere_is_not_touched(tmp_path: Path) -> None:
    """A router has a softmax of its own."""
    checkpoint = tiny.build("qwen3_moe", tmp_path)
    seen, _ = softmax_of(checkpoint, eager=True)
    assert [p.shape for p in seen] == [(2, 4, 24, 24)]


def test_tensors_of_another_place_are_refused(tmp_path: Path) -> None:
    runner = runner_of(tiny.build("llama", tmp_path))
    other = "model.layers.0.self_attn.k_proj.weight"
    for arguments in ({"outputs": {other: lambda y: None}}, {"softmax": {other: lambda p: None}}):
        with pytest.raises(KeyError), runner.handlers(1, Handlers(**arguments)):  # type: ignore[arg-type]
            pass
