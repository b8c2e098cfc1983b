"""Threads: how many there are, workers in order, and runs whose bytes do not depend on either."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli import threads
from quarkcli.cli.main import main
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import DataError
from quarkcli.job.fingerprint import fingerprint
from quarkcli.threads import Workers, limited
from tests import runs


@pytest.fixture(autouse=True)
def same_threads() -> Any:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


# ---- how many


@pytest.mark.parametrize(("asked", "count"), [("3", 3), ("2,1", 2), ("", 4), ("0", 4), ("many", 4), (None, 4)])
def test_the_default_is_what_is_asked_for_or_what_there_is(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, count: int
) -> None:
    monkeypatch.setattr(threads, "available", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads.default() == count


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "max 100000", "a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "600000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu.max": "nonsense"}, 8),
    ],
)
def test_limits_of_control_groups_and_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    own = tmp_path / "own"
    own.write_text("12:cpuset:/\n0::/a/b\n")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(threads, "_GROUPS", tmp_path)
    monkeypatch.setattr(threads, "_OWN", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert threads.available() == cores


@pytest.mark.parametrize(
    ("own", "found"), [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_wait_asleep_unless_the_user_says_how(
    monkeypatch: pytest.MonkeyPatch, own: dict[str, str], found: str | None
) -> None:
    monkeypatch.setattr(os, "environ", own)
    threads.wait_asleep()
    assert os.environ.get("GOMP_SPINCOUNT") == found


def test_limited_is_for_a_while() -> None:
    before = torch.get_num_threads()
    with limited(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# ---- workers


@pytest.fixture
def shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads work on weights of any size, as they do on those of a large model."""
    monkeypatch.setattr("quarkcli.threads.SMALL", 0)


def test_few_values_are_for_the_calling_thread() -> None:
    with Workers(2) as workers:
        assert workers.on(1 << 20) is workers
        assert (
            list(workers.on(1000).map(lambda _: threading.current_thread(), range(2))) == [threading.main_thread()] * 2
        )


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_order(count: int) -> None:
    def slow(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    with Workers(count) as workers:
        assert list(workers.map(slow, range(20))) == [number * number for number in range(20)]


def test_work_is_divided_and_items_are_taken_as_results_are() -> None:
    names, taken = set(), []

    def items() -> Any:
        for number in range(12):
            taken.append(number)
            yield number

    def call(number: int) -> int:
        names.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1
        time.sleep(0.01)
        return number

    with Workers(2) as workers:
        results = workers.map(call, items())
        assert next(results) == 0
        assert len(taken) <= 4
        assert list(results) == list(range(1, 12))
    assert len(names) == 2 and threading.current_thread().name not in names


def test_the_first_error_counts_and_nothing_runs_on() -> None:
    running: list[int] = []

    def call(number: int) -> int:
        running.append(number)
        time.sleep(0.02 if number == 1 else 0.0)
        if number in (1, 2):
            raise ValueError(number)
        running.remove(number)
        return number

    with Workers(3) as workers, pytest.raises(ValueError, match="1"):
        list(workers.map(call, range(50)))
    assert sorted(running) == [1, 2]


# ---- runs


def hashes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("scheme", ["nvfp4_weight_only", "mxfp4", "fp8_block128", "int4_wo_128", "uint4_wo_32"])
def test_bytes_do_not_depend_on_threads(tmp_path: Path, scheme: str, shared_out: None) -> None:
    made = [runs.run("demo", tmp_path / str(count), scheme=scheme, threads=count) for count in (1, 3)]
    assert hashes(made[0].folder) == hashes(made[1].folder)
    one, other = (dict(each.report["loss"]) for each in made)
    assert one == other
    assert [each.report["threads"] for each in made] == [1, 3]


def test_bytes_of_a_calibrated_run_do_not_depend_on_threads(tmp_path: Path, shared_out: None) -> None:
    """Static scales of inputs; weights are rounded and decoded by workers."""
    data = {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 32}
    made = [runs.run("demo", tmp_path / str(count), scheme="fp8", threads=count, **data) for count in (1, 2)]
    assert hashes(made[0].folder) == hashes(made[1].folder)


def test_a_run_may_go_on_with_another_number() -> None:
    prepared = [runs.prepare("demo", scheme="mxfp4", threads=count) for count in (1, 2)]
    assert fingerprint(prepared[0], None, "cpu") == fingerprint(prepared[1], None, "cpu")


@pytest.mark.parametrize("count", [1, 4])
def test_errors_name_the_first_tensor(tmp_path: Path, count: int, shared_out: None) -> None:
    """The same one whatever thread meets it, although later ones are bad too."""
    model = tmp_path / "model"
    model.mkdir()
    for path in EMBEDDED.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor for path in EMBEDDED.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for leaf in ("mlp.down_proj", "mlp.gate_proj", "self_attn.v_proj"):
        tensors[f"model.layers.1.{leaf}.weight"][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for scheme in ("nvfp4_weight_only", "mxfp4"):
        with pytest.raises(DataError, match=r"at \[3, 5\] is not finite") as caught:
            runs.run(model, tmp_path / scheme, scheme=scheme, threads=count)
        assert caught.value.where == "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("command", [("quantize", "--model", "demo", "--scheme", "mxfp4"), ("eval", "demo")])
def test_fewer_than_one_is_no_number_of_threads(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--threads", "0"]) == 2
    assert "--threads" in capsys.readouterr().err
