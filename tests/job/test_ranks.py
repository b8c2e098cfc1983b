"""Several processes, as torchrun starts them: the bytes are those of one, and they end together."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.forks import Done, Forks, at
from tests.reports import lasting

ROWS = ("--calib-samples", "18", "--calib-seqlen", "128", "--device", "cpu")  # four lanes, of four and five rows
JOBS = {
    "mxfp4": ("--scheme", "mxfp4"),
    "nvfp4": ("--scheme", "nvfp4", *ROWS),
    "gptq": ("--scheme", "int4_wo_128", "--algorithm", "gptq", "--set", "gptq.balance=0.35", *ROWS),
    "awq": ("--scheme", "int4_wo_128", "--algorithm", "awq,gptq", "--set", "awq.n_grid=4", *ROWS),
    "gptaq": ("--scheme", "int4_wo_128", "--algorithm", "rotation,gptaq", *ROWS),
}
RECIPE = """schema: quark/recipe/1
metadata: {name: staged}
quantize:
  scheme: mxfp4
  algorithm: [{method: qronos, true_sequential: true}]
"""
OFTEN = [
    ("llama", "mxfp4", 2), ("llama", "nvfp4", 4), ("mixtral", "gptq", 2), ("llama", "awq", 3), ("llama", "gptaq", 2),
    ("llama", "sequential", 2),
]  # fmt: skip
SELDOM = [
    (model, job, size)
    for model in ("llama", "mixtral")
    for job in ("mxfp4", "nvfp4", "gptq", "awq", "gptaq", "sequential")
    for size in (2, 3, 4)
    if (model, job, size) not in OFTEN
]
SOON = 30.0  # seconds in which all ranks end once one has


class Launch:
    """Starts one process per rank; nobody watches over them but they themselves."""

    def __init__(self, forks: Forks, home: Path) -> None:
        self.forks, self.text, self.timeout = forks, runs.text_file(home / "t.txt", 60_000), 300.0

    def __call__(
        self, size: int, folder: Path, *argv: str, hooks: dict[int, dict[str, Any]] | None = None
    ) -> list[Done]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folders = [folder / f"rank{rank}" for rank in range(size)]
        for place in folders:
            place.mkdir(exist_ok=True)
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(size)]
        return self.forks.together(*argv, folders=folders, hooks=hooks or {}, env=env, timeout=self.timeout)

    def quantize(
        self,
        size: int,
        source: Path,
        output: Path,
        job: str,
        *more: str,
        hooks: dict[int, dict[str, Any]] | None = None,
    ) -> list[Done]:
        flags = list(JOBS.get(job, ()))
        if job == "sequential":
            recipe = output.with_suffix(".yaml")
            recipe.write_text(RECIPE)
            flags = ["--recipe", str(recipe), *ROWS]
        if job != "mxfp4":
            flags += ["--calib-data", str(self.text)]
        command = ("quantize", "--model", str(source), *flags, "-o", str(output), *more)
        return self(size, output.parent, *command, hooks=hooks)


@pytest.fixture(scope="module")
def launch(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(forks, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: runs.build(name, folder / name, num_hidden_layers=3) for name in ("llama", "mixtral")}


@pytest.fixture(scope="module")
def alone(launch: Launch, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Hashes of the files of one process."""
    folder, known = tmp_path_factory.mktemp("alone"), dict[tuple[str, str], dict[str, str]]()

    def hashes_of(model: str, job: str) -> dict[str, str]:
        if (model, job) not in known:
            output = folder / f"{model}-{job}"
            (done,) = launch.quantize(1, sources[model], output, job)
            assert done.code == 0, done.err
            known[model, job] = hashes(output)
        return known[model, job]

    return hashes_of


