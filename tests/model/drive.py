"""Driving a Runner through a whole model, the way a job does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from quarkcli.model.record import Recording
from quarkcli.model.runner import Runner
from tests.tiny import Checkpoint

Around = Callable[[Runner, int], AbstractContextManager[Any]]


def runner_of(checkpoint: Checkpoint, **arguments: Any) -> Runner:
    return Runner(checkpoint.folder, checkpoint.headers, **arguments)


def record(runner: Runner, checkpoint: Checkpoint, tokens: torch.Tensor, mask: Any = None) -> Recording:
    runner.load_outside(checkpoint.pick(runner.outside_tensors()))
    recording = runner.record(tokens, mask)
    runner.unload_outside()
    return recording


def through(
    runner: Runner,
    checkpoint: Checkpoint,
    tokens: torch.Tensor,
    mask: torch.Tensor | None = None,
    around: Around = lambda runner, i: nullcontext(),
) -> torch.Tensor:
    """Logits float32; one block is loaded at a time, each runs inside `around(runner, i)`."""
    recording = record(runner, checkpoint, tokens, mask)
    hidden = recording.hidden
    for i in range(runner.num_blocks):
        runner.load_block(i, checkpoint.pick(runner.block_tensors(i)))
        with around(runner, i):
            hidden = runner.run_block(i, recording, hidden)
        runner.unload_block(i)
    runner.load_outside(checkpoint.pick(runner.outside_tensors()))
    return runner.logits(recording, hidden)


def plain_logits(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float()
