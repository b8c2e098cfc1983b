"""Whole jobs on the demo model: a dialect beside its twin in compressed-tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from quarkcli.disk import verify
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.evaluation.run import evaluate
from quarkcli.events import silent
from tests import runs


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(Source.open(str(folder)))


def whole_job(dialect: str, scheme: str, folder: Path, loaders: set[str], source: Path | str = "demo") -> float:
    """quantize, verify, evaluate: the same codes and values as the twin, and servers that load it.

    Returns by how much its perplexity differs from the twin's, as a share of that.
    """
    text = runs.text_file(folder / "text.txt")
    data = runs.data(text, 4, 64) | {"kv_cache": "fp8"} if scheme in runs.CALIBRATED else {}
    made = runs.run(source, folder / "ours", scheme=scheme, dialect=dialect, **data)
    twin = runs.run(source, folder / "twin", scheme=scheme, dialect="compressed-tensors", **data)
    assert made.prepared.dialect.loaders(made.prepared.plan) == loaders
    said = verify.directory(str(made.folder), source=str(source) if source != "demo" else str(EMBEDDED))
    assert [line for line in said if "tensors of the original model are there" in line]
    ours, theirs = opened(made.folder), opened(twin.folder)
    assert ours.reader is not None and ours.reader.name == dialect
    assert set(ours.view.targets) == set(theirs.view.targets) and len(ours.view.targets) > 8
    for name, stored in ours.view.targets.items():
        one, two = ours.decode(stored), theirs.decode(theirs.view.targets[name])
        assert torch.equal(one.weight.codes.view(torch.uint8), two.weight.codes.view(torch.uint8))
        assert torch.allclose(ours.weight(name), theirs.weight(name), rtol=3e-7, atol=0)
        assert (one.input is None) == (two.input is None)
    assert set(ours.view.attention) == set(theirs.view.attention)
    losses = [evaluate(str(each.folder), max_tokens=300, device="cpu", tell=silent) for each in (made, twin)]
    difference: float = abs(losses[0]["perplexity"] / losses[1]["perplexity"] - 1)
    return difference