def hashes(folder: Path) -> dict[str, str]:
    """By name, of what a server reads, and of what the report says beside times and memory."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in {".safetensors", ".json"}]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    report = json.dumps(lasting(folder), sort_keys=True)
    for recipe in (f"{folder}.yaml", f"{folder.name}.yaml"):  # each run has its own
        report = report.replace(recipe, "recipe.yaml")
    return {**found, "report": hashlib.sha256(report.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("model", "job", "size"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM)]
)
def test_the_bytes_are_those_of_one(
    model: str, job: str, size: int, launch: Launch, sources: dict[str, Path], alone: Any, tmp_path: Path
) -> None:
    first, *others = launch.quantize(size, sources[model], tmp_path / "out", job)
    assert first.code == 0, first.err
    assert first.out == f"{tmp_path / 'out'}\n"
    assert [(done.code, done.out, done.err) for done in others] == [(0, "", "")] * (size - 1)
    assert hashes(tmp_path / "out") == alone(model, job)
    assert not list(tmp_path.glob("out.partial*"))


KILLS = {
    "mxfp4": at("quarkcli.disk.journal.Journal.finish", call=1, after=True),
    "nvfp4": at("quarkcli.disk.journal.Journal.write_hidden", call=2, after=True),
    "awq": at("quarkcli.job.part.PartWorker.advance", call=2),
}


@pytest.mark.parametrize(
    ("model", "job", "rank", "then"),
    [
        ("mixtral", "mxfp4", 1, 1),
        ("llama", "nvfp4", 1, 4),
        ("llama", "awq", 0, 2),
        pytest.param("llama", "nvfp4", 1, 1, marks=pytest.mark.slow),
        pytest.param("llama", "nvfp4", 1, 2, marks=pytest.mark.slow),
        pytest.param("llama", "nvfp4", 0, 4, marks=pytest.mark.slow),
        pytest.param("mixtral", "awq", 0, 2, marks=pytest.mark.slow),
        pytest.param("mixtral", "awq", 1, 2, marks=pytest.mark.slow),
        pytest.param("mixtral", "awq", 0, 4, marks=pytest.mark.slow),
    ],
)
def test_a_rank_is_killed_and_others_go_on_later(
    model: str, job: str, rank: int, then: int, launch: Launch, sources: dict[str, Path], alone: Any, tmp_path: Path
) -> None:
    """With any number of ranks, and the bytes of a run that nobody killed."""
    started = time.monotonic()
    done = launch.quantize(2, sources[model], tmp_path / "out", job, hooks={rank: KILLS[job]})
    assert time.monotonic() - started < SOON + 20  # with the work before the kill
    assert done[rank].code == -9
    other = done[1 - rank]
    assert other.code != 0, other.err
    if rank:
        assert "rank" in other.err and "internal error" not in other.err
    first, *_ = launch.quantize(then, sources[model], tmp_path / "out", job, "--resume", "require")
    assert first.code == 0, first.err
    assert "parts of the model are done" in first.err
    assert hashes(tmp_path / "out") == alone(model, job)


ANYWHERE = (
    "quarkcli.disk.journal.Journal.finish", "quarkcli.disk.journal.Journal.write_hidden",
    "quarkcli.disk.writer.write_part", "quarkcli.job.part.PartWorker.work", "quarkcli.job.part.PartWorker.advance",
    "quarkcli.job.ranks.Ranks.gather", "quarkcli.job.ranks.Ranks.share", "quarkcli.job.ranks.Ranks.pass_on",
    "quarkcli.forward.joining.join",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("model", "job"), [("llama", "nvfp4"), ("mixtral", "gptq"), ("mixtral", "awq")])
def test_a_rank_is_killed_anywhere_again_and_again(
    model: str, job: str, seed: int, launch: Launch, sources: dict[str, Path], alone: Any, tmp_path: Path
) -> None:
    """At a call that chance names, on a rank that chance names; then another number of ranks goes on."""
    chance = random.Random(f"{model} {job} {seed}")
    for _ in range(3):
        size = chance.choice((2, 3))
        rank, call = chance.randrange(size), chance.randint(1, 25)
        hooks = {rank: at(*ANYWHERE, call=call, after=chance.random() < 0.5)}
        done = launch.quantize(size, sources[model], tmp_path / "out", job, hooks=hooks)
        if done[0].code == 0:  # it ended before that call
            break
        assert done[rank].code in (-9, 6), done[rank].err  # 6: another one's end reached it first
        assert "internal error" not in "".join(one.err for one in done)
    if not (tmp_path / "out").exists():
        first, *_ = launch.quantize(chance.choice((1, 2, 4)), sources[model], tmp_path / "out", job)
        assert first.code == 0, first.err
    assert hashes(tmp_path / "out") == alone(model, job)


def test_a_fault_of_one_rank_ends_all_with_its_message(
    launch: Launch, sources: dict[str, Path], tmp_path: Path
) -> None:
    hooks = {1: at("quarkcli.job.part.PartWorker.advance", call=2, what="28")}
    first, second = launch.quantize(2, sources["llama"], tmp_path / "out", "nvfp4", hooks=hooks)
    assert second.code == first.code == 6
    assert "No space left" in second.err
    assert "error:" not in first.err.replace(second.err, "")


@pytest.mark.slow
def test_a_rank_that_falls_silent_ends_the_others(
    launch: Launch, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is there, and does nothing: no connection says so."""
    monkeypatch.setattr(launch, "timeout", 60.0)  # for the one that is stopped
    hooks = {1: at("quarkcli.job.part.PartWorker.advance", what="SIGSTOP")}
    first, second = launch.quantize(2, sources["llama"], tmp_path / "out", "nvfp4", hooks=hooks)
    assert (first.code, second.code) == (6, -9)
    assert "process 1 ended: it has not answered for 20 s" in first.err
    assert first.seconds < SOON + 15  # with the work before


