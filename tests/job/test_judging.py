"""What a run measures of itself: when, on which tokens, and that it says what `quark eval` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli.api.run import quantize
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import DataError, ModelError
from quarkcli.evaluation.run import evaluate
from quarkcli.events import silent
from quarkcli.forward import data
from quarkcli.job import judging
from quarkcli.job.options import Calibration, Options
from quarkcli.model.tokenizer import load_tokenizer
from quarkcli.reporting import losses
from tests import runs


def of(samples: int, seqlen: int, evaluate: bool | None = None) -> int:
    return judging.held_out(Options("demo", evaluate=evaluate), Calibration("builtin", samples, seqlen, False))


def test_a_run_measures_unasked_from_40960_calibration_tokens_on() -> None:
    assert of(80, 512) == of(160, 256) == 4096
    assert of(79, 512) == 0
    assert of(1, 16, evaluate=True) == 4096
    assert of(512, 512, evaluate=False) == 0


def test_rows_that_are_measured_on_are_no_calibration_rows() -> None:
    tokenizer = load_tokenizer(EMBEDDED, False)
    asked: dict[str, Any] = {"samples": 8, "seqlen": 64, "seed": 1}
    plain = data.load("builtin", tokenizer, **asked)
    with_held = data.load("builtin", tokenizer, **asked, held=1024)
    assert plain.digest == with_held.digest
    assert plain.held is None
    assert with_held.held is not None
    assert with_held.held.shape == (16, 64)
    both = torch.cat([with_held.tokens, with_held.held])
    assert len(torch.unique(both, dim=0)) == 24


def test_conversations_go_on_behind_those_of_calibration(tmp_path: Path) -> None:
    lines = [f'{{"messages": [{{"role": "user", "content": "{"number " * (n + 1)}"}}]}}' for n in range(12)]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines))
    tokenizer = load_tokenizer(EMBEDDED, False)
    tokenizer.use_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    found = data.load(str(path), tokenizer, samples=4, seqlen=16, seed=0, held=64)
    assert found.held is not None
    assert found.held_mask is not None
    assert len(found.tokens) == 4
    assert len(found.held) == 4
    assert int(found.held_mask.sum()) < found.held.numel()  # they are of any length, and padding is not scored


def test_nothing_left_is_an_error_where_it_was_asked_for(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words and no more of them, over and over. " * 40)
    asked = {"calib_data": str(text), "calib_samples": 64, "calib_seqlen": 64, "allow_short": True}
    with pytest.raises(DataError, match="calibration uses all rows, so none is left for the evaluation"):
        quantize("demo", "fp8", output=tmp_path / "out", evaluate=True, **asked)
    assert quantize("demo", "fp8", output=tmp_path / "out", **asked)["evaluation"] is None


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4"])
def test_it_says_what_quark_eval_says(scheme: str, tmp_path: Path) -> None:
    """Data-free runs are measured on the built-in text, as `quark eval` does by default."""
    few = {"calib_samples": 8, "calib_seqlen": 64} if scheme == "fp8" else {}
    report = quantize("demo", scheme, output=tmp_path / "out", evaluate=True, **few)
    found = report["evaluation"]
    assert found["tokens"] > 4000
    assert found["dtype"] == "bfloat16"
    assert 0 < found["kl"] < 0.2
    assert found["perplexity_increase"] == pytest.approx(found["perplexity"] / found["baseline_perplexity"] - 1)
    if scheme == "mxfp4":
        asked = {"max_tokens": 4096, "dtype": "bfloat16", "device": "cpu", "tell": silent}
        again = evaluate(str(tmp_path / "out"), baseline=str(EMBEDDED), **asked)
        for key in ("tokens", "perplexity", "baseline_perplexity", "kl", "top1_agreement"):
            assert found[key] == pytest.approx(again[key], rel=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"KL divergence {found['kl']:.4f} nats per token" in card


def test_a_model_without_a_head_is_a_warning_unless_it_was_asked_for(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "base")
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("lm_head.weight", None)
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, path, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(ModelError, match="the model has no head, so it gives no probabilities to measure"):
        quantize(source, "mxfp4", output=tmp_path / "out", evaluate=True)
    assert not (tmp_path / "out").exists()


def test_bars_are_as_high_as_the_largest_allows() -> None:
    assert losses.bars([1.0, 0.5, 0.0, 0.99]) == "█▅▁█"
    assert losses.bars([0.0, 0.0]) == "▁▁"
    many = losses.bars([0.1] * 119 + [1.0])
    assert len(many) == 40  # of three blocks the largest one
    assert many.endswith("▁█")


@pytest.mark.parametrize("field", ["output", "weight"])
def test_a_line_of_bars_for_the_blocks(field: str) -> None:
    errors = {f"layers.{layer}": 0.1 + layer for layer in range(94)}
    none = dict.fromkeys(("output_error", "weight_error"))
    parts = [{"layer": layer, **none, f"{field}_error": 0.1 + layer} for layer in range(94)]
    loss = {"output_errors": {}, "weight_errors": {}, f"{field}_errors": errors}
    report = {"evaluation": None, "loss": loss, "parts": [{"layer": None, **none}, *parts]}
    lines = {text.partition(": ")[0]: text for _, text in losses.rows(report)}
    bars = lines["by block"].removeprefix("by block: ").removesuffix(" (2 a bar)")
    assert len(bars) == 47 and bars == "".join(sorted(bars)) and (bars[0], bars[-1]) == ("▁", "█")
    assert len(lines["by block"]) <= 80 - 12
    one = losses.rows(report | {"parts": parts[:1]})
    assert not any("by block" in text for _, text in one)
