"""`quark plan --ranks --gpu --rates` and `quark env --measure`, as people and scripts see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quarkcli.cli.main import main
from quarkcli.job import rates
from tests.job.test_predict import ROUND

PLAN = ["plan", "--model", "demo", "--scheme", "int4_wo_128", "--algorithm", "gptq", "--calib-data", "builtin"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUARK_HOME", str(tmp_path / "home"))
    return tmp_path


def test_a_plan_says_the_time_here_and_where_the_rates_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PLAN) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("time ") and "on this machine" in line for line in lines)
    assert any(line.startswith("rates ") and "guess" in line for line in lines)
    assert not any(line.startswith("RANK") for line in lines)


def test_every_rank_of_a_table_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--ranks", "3", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "3 ranks, each on h100" in out
    table = out[out.index("\nRANK") :].splitlines()[1:]
    assert {"TIME", "HOST", "DEVICE", "DISK", "FORWARD", "MOMENTS", "SOLVE"} <= set(table[0].split())
    numbers = [line.split()[0] for line in table[1:]]
    assert numbers[0].startswith("0") and numbers[-1].endswith("2")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--ranks", "2", "--gpu", "mi300x", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["forecast"]
    assert found["device"] == "mi300x" and found["fits"] is True and found["device_memory"] == 192 * 10**9
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert found["seconds"] == max(rank["time"] for rank in found["ranks"])
    assert all(rank["device"] > 0 and rank["host"] > 0 and rank["disk"] > 0 for rank in found["ranks"])


def test_measured_rates_are_taken_and_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates.write(ROUND, home / "measured.json")
    assert main([*PLAN, "--rates", str(home / "measured.json")]) == 0
    assert "by hand" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--gpu", "h1000"], 2, "unknown device 'h1000'"),
        (["--ranks", "0"], 2, "--ranks"),
        (["--ranks", "many"], 2, "--ranks"),
        (["--gpu", "h100", "--rates", "x.json"], 2, "exclude each other"),
        (["--rates", "x.json"], 3, "x.json"),
    ],
)
def test_faults(argv: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, *argv]) == code
    assert said in capsys.readouterr().err


def test_a_device_to_measure_needs_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--device", "cpu"]) == 2
    assert "--measure" in capsys.readouterr().err