def test_what_all_find_wrong_is_said_once(launch: Launch, sources: dict[str, Path], tmp_path: Path) -> None:
    first, second = launch.quantize(2, sources["llama"], tmp_path / "out", "mxfp4", "--exclude", "nothing_like_it*")
    assert (first.code, second.code) == (3, 3)
    assert "nothing_like_it" in first.err and second.err == ""
    first, second = launch(2, tmp_path, "quantize", "--no-such-flag")
    assert (first.code, second.code) == (2, 2)
    assert "no-such-flag" in first.err and second.err == ""
    assert not list(tmp_path.glob("out*"))


def test_what_cannot_be_shared_is_refused(launch: Launch, sources: dict[str, Path], tmp_path: Path) -> None:
    first, second = launch(2, tmp_path, "eval", str(sources["llama"]))
    assert (first.code, second.code) == (2, 2)
    assert (
        "'eval' runs in one process, and torchrun started" in first.err
        and "quark eval" in first.err
        and second.err == ""
    )
    flags = ("--algorithm", "rtn,autoround", "--model", str(sources["llama"]), "--scheme", "int4_wo_128")
    more = ("--calib-data", str(launch.text), *ROWS, "-o", str(tmp_path / "out"))
    first, second = launch(2, tmp_path, "quantize", *flags, *more)
    assert (first.code, second.code) == (2, 2)
    assert "autoround" in first.err and "without torchrun" in first.err and second.err == ""
    assert not list(tmp_path.glob("out*"))


def test_ranks_that_are_not_alike_are_refused(
    launch: Launch, sources: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each rank's own folder stands for its machine: another model there, or an output that is nobody else's."""
    for rank, name in enumerate(("llama", "mixtral")):
        (tmp_path / f"rank{rank}").mkdir()
        (tmp_path / f"rank{rank}" / "model").symlink_to(sources[name])
    first, second = launch(
        2, tmp_path, "quantize", "--model", "model", "--scheme", "mxfp4", "-o", str(tmp_path / "out")
    )
    assert first.code == second.code == 2
    assert "and process 0 has" in second.err and "error:" not in first.err
    first, second = launch(2, tmp_path, "quantize", "--model", str(sources["llama"]), "--scheme", "mxfp4", "-o", "out")
    assert first.code == second.code == 6
    assert "file system that all machines share" in second.err
    assert not (tmp_path / "rank1" / "out.partial").exists()


def test_a_time_budget_stops_all_and_the_rest_is_done_later(
    launch: Launch, sources: dict[str, Path], alone: Any, tmp_path: Path
) -> None:
    slowly = {0: at("quarkcli.disk.journal.Journal.finish", call=0, what="1.1")}
    flags = ("--time-budget", "1s")
    first, second = launch.quantize(2, sources["llama"], tmp_path / "out", "nvfp4", *flags, hooks=slowly)
    assert (first.code, second.code) == (75, 75)
    assert second.err == ""
    first, second = launch.quantize(2, sources["llama"], tmp_path / "out", "nvfp4", "--resume", "require")
    assert (first.code, second.code) == (0, 0), first.err
    assert hashes(tmp_path / "out") == alone("llama", "nvfp4")
