"""Every pair of scheme and dialect that transformers is said to load, as far as its libraries are installed here.

The embedded model cut to two blocks; random ones for what it cannot hold: whole tiles, and the experts of gpt-oss.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.quantizers import quantizer_finegrained_fp8, quantizer_mxfp4

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from tests import runs
from tests.consumers.pairs import LEFT_OUT, source
from tests.consumers.promised import EXPANDED, compared, expanded, ours, page, promised

BLOCKS = 2


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's first blocks."""
    folder = tmp_path_factory.mktemp("cut")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED / name).read_bytes())
    config = json.loads((EMBEDDED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": BLOCKS}))
    tensors = load_file(EMBEDDED / "model.safetensors")
    later = tuple(f"model.layers.{index}." for index in range(BLOCKS, config["num_hidden_layers"]))
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith(later)}, folder / "model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page(tmp_path_factory.mktemp("page") / "page.txt")


@pytest.mark.parametrize(("scheme", "dialect"), promised())
def test_it_loads_whole_and_has_our_perplexity(
    scheme: str, dialect: str, cut: Path, text: Path, tmp_path: Path
) -> None:
    ppl, theirs, close = compared(cut, scheme, dialect, text, tmp_path / "out")
    assert theirs == pytest.approx(ppl, rel=close)


@pytest.mark.parametrize(("model", "scheme", "dialect"), EXPANDED)
def test_it_expands_on_a_cpu(
    model: str, scheme: str, dialect: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own integrations: every key finds its place, weights are those that we decode, and inputs are left alone."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)  # none of it is used here
    monkeypatch.setattr(quantizer_mxfp4, "is_accelerate_available", lambda: True)
    output = tmp_path / "out"
    made = runs.run(source(model, tmp_path), output, scheme=scheme, dialect=dialect, exclude=LEFT_OUT.get(model, ()))
    assert "transformers" in made.report["dialect"]["reason"]
    loaded, theirs = expanded(output, text)
    checkpoint, state = Checkpoint(Source.open(str(output))), loaded.state_dict()
    for name, tensor in checkpoint.read_many(sorted(checkpoint.headers), torch.float32).items():
        assert torch.equal(state[name].float(), tensor), name
    assert theirs == pytest.approx(ours(output, text, weights_only=True), rel=0.001)
