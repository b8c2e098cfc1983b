"""The loop over blocks: the model's own results, and half the batch when memory runs out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from quarkcli.disk.source import Source
from quarkcli.errors import ModelError, ResourceError
from quarkcli.events import Event, Message
from quarkcli.forward import handed
from quarkcli.forward.lanes import CPU_TOKENS, default_batch
from quarkcli.forward.walk import SERVED, SOURCE, Walk
from quarkcli.model.handlers import Handlers
from quarkcli.model.runner import Runner
from tests import runs
from tests.families import models

ROWS = torch.randint(3, 256, (5, 32), generator=torch.Generator().manual_seed(0))


def walk_of(folder: Path, batch: int, *streams: str) -> tuple[Walk, Source]:
    source = Source.open(str(folder))
    runner = Runner(source.folder, source.headers)
    return Walk(
        runner, lambda: source.read_many(runner.outside_tensors()), ROWS, None, batch, lambda event: None,
        streams=streams or [SERVED],
    ), source  # fmt: skip


def test_a_whole_walk_is_the_model(tmp_path: Path) -> None:
    folder = runs.build("qwen3_moe", tmp_path / "m", torch.float32)
    walk, source = walk_of(folder, 2)
    walk.start()
    assert [len(part) for part in walk.served] == [2, 2, 1]
    for block in range(walk.runner.num_blocks):
        walk.runner.load_block(block, source.read_many(walk.runner.block_tensors(block)))
        walk.advance(block, Handlers())
        walk.runner.unload_block(block)
    walk.runner.load_outside(walk.outside())
    logits = torch.cat([walk.runner.logits(r, h) for r, h in zip(walk.recordings["served"], walk.served, strict=True)])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ROWS).logits, rtol=1e-4, atol=1e-5)


def test_batches() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert default_batch(cpu, 512, None) == default_batch(cpu, 512, 99) == CPU_TOKENS // 512
    assert default_batch(cpu, 10_000, None) == 1
    assert default_batch(gpu, 512, 3) == 3
    assert default_batch(gpu, 512, None) >= 1


class Tight:
    """A runner that has memory for `limit` rows; blocks add one."""

    def __init__(self, limit: int) -> None:
        self.device = torch.device("cpu")
        self.limit = limit
        self.calls: list[int] = []

    def load_outside(self, tensors: Any) -> None: ...

    def unload_outside(self) -> None: ...

    def record(self, rows: torch.Tensor, share_with: Any = None) -> Any:
        return SimpleNamespace(hidden=self._fit(rows.float()), tokens=rows, handed=dict, hand=dict)

    def handlers(self, block: int | None, handlers: Any) -> Any:
        return nullcontext()

    def turning(self, block: int, turns: Any) -> Any:
        return nullcontext()

    def run_block(self, block: int, recording: Any, hidden: torch.Tensor) -> torch.Tensor:
        assert torch.equal(recording.tokens.float() + block, hidden)  # recordings and hidden states stay in step
        self.calls.append(len(hidden))
        return self._fit(hidden) + 1

    def _fit(self, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) > self.limit:
            raise torch.OutOfMemoryError("no room")
        return hidden


class Seen:
    """Statistics that count rows."""

    def __init__(self) -> None:
        self.mask: Any = None
        self.masks: list[torch.Tensor] = []

    def handlers(self) -> Handlers:
        self.masks = []
        return Handlers()


def tight(limit: int, batch: int, rows: int = 8) -> tuple[Walk, Tight, list[str]]:
    runner, said = Tight(limit), []
    tokens = torch.arange(rows * 3).view(rows, 3)

    def tell(event: Event) -> None:
        if isinstance(event, Message):
            said.append(event.text)

    walk = Walk(runner, dict, tokens, tokens > 0, batch, tell)
    return walk, runner, said


def test_half_the_batch_until_it_fits() -> None:
    walk, _, said = tight(limit=2, batch=8)
    walk.start()
    assert walk.batch == 2
    assert [len(part) for part in walk.served] == [2, 2, 2, 2]
    assert [text.split(": ")[1] for text in said] == [
        "8 -> 4 sequences at a time",
        "4 -> 2 sequences at a time",
    ]


def test_out_of_memory_on_the_way_starts_the_block_again() -> None:
    walk, runner, said = tight(limit=8, batch=8)
    walk.start()
    walk.advance(0, Handlers())
    runner.limit = 3
    runner.calls.clear()
    walk.advance(1, Handlers())
    assert runner.calls == [8, 2, 2, 2, 2]  # four rows were too many to record already
    assert torch.equal(torch.cat(walk.served), walk.tokens.float() + 2)
    assert len(walk.masks()) == len(walk.served) == len(walk.recordings["served"]) == 4
    assert len(said) == 2
    statistics, first = walk.observe(2, Seen)
    assert len(first) == 2
    assert statistics.batch.mask is not None


def test_one_row_that_does_not_fit() -> None:
    walk, _, _ = tight(limit=0, batch=2)
    with pytest.raises(ResourceError, match="not enough GPU memory for one sequence of 3 tokens"):
        walk.start()


@pytest.mark.parametrize("name", ["gemma3n_text", "llama"])
def test_hidden_states_are_gone_on_with_in_other_batches(name: str, tmp_path: Path) -> None:
    """gemma3n has a stream axis before that of the rows."""
    folder = models.build(name, tmp_path / "m")
    (one, _), (other, _) = walk_of(folder, 2), walk_of(folder, 3)
    one.start()
    other.start()
    expected = other.served
    other.take(one.hidden)
    assert len(other.served) == len(expected) == 2
    assert all(torch.equal(*pair) for pair in zip(other.served, expected, strict=True))


def test_what_blocks_hand_on_is_a_streams_own(tmp_path: Path) -> None:
    """gemma4's last blocks read keys and values of earlier ones: in each stream its own, also in other batches."""
    folder = runs.build("gemma4_text", tmp_path / "m", torch.float32, num_hidden_layers=4)
    (walk, source), (other, _) = walk_of(folder, 2, SERVED, SOURCE), walk_of(folder, 3, SERVED, SOURCE)
    walk.start()
    for block in range(walk.runner.num_blocks):
        if block == 2:
            other.start()
            other.take(walk.hidden)
            stored = handed.flat(handed.collect(walk.recordings))
            assert len(stored) == 2 * 3 * 2 * 2  # streams, batches, kinds of blocks, keys and values
            handed.spread(handed.read([stored], [SERVED, SOURCE]), other.recordings)
            walk = other
        tensors = source.read_many(walk.runner.block_tensors(block))
        walk.runner.load_block(block, tensors)
        walk.observe(block, lambda: SimpleNamespace(handlers=Handlers, source_handlers=Handlers, batch=None))
        walk.observed()
        walk.runner.load_block(block, {name: tensor * 1.5 for name, tensor in tensors.items()})
        walk.advance(block, Handlers())
        walk.runner.unload_block(block)
    walk.runner.load_outside(walk.outside())
    rows = zip(walk.recordings[SOURCE], walk.hidden[SOURCE], strict=True)
    logits = torch.cat([walk.runner.logits(recording, hidden) for recording, hidden in rows])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ROWS).logits, rtol=1e-4, atol=1e-5)


