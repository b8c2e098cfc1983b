"""report.json: every tensor, activation and part, the circumstances, and what is done so far."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from quarkcli.disk.writer import STATE
from quarkcli.documents.report import json_schema
from quarkcli.errors import ConfigError
from quarkcli.events import PartDone, silent
from quarkcli.forward.outliers import Outliers
from quarkcli.job import run as job
from quarkcli.reporting import reading, text
from quarkcli.reporting.run import Clock
from tests.reporting.conftest import report_of

SCHEMA = Path(__file__).resolve().parents[2] / "quarkcli" / "assets" / "report.schema.json"


@pytest.mark.parametrize("name", ["moe", "plain"])
def test_it_fits_its_schema(name: str, request: pytest.FixtureRequest) -> None:
    report = report_of(request.getfixturevalue(name))
    shipped = json.loads(SCHEMA.read_text())
    assert shipped == json_schema()
    jsonschema.Draft202012Validator.check_schema(shipped)
    jsonschema.validate(report, shipped)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report | {"tensors": [{"name": 1}]}, shipped)


def test_every_tensor_has_a_row(moe: Path) -> None:
    report = report_of(moe)
    rows = {row["name"]: row for row in report["tensors"]}
    assert len(rows) == len(report["tensors"])
    written = {}
    for file in moe.glob("*.safetensors"):
        written |= load_file(file)
    for name, row in rows.items():
        if row["fate"] == "kept":
            assert row["bytes"] == row["source_bytes"] == written[name].nbytes
        own = [tensor.nbytes for key, tensor in written.items() if key.rpartition(".")[0] == name]
        assert row["fate"] == "kept" or row["bytes"] == sum(own)
        assert row["bits"] == pytest.approx(8 * row["bytes"] / math.prod(row["shape"]), abs=1e-4)
    assert sum(row["bytes"] for row in rows.values()) == sum(tensor.nbytes for tensor in written.values())
    quantized = [row for row in rows.values() if row["fate"] == "quantized"]
    assert {row["name"] for row in quantized} == set(report["loss"]["weight_errors"])
    assert {row["expert"] for row in quantized} == {None, 0, 1, 2, 3}
    assert all(row["error"] > 0 and row["seconds"] > 0 and row["why"] == "scheme nvfp4" for row in quantized)
    solved = report["outcomes"]["weights"]
    for row in quantized:
        own = solved[row["name"]]
        share = own["after"] if own["held_after"] is None else own["held_after"]
        assert row["output_error"] == pytest.approx(math.sqrt(share))


def test_every_part_has_a_row(moe: Path) -> None:
    report = report_of(moe)
    assert [row["name"] for row in report["parts"]] == ["embed", "model.layers.0", "model.layers.1", "tail"]
    assert [row["layer"] for row in report["parts"]] == [None, 0, 1, None]
    files = sum(file.stat().st_size for file in moe.glob("*.safetensors"))
    assert sum(row["bytes"] for row in report["parts"]) == files == report["size"]["output_bytes"]
    assert sum(row["tensors"] for row in report["parts"]) == len(report["tensors"])
    for row in report["parts"]:
        assert row["done"] and row["seconds"] >= 0
        assert 0 < row["rss_bytes"] <= row["peak_rss_bytes"] <= report["peak_rss_bytes"]
        assert row["output_error"] == report["loss"]["output_errors"].get(row["name"])
    assert report["state"] == {"finished": True, "parts": 4, "of": 4}


def test_every_activation_that_was_measured_has_a_row(moe: Path, plain: Path) -> None:
    report = report_of(moe)
    found = {row["name"]: row for row in report["sites"]}
    assert {name.removeprefix("model.layers.0.") for name in found if ".0." in name} == {
        "self_attn.q_proj+k_proj+v_proj.input", "self_attn.o_proj.input",
        "mlp.experts.input", "mlp.experts.down_proj.input",
    }  # fmt: skip
    for row in found.values():
        values = list(row["quantiles"].values())
        assert list(row["quantiles"]) == ["0.5", "0.9", "0.99", "0.999"]
        assert values == sorted(values) and 0 < values[-1] <= row["absmax"]
        assert row["outlier_ratio"] >= 1 and row["layer"] in (0, 1)
    assert report_of(plain)["sites"] == []


def test_the_circumstances(moe: Path) -> None:
    run = report_of(moe)["run"]
    assert run["command"] == ["quark", "quantize", "--model", "<b>&'\""]
    # The CUDA build names itself 2.13.0+cu130, and its package 2.13.0.
    assert run["versions"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert run["started"] <= run["ended"] and run["host"]["ranks"] == 1 and run["host"]["cores"] >= 1
    assert [phase["name"] for phase in run["phases"]] == [
        "resolve", "check", "calibrate+quantize", "finalize", "evaluate", "verify",
    ]  # fmt: skip
    assert sum(phase["seconds"] for phase in run["phases"]) <= report_of(moe)["seconds"] + 0.1


def test_the_worst_tokens_and_the_drift(moe: Path) -> None:
    found = report_of(moe)["evaluation"]
    assert len(found["drift"]) == 2 and all(value > 0 for value in found["drift"])
    losses = [token["kl"] for token in found["worst_tokens"]]
    assert len(losses) == 20 and losses == sorted(losses, reverse=True) and losses[0] > found["kl"]
    assert all(token["token"] and token["expects"] and token["source_expects"] for token in found["worst_tokens"])


def test_what_is_told_of_an_activation() -> None:
    torch.manual_seed(0)
    x = torch.randn(48, 32)
    x[:, 5] *= 100
    seen, parts = Outliers(), [Outliers(), Outliers()]
    seen.observe(x)
    parts[0].observe(x[:20])
    parts[1].observe(x[20:].reshape(4, 7, 32))
    parts[0].merge(parts[1])
    assert parts[0].facts() == seen.facts()
    facts, channels = seen.facts(), x.abs().amax(0)
    assert facts["absmax"] == float(x.abs().max()) and facts["channels"] == 32
    assert facts["outlier_ratio"] == pytest.approx(float(channels.max() / channels.median()))
    for share, value in facts["quantiles"].items():
        exact = torch.quantile(x.abs().flatten(), float(share), interpolation="higher")
        assert value == pytest.approx(float(exact), rel=0.02)
    for limit in (0.5, 20.0):
        assert seen.share_below(limit) == pytest.approx(float((x.abs() < limit).float().mean()), abs=0.01)
    assert Outliers().facts() == {} and Outliers().share_below(1.0) == 0.0
    zero = Outliers()
    zero.observe(torch.zeros(3, 4))
    assert zero.facts() == {
        "absmax": 0.0, "quantiles": dict.fromkeys(("0.5", "0.9", "0.99", "0.999"), 0.0),
        "channels": 4, "outlier_ratio": None,
    }  # fmt: skip


def test_what_is_done_so_far(tmp_path: Path) -> None:
    """A run that is stopped inside: the report says how far it is, and equals the final one where it is done."""
    output, seen = tmp_path / "out", list[dict[str, Any]]()
    partial = tmp_path / "out.partial"

    def look(event: object) -> None:
        if isinstance(event, PartDone) and event.index == 3:
            seen.append(reading.read(partial))
            raise KeyboardInterrupt

    options = job.Options("demo", scheme="mxfp4", output=output, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        job.run(options, look)
    later = reading.read(partial)
    assert later["state"]["parts"] >= 3
    (so_far,) = seen
    assert so_far["state"] == {"finished": False, "parts": 3, "of": 6}
    assert [row["done"] for row in so_far["parts"]] == [True] * 3 + [False] * 3
    kept = (partial / STATE / "report.json").read_text()
    (partial / STATE / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        reading.read(partial)
    (partial / STATE / "report.json").write_text(kept)
    final = job.run(options, silent)
    done = {row["name"] for row in so_far["parts"] if row["done"]}
    for rows in ("tensors", "parts"):
        pairs = zip(so_far[rows], final[rows], strict=True)
        assert all(a == b for a, b in pairs if a.get("part", a["name"]) in done)
    assert so_far["loss"]["weight_errors"].items() < final["loss"]["weight_errors"].items()
    assert so_far["run"]["command"] is None and so_far["size"]["planned_bytes"] > so_far["size"]["output_bytes"]


def test_the_text_is_json_with_a_line_for_each_row(moe: Path) -> None:
    content = (moe / "quark" / "report.json").read_text(encoding="utf-8")
    report = json.loads(content)
    assert text.written(report) == content
    own = [line for line in content.splitlines() if line.startswith('    {"name"')]
    assert len(own) == sum(len(report[rows]) for rows in ("tensors", "parts", "sites"))


def test_phases_end_where_the_next_begins() -> None:
    clock = Clock()
    assert clock.facts(())["phases"] == [] and clock.facts(())["command"] is None
