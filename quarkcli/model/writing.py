"""Lets a whole model write text: it loads every part, and samples one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from quarkcli.errors import DataError, ModelError
from quarkcli.model.library import transformers
from quarkcli.model.runner import Runner


def load(runner: Runner, read: Callable[[Iterable[str]], Mapping[str, Tensor]]) -> None:
    """Loads every part of a model. `read`: tensors of the files by name."""
    runner.load_outside(read(runner.outside_tensors()))
    for block in range(runner.num_blocks):
        runner.load_block(block, read(runner.block_tensors(block)))


def write(
    runner: Runner, starts: list[list[int]], length: int, seed: int, batch: int, tell: Callable[[str], None]
) -> Tensor:
    """Returns rows of `length` tokens that begin with `starts`, which are of one length.

    Temperature 1, and no token is left out. What a loaded model
    writes depends on `seed` and `batch` alone, on one device. An end of text is followed by more.
    Raises ModelError for a class that cannot write, DataError where its scores are no numbers.
    """
    model = runner._skeleton.model
    if not runner.has_head or not hasattr(model, "generate"):
        raise ModelError(
            "the model's class cannot write text", hint="use --calib-data FILE, or builtin", kind="E-CLASS-FOLLOW"
        )
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=length, min_length=length, use_cache=True,
        pad_token_id=0,
    )  # fmt: skip
    rows = []
    devices = [runner.device] if runner.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), ExitStack() as stack:
        torch.manual_seed(seed)
        for block in range(runner.num_blocks):
            stack.enter_context(runner._experts(block))
        stack.enter_context(runner._skeleton.code.running("fails while it writes text"))
        for first in range(0, len(starts), batch):
            tell(f"writing rows {first + 1} to {min(first + batch, len(starts))} of {len(starts)}")
            begun = torch.tensor(starts[first : first + batch], device=runner.device)
            try:
                rows.append(model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=settings))
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise DataError(
                    "the model gives NaN or inf for the next token",
                    where="--calib-data self",
                    kind="E-NONFINITE-ACTIVATION",
                ) from error
    return torch.cat(rows).cpu()