def shaped(*shapes: tuple[tuple[int, int], tuple[int, ...]]) -> Walk:
    """A walk over recordings of tokens and hidden states of these shapes."""
    walk, _, _ = tight(limit=8, batch=2, rows=sum(rows for (rows, _), _ in shapes))
    walk.recordings["served"] = [SimpleNamespace(tokens=torch.zeros(t), hidden=torch.zeros(h)) for t, h in shapes]
    walk.hidden["served"] = [recording.hidden for recording in walk.recordings["served"]]
    return walk


def test_masks_lie_as_the_hidden_states_do() -> None:
    rows_first = shaped(((2, 3), (2, 3, 8)), ((1, 3), (1, 3, 8)))
    assert [tuple(mask.shape) for mask in rows_first.masks() if mask is not None] == [(2, 3), (1, 3)]
    tokens_first = shaped(((2, 3), (3, 2, 8)), ((1, 3), (3, 1, 8)))
    assert [tuple(mask.shape) for mask in tokens_first.masks() if mask is not None] == [(3, 2), (3, 1)]
    with pytest.raises(ModelError, match=r"hidden states of shape \[6, 8\] are rows and tokens"):
        shaped(((2, 3), (6, 8))).masks()


@pytest.mark.parametrize("few", [1, 3, None])
def test_a_probe_runs_the_first_rows(few: int | None, tmp_path: Path) -> None:
    """What it returns is what the block makes of these rows; it never takes more than the first batch has."""
    folder = runs.build("qwen3_moe", tmp_path / "m", torch.float32)
    source = Source.open(str(folder))
    runner = Runner(source.folder, source.headers)
    walk = Walk(runner, lambda: source.read_many(runner.outside_tensors()), ROWS, None, 2, lambda event: None, few=few)
    walk.start()
    for block in range(runner.num_blocks):
        runner.load_block(block, source.read_many(runner.block_tensors(block)))
        walk.observe(block, lambda: SimpleNamespace(handlers=Handlers, batch=None), advance=True)
        if few is None:  # then it goes by where the stream is
            walk._moved = {}
            probed = walk.probe(block, Handlers())
            walk.advance(block, Handlers())
        else:
            walk.observed()
            probed = walk.probe(block, Handlers())
        assert probed is not None
        torch.testing.assert_close(probed, walk.served[0][: few or 2][:2], rtol=1e-4, atol=1e-5)
        runner.unload_block(block)
