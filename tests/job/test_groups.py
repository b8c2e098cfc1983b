"""The rows of a plan's picture: nothing is counted twice or left out, and names say what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quarkcli.cli import picture
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.writer import tensor_bytes
from quarkcli.job import bulk
from quarkcli.job.groups import groups, of_report
from tests import runs, tiny

CASES = [
    ("llama", {"scheme": "nvfp4", "kv_cache": "fp8", "calib_data": "builtin"}),
    ("qwen3_moe", {"recipe": "nvfp4_experts_only-kv_fp8", "calib_data": "builtin"}),
    ("gpt_oss", {"scheme": "mxfp4_weight_only", "dialect": "quark"}),
    ("mixtral", {"scheme": "int4_wo_32", "layers": ["*layers.0.*=fp8"], "calib_data": "builtin"}),
    ("nemotron_h", {"scheme": "mxfp4"}),
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=[family for family, _ in CASES])
def test_rows_hold_every_tensor_once(family: str, options: dict, tmp_path: Path) -> None:
    prepared = runs.prepare(runs.build(family, tmp_path / "m"), **options)
    found = groups(prepared)
    headers = prepared.weights.headers
    assert sum(row.before for row in found) == sum(tensor_bytes(h.dtype, h.shape) for h in headers.values())
    assert sum(row.after for row in found) == sum(prepared.forecast.dtypes.values())
    quantized = sum(target.numel for target in prepared.plan.quantized())
    assert sum(row.parameters for row in found if row.quantized) == quantized


def test_rows_are_named_as_people_name_them() -> None:
    prepared = runs.prepare("demo", scheme="int4_wo_64", exclude=["*o_proj"])
    rows = {(row.label, row.how): row for row in groups(prepared)}
    assert set(rows) == {
        ("mlp gate up down", "int4, groups of 64"),
        ("attention q k v", "int4, groups of 64"),
        ("attention o", "kept bf16"),
        ("embedding", "kept bf16"),
        ("head", "kept bf16"),
        ("norms", "kept bf16"),
    }
    assert rows["mlp gate up down", "int4, groups of 64"].why == "scheme int4_wo_64"
    assert rows["attention o", "kept bf16"].why == "--exclude '*o_proj'"
    assert rows["head", "kept bf16"].why.startswith("kept by default: has few of the bytes")
    assert rows["norms", "kept bf16"].why == "one value per channel"
    assert rows["norms", "kept bf16"].tensors == sum("norm" in name for name in runs.read_all(EMBEDDED)) == 9


@pytest.mark.parametrize("width", [40, 80, 100, 120, 200])
def test_the_picture_fits(width: int) -> None:
    """Names are never cut; where a line is longer than the terminal, it is one word or a row of figures."""
    prepared = runs.prepare("demo", scheme="nvfp4", kv_cache="fp8", calib_data="builtin", algorithm="auto")
    lines = picture.lines(prepared, None, width)
    text = " ".join(" ".join(lines).split())
    for row in groups(prepared):
        assert row.label in text
        assert row.how in text
    assert "kept by default: a table that is looked up, not multiplied" in text
    if width >= 80:
        assert max(map(len, lines)) <= width


def test_json_has_the_rows_and_every_slot_only_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    from quarkcli.cli import main

    answers = []
    for more in ([], ["--full"]):
        assert main.main(["plan", "--model", "demo", "--scheme", "mxfp4", "--json", *more]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["groups"] == answers[1]["groups"]
    assert sum(row["parameters"] for row in answers[0]["groups"]) == 1_836_160
    assert answers[1].keys() - answers[0].keys() == {"needs", "slots", "targets", "kept"}


def test_what_is_kept_is_said_where_it_is_most(tmp_path: Path) -> None:
    """An embedding that is tied to the head: 70 % of the parameters; what to type is tried before it is said."""
    prepared = runs.prepare(tiny.build("llama_tied", tmp_path / "m", vocab_size=8192).folder, scheme="int4_wo_128")
    head, *ways = bulk.remarks(prepared)
    embedding = next(row for row in groups(prepared) if row.name == "embedding")
    share = embedding.after / sum(row.after for row in groups(prepared))
    assert f"embedding {share:.0%} (70% of the parameters)" in head
    assert ways == ["--unprotect embedding: 13% of the original size instead of 74%; no known server loads that"]
    typed = runs.prepare(tmp_path / "m", scheme="int4_wo_128", unprotect=["embedding"])
    assert typed.forecast.output_bytes < 0.14 * typed.forecast.source_bytes


def test_what_may_be_typed_is_said_with_who_loads_it() -> None:
    lines = bulk.remarks(runs.prepare("demo", scheme="int4_wo_128"))
    assert any(line.startswith("--unprotect head: 47%") and "vLLM" in line for line in lines)
    light = [line for line in lines if "--layer model.embed_tokens=ptpc_fp8: 55%" in line]
    assert [line.rpartition("; ")[2] for line in light] == ["loaded by transformers 5.23"]
    assert bulk.remarks(runs.prepare("demo", scheme="int4_wo_128", unprotect=["head", "embedding"])) == []


def test_flags_that_change_nothing_are_not_proposed(tmp_path: Path) -> None:
    """A recipe of experts alone has nothing for the head, whatever protects it."""
    model = tiny.build("qwen3_moe", tmp_path / "m", vocab_size=8192).folder
    (line,) = bulk.remarks(runs.prepare(model, recipe="mxfp4_experts_only"))
    assert "embedding" in line and "head" in line


def test_the_table_of_a_finished_run(tmp_path: Path) -> None:
    made = runs.run("demo", tmp_path / "out", scheme="int4_wo_64")
    rows = of_report(made.report["tensors"], "error")
    planned = {(row.label, row.how): row.after for row in groups(runs.prepare("demo", scheme="int4_wo_64"))}
    assert {(row.label, row.how): row.after for row in rows} == planned
    assert all((row.error is not None) == row.quantized for row in rows)
    for width in (40, 80, 120):
        lines = picture.after(made.report, width)
        assert all(len(line) <= width for line in lines)
        text = " ".join(" ".join(lines).split())
        assert all(row.label in text and (not row.quantized or f"{row.error:.3g}" in text) for row in rows)
