"""`make bench-gpu` and `make test-gpu` without a GPU: the same scripts at sizes that measure nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs import gpu
from tests.gpu import record

ROOT = Path(__file__).resolve().parents[2]


def script(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = script("tests.bench.gpu", "--device", "cpu", "--small", "--out", str(out), "--seconds", "300")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_everything_is_measured(measured: dict[str, Any]) -> None:
    bench = measured["bench"]
    assert bench["left_out"] == [] and bench["errors"] == {}
    assert bench["equal"] and all(bench["equal"].values())
    assert bench["bandwidth"]["copy"] > 0
    assert all(share > 0 for shares in bench["bandwidth"]["shares"].values() for share in shares.values())
    assert bench["data_free"]["whole"] and bench["data_free"]["rate"] > 0
    assert bench["gptq"]["whole"] and bench["gptq"]["block_seconds"] > bench["gptq"]["floor"] > 0
    assert bench["gptq"]["forecast_device"] > 0


def test_the_page_shows_it(measured: dict[str, Any]) -> None:
    text = "\n".join(gpu.lines(measured))
    assert "measure nothing" in text
    assert "| mxfp4-even | equal |" in text
    assert "| nvfp4 weights, data-free |" in text and "| int4 g128, gptq, 32 x 2048 |" in text


def test_what_is_wrong_shows(measured: dict[str, Any]) -> None:
    bench = {**measured["bench"], "equal": {"nvfp4": False}, "left_out": ["gptq"], "errors": {"data_free": "it broke"}}
    del bench["gptq"]
    tests = {
        "device": "a",
        "torch": "b",
        "in_time": True,
        "seconds": 3.0,
        "passed": 1,
        "skipped": 0,
        "failed": ["x::y"],
    }
    text = "\n".join(gpu.lines({"bench": bench, "tests": tests}))
    assert "| nvfp4 | **not equal** |" in text and "no time for: gptq" in text and "failed: x::y" in text
    assert "Failed: data_free: it broke" in text
    late = "\n".join(gpu.lines({"tests": {"device": "a", "in_time": False, "seconds": 450.0}}))
    assert "not done after 450 s" in late


def test_a_step_that_fails_takes_no_other_along(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench import gpu as bench

    def broken(*given: Any) -> Any:
        raise RuntimeError("no room")

    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(bench, "equal_to_reference", broken)
    monkeypatch.setattr(bench, "bandwidth", lambda *given: {"copy": 1.0, "shares": {}})
    monkeypatch.setattr(bench, "data_free", lambda *given: {})
    monkeypatch.setattr(bench, "gptq", lambda *given: {})
    found = bench.measure("cpu", True, 100.0, lambda found: saved.append(dict(found)))
    assert found["errors"] == {"equal": "RuntimeError: no room"} and found["bandwidth"]["copy"] == 1.0
    assert len(saved) == 4
    none = bench.measure("cpu", True, 0.0, saved.append)
    assert none["left_out"] == ["equal", "bandwidth", "data_free", "gptq"]


def test_the_page_is_up_to_date() -> None:
    text = gpu.PAGE.read_text(encoding="utf-8")
    assert gpu.page(text, record.GPU) == text


def test_without_a_file_the_page_says_that_no_device_was_lent(tmp_path: Path) -> None:
    text = gpu.page(gpu.PAGE.read_text(encoding="utf-8"), tmp_path / "none.json")
    assert "Nothing has been run on a GPU" in text


def test_results_of_both_scripts_lie_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    record.keep(file, "bench", {"a": 1})
    record.keep(file, "tests", {"b": 2})
    record.keep(file, "bench", {"a": 3})
    assert json.loads(file.read_text()) == {"bench": {"a": 3}, "tests": {"b": 2}}


def test_tests_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip\ndef test_none(): pass\n"
    )
    found = record.run([str(tmp_path / "test_it.py"), "-p", "no:cacheprovider", "--rootdir", str(tmp_path)], 100)
    assert (found["code"], found["passed"], found["skipped"], len(found["failed"])) == (1, 1, 1, 1)
    assert found["failed"][0].endswith("::test_bad")


def test_tests_that_take_too_long_are_ended(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import time\ndef test_slow(): time.sleep(60)\n")
    found = record.run([str(tmp_path / "test_it.py"), "-p", "no:cacheprovider", "--rootdir", str(tmp_path)], 2)
    assert found["in_time"] is False and found["seconds"] < 30
