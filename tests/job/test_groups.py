"""The rows of a plan's picture: nothing is counted twice or left out, and names say what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quarkcli.cli import picture
from quarkcli.disk.writer import tensor_bytes
from quarkcli.job.groups import groups
from quarkcli.job.run import EMBEDDED
from tests import runs

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
    assert rows["head", "kept bf16"].why.startswith("protected: small share of the bytes")
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
    assert "protected: a table that is looked up, not multiplied" in text
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
