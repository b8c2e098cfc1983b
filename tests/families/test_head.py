"""The head is not computed where nobody reads its logits; what blocks, tail and evaluation see is as with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from quarkcli.model import head as heads
from quarkcli.model import record
from quarkcli.model.runner import Runner
from tests import runs
from tests.families import models
from tests.families.test_remote_code import shipped

NAMES = tuple(models.RECIPES)
TOKENS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def recorded(source: Path, **options: Any) -> tuple[Runner, record.Recording]:
    tensors = runs.read_all(source)
    runner = Runner(source, models.headers(tensors), **options)
    runner.load_outside({name: tensors[name] for name in runner.outside_tensors()})
    return runner, runner.record(TOKENS)


@contextmanager
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of the weight of every linear product while inside."""
    rows: list[int] = []
    plain = functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        rows.append(weight.shape[0])
        return plain(x, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "linear", linear)
        yield rows


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, record.Call):
        return equal((one.args, one.kwargs, one.slot), (other.args, other.kwargs, other.slot))
    return type(one) is type(other)


def check(source: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    runner, without = recorded(source, **options)
    (head,) = heads.heads(runner._skeleton)
    width = head.weight.shape[0]
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with products(monkeypatch) as rows:
        runner.record(TOKENS)
        runner.observe_tail(without, without.hidden, head=False)
    assert width not in rows
    with products(monkeypatch) as rows:
        runner.observe_tail(without, without.hidden)
        logits = runner.logits(without, without.hidden)
    assert rows.count(width) >= 2
    hook.remove()
    assert seen[1].shape == seen[2].shape  # what the head reads is whole, with and without its product
    assert torch.equal(seen[1], seen[2])

    monkeypatch.setattr(record, "without_head", lambda skeleton: nullcontext())
    runner, plain = recorded(source, **options)
    assert equal(plain.hidden, without.hidden)
    assert equal(plain.calls, without.calls)
    assert torch.equal(runner.logits(plain, plain.hidden), logits)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_changes(name: str, built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    check(built[name], monkeypatch)


@pytest.mark.parametrize("file", ["qwen", "chatglm"])
def test_code_that_a_checkpoint_brings(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(shipped(file, tmp_path / "m"), monkeypatch, trust_remote_code=True)


@pytest.mark.parametrize(("unprotect", "heads_computed"), [([], 0), (["head"], 0)])
def test_a_whole_run_over_a_large_vocabulary(
    unprotect: list[str], heads_computed: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A static scale of the head's input is measured without its logits; outputs of a head need them."""
    vocabulary = 20_000
    source = runs.build("llama", tmp_path / "m", vocab_size=vocabulary)
    with products(monkeypatch) as rows:
        made = runs.run(source, tmp_path / "out", scheme="fp8", unprotect=unprotect, **runs.data(text, 8, 64))
    assert rows.count(vocabulary) == heads_computed
    scales = runs.read_all(made.folder)
    assert ("lm_head.input_scale" in scales) == bool(unprotect)
