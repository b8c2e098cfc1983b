"""Calibration on text that the model itself writes: whose it is, that it is the same again, and where it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from quarkcli.cli import picture
from quarkcli.disk import manifest
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import ResourceError, UsageError
from quarkcli.events import silent
from quarkcli.forward.group import Group
from quarkcli.job import authored, dividing, forecast
from quarkcli.job import rows as job_rows
from quarkcli.model import writing
from tests import runs

SELF = {"scheme": "fp8", "calib_data": "self", "calib_samples": 6, "calib_seqlen": 24}


@pytest.fixture(scope="module")
def prepared():
    return runs.prepare("demo", **SELF)


@pytest.fixture(scope="module")
def found(prepared):
    return job_rows.token_rows(prepared, silent)


def test_rows_are_the_models_own(found) -> None:
    """transformers' own class writes the same, and finds its text likelier than text with the words mixed up."""
    model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED)
    torch.manual_seed(0)
    again = model.generate(
        found.tokens[:, :1], attention_mask=torch.ones(6, 1), do_sample=True, top_k=0, max_length=24, min_length=24
    )
    assert torch.equal(again, found.tokens)
    assert len(set(found.tokens[:, 0].tolist())) == 6  # as many openings
    mixed = found.tokens[:, torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    own, other = (model(rows, labels=rows).loss.item() for rows in (found.tokens, mixed))
    assert own < other - 1


def test_the_seed_decides(prepared, found) -> None:
    assert job_rows.token_rows(prepared, silent).digest == found.digest
    other = job_rows.token_rows(runs.prepare("demo", **SELF, seed=1), silent)
    assert other.digest != found.digest
    assert other.tokens[:, 0].tolist() != found.tokens[:, 0].tolist()


def test_they_are_kept_hashed_and_read_as_data(tmp_path: Path, found, monkeypatch) -> None:
    made = runs.run("demo", tmp_path / "out", **SELF)
    assert made.report["calibration"]["digest"] == found.digest
    kept = json.loads((tmp_path / "out" / authored.FILE).read_text())
    assert [row["tokens"] for row in kept["rows"]] == found.tokens.tolist()
    listed = manifest.read(tmp_path / "out")
    assert listed is not None and authored.FILE in listed.files
    again = runs.prepare("demo", scheme="fp8", calib_data=str(tmp_path / "out" / authored.FILE), calib_samples=2,
                         calib_seqlen=12)  # fmt: skip
    assert job_rows.token_rows(again, silent).tokens.shape == (2, 12)


def test_a_run_goes_on_with_the_rows_that_are_there(tmp_path: Path, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise ResourceError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("quarkcli.job.finish.write_config", fails)
        with pytest.raises(ResourceError, match="stopped here"):
            runs.run("demo", tmp_path / "out", **SELF)
    monkeypatch.setattr(writing, "write", lambda *_: pytest.fail("written again"))
    made = runs.run("demo", tmp_path / "out", **SELF, resume="require")
    assert made.report["calibration"]["source"] == "self"


def test_a_model_that_does_not_fit_is_exit_6(prepared, monkeypatch) -> None:
    monkeypatch.setattr(authored, "_free", lambda device: 500_000_000)
    with pytest.raises(ResourceError, match="all of it fits into memory") as error:
        job_rows.token_rows(prepared, silent)
    assert (error.value.code, error.value.kind) == (6, "E-MEMORY")
    assert "builtin" in error.value.hint


def test_the_plan_says_what_the_whole_model_takes(prepared, monkeypatch, tmp_path) -> None:
    """All weights, 32 rows of keys and values, their scores, and the program; refused before a tensor is read."""
    config = json.loads((EMBEDDED / "config.json").read_text())
    weights = (EMBEDDED / "model.safetensors").stat().st_size
    wide = config["num_key_value_heads"] * config.get(
        "head_dim", config["hidden_size"] // config["num_attention_heads"]
    )
    cache = 2 * config["num_hidden_layers"] * wide * 24 * 32 * 2
    expected = weights + cache + 32 * 16 * config["vocab_size"] + forecast.RUNTIME_BYTES[True]
    assert prepared.forecast.whole_bytes == pytest.approx(expected, rel=0.01)
    assert prepared.forecast.memory_bytes >= prepared.forecast.whole_bytes
    assert "the whole model at once, which writes the text" in "\n".join(picture.lines(prepared, None, 200))
    assert runs.prepare("demo", **{**SELF, "calib_data": "builtin"}).forecast.whole_bytes == 0
    longer = runs.prepare("demo", **{**SELF, "calib_seqlen": 240}).forecast.whole_bytes
    assert longer - prepared.forecast.whole_bytes == 9 * cache
    names = {"num_key_value_heads": "num_kv_heads", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    renamed = {names.get(key, key): value for key, value in config.items()}
    assert authored.whole(renamed, prepared.weights.headers, 24) == prepared.forecast.whole_bytes
    monkeypatch.setattr(Source, "read_many", lambda *_: pytest.fail("a tensor is read"))
    with pytest.raises(ResourceError, match="all of it fits into memory") as error:
        runs.run("demo", tmp_path / "out", **SELF, max_cpu_mem=prepared.forecast.whole_bytes - 1)
    assert error.value.code == 6 and not list(tmp_path.iterdir())


def test_several_ranks_do_not_wait_for_it(prepared) -> None:
    group = SimpleNamespace(size=2, share=lambda value: value, is_main=True)
    with pytest.raises(
        UsageError,
        match="the model cannot write its own text with",
    ):
        dividing.check(prepared, group)  # type: ignore[arg-type]
    dividing.check(prepared, Group())
