"""Recording and replaying block by block gives the logits of transformers' own forward, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from quarkcli.errors import ModelError
from quarkcli.model.record import Form
from tests import tiny
from tests.model.drive import plain_logits, record, runner_of, through

FAMILIES = sorted(tiny.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_replay_is_the_plain_forward(family: str, tmp_path: Path) -> None:
    checkpoint = tiny.build(family, tmp_path)
    got = through(runner_of(checkpoint), checkpoint, tiny.tokens())
    assert torch.equal(got, plain_logits(checkpoint.plain(), tiny.tokens()))


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_replay_with_padding_is_the_plain_forward(family: str, tmp_path: Path) -> None:
    checkpoint = tiny.build(family, tmp_path, torch.bfloat16)
    got = through(runner_of(checkpoint), checkpoint, tiny.tokens(), tiny.left_padding())
    assert got.dtype == torch.float32
    assert torch.equal(got, plain_logits(checkpoint.plain(), tiny.tokens(), tiny.left_padding()))


def test_dtype_override_computes_in_it(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path, torch.bfloat16)
    runner = runner_of(checkpoint, dtype=torch.float32)
    assert runner.dtype == torch.float32
    got = through(runner, checkpoint, tiny.tokens())
    assert torch.equal(got, plain_logits(checkpoint.plain(dtype=torch.float32), tiny.tokens()))


def test_several_batches_replay_block_by_block(tmp_path: Path) -> None:
    checkpoint = tiny.build("gemma2", tmp_path)
    runner = runner_of(checkpoint)
    batches = [tiny.tokens(seed=1), tiny.tokens(rows=1, seed=2)]
    runner.load_outside(checkpoint.tensors)
    recordings = [runner.record(batch) for batch in batches]
    states = [recording.hidden for recording in recordings]
    for i in range(runner.num_blocks):
        runner.load_block(i, checkpoint.tensors)
        states = [runner.run_block(i, one, hidden) for one, hidden in zip(recordings, states, strict=True)]
    plain = checkpoint.plain()
    for batch, recording, hidden in zip(batches, recordings, states, strict=True):
        assert torch.equal(runner.logits(recording, hidden), plain_logits(plain, batch))


def test_equal_arguments_of_batches_are_stored_once(tmp_path: Path) -> None:
    checkpoint = tiny.build("gemma2", tmp_path)
    runner = runner_of(checkpoint)
    runner.load_outside(checkpoint.tensors)
    first = runner.record(tiny.tokens(seed=1))
    same = runner.record(tiny.tokens(seed=2), share_with=first)
    shorter = runner.record(tiny.tokens(length=10), share_with=first)

    def tensors(recording: object) -> set[int]:
        calls = [call for call in recording.calls if call is not None]  # type: ignore[attr-defined]
        values = [value for call in calls for value in (*call.args, *call.kwargs.values())]
        flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
        return {item.data_ptr() for item in flat if isinstance(item, torch.Tensor)}

    assert tensors(first)
    assert tensors(same) == tensors(first)
    assert not tensors(shorter) & tensors(first)


def test_hidden_states_of_the_caller_stay(tmp_path: Path) -> None:
    checkpoint = tiny.build("qwen3", tmp_path)
    runner = runner_of(checkpoint)
    recording = record(runner, checkpoint, tiny.tokens())
    before = recording.hidden.clone()
    runner.load_block(0, checkpoint.tensors)
    once = runner.run_block(0, recording, recording.hidden)
    assert torch.equal(recording.hidden, before)
    assert torch.equal(runner.run_block(0, recording, recording.hidden), once)


def test_nothing_needs_a_gradient_and_random_state_stays(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    state = torch.get_rng_state()
    runner = runner_of(checkpoint)
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(0, checkpoint.tensors)
    assert not runner.run_block(0, recording, recording.hidden).requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_inference_mode_of_the_caller_is_fine(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    with torch.inference_mode():
        got = through(runner_of(checkpoint), checkpoint, tiny.tokens())
    assert torch.equal(got, plain_logits(checkpoint.plain(), tiny.tokens()))


def test_glue_that_changes_hidden_states_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    runner = runner_of(checkpoint)
    runner.load_outside(checkpoint.tensors)
    decoder = runner._skeleton.model.model
    plain = type(decoder).forward

    def forward(*args: object, **kwargs: object) -> object:
        """A model that doubles the hidden states in front of its second block."""
        second = decoder.layers[1]
        run = second.forward
        second.__dict__["forward"] = lambda hidden, *rest, **named: run(hidden * 2, *rest, **named)
        return plain(decoder, *args, **kwargs)

    decoder.__dict__["forward"] = forward
    with pytest.raises(ModelError, match="between decoder blocks 0 and 1"):
        runner.record(tiny.tokens())


class Shift(NamedTuple):
    """What some models' code hands to its blocks."""

    by: torch.Tensor
    names: list[torch.Tensor]


def test_forms_are_learned_with_named_tuples(tmp_path: Path) -> None:
    runner = runner_of(tiny.build("llama", tmp_path))

    class Block(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, shift: Shift) -> tuple[torch.Tensor, None]:
            assert type(shift) is Shift and hidden.is_meta and shift.names[0].is_meta
            return hidden + shift.by, None

    given = Shift(torch.ones(1), [torch.ones(2)])
    assert runner._recorder.learn_form(Block(), (torch.ones(2, 1), given), {}) == Form(2, (1,))
    assert torch.equal(given.names[0], torch.ones(2))


def test_block_form_that_recording_got_wrong_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny.build("llama", tmp_path)
    runner = runner_of(checkpoint)
    recording = record(runner, checkpoint, tiny.tokens())
    runner.load_block(0, checkpoint.tensors)
    block = runner._skeleton.blocks[0]
    run = block.forward
    block.__dict__["forward"] = lambda *args, **kwargs: (run(*args, **kwargs), None)
    with pytest.raises(ModelError, match="tuple of 2"):
        runner.run_block(0, recording, recording.hidden)
