"""journal.py: resume, mismatches, locks, and kills at every step of the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli.disk.journal import Journal
from quarkcli.disk.writer import write_part
from quarkcli.errors import ConfigError, ResourceError, UsageError

FINGERPRINT: dict[str, Any] = {"seed": 0, "recipe": {"entries": [{"path": "*"}, {"path": "*head*"}]}, "rows": ()}


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "out.partial"


def value(index: int) -> dict[str, torch.Tensor]:
    hidden = torch.full((2, 3), index, dtype=torch.bfloat16)
    return {"hidden": hidden, "position": torch.tensor([index]), "f": torch.zeros(2)}


def work(journal: Journal, index: int, *, hidden: bool = True) -> None:
    """Write and finish part `block-<index>`."""
    written = write_part(journal._partial, f"block-{index}", {"w": torch.full((4,), float(index))})
    record = {"files": [file.record() for file in written], "error": index / 8}
    journal.finish(f"block-{index}", record, value(index) if hidden else None)


def run(partial: Path, *indices: int, hidden: bool = True) -> None:
    with Journal.open(partial, FINGERPRINT) as journal:
        for index in indices:
            work(journal, index, hidden=hidden)


def files(partial: Path) -> list[str]:
    return sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())


def check_hidden(journal: Journal, index: int) -> None:
    hidden = journal.hidden()
    assert hidden is not None
    assert hidden.keys() == value(index).keys()
    for name, tensor in value(index).items():
        assert hidden[name].dtype == tensor.dtype
        assert torch.equal(hidden[name], tensor)


def test_new_journal_is_empty(partial: Path) -> None:
    with pytest.raises(UsageError, match="no unfinished run"):
        Journal.open(partial, FINGERPRINT, resume="require")
    assert not partial.exists()
    with Journal.open(partial, FINGERPRINT) as journal:
        assert (journal.finished, journal.notes, journal.hidden(), journal.verify()) == ({}, {}, None, [])


def test_goes_on_with_records_notes_and_hidden(partial: Path) -> None:
    with Journal.open(partial, FINGERPRINT) as journal:
        work(journal, 0)
        journal.note("batch", 8)
        work(journal, 1)
        before = journal.finished
    with Journal.open(partial, FINGERPRINT, resume="require") as journal:
        assert list(journal.finished) == ["block-0", "block-1"]
        assert journal.finished == before
        assert journal.finished["block-1"]["error"] == 0.125
        assert journal.notes == {"batch": 8}
        assert journal.verify() == []
        check_hidden(journal, 1)


def test_hidden_files_alternate(partial: Path) -> None:
    with Journal.open(partial, FINGERPRINT) as journal:
        for index, name in enumerate(["hidden-a", "hidden-b", "hidden-a"]):
            other = {
                path: path.stat().st_mtime_ns
                for path in (partial / ".quark-state").glob("hidden-*")
                if name not in str(path)
            }
            work(journal, index)
            assert all(path.stat().st_mtime_ns == before for path, before in other.items())
            check_hidden(journal, index)
            assert (partial / ".quark-state" / f"{name}.safetensors").exists()


def test_part_without_hidden(partial: Path) -> None:
    with Journal.open(partial, FINGERPRINT) as journal:
        work(journal, 0)
        work(journal, 1, hidden=False)
        assert journal.hidden() is None
        work(journal, 2)
        check_hidden(journal, 2)
        with pytest.raises(ValueError, match="finished already"):
            journal.finish("block-2", {})


def test_resume_never_wipes(partial: Path) -> None:
    run(partial, 0, 1)
    (partial / "config.json").touch()
    with Journal.open(partial, {"other": 1}, resume="never") as journal:
        assert journal.finished == {}
        assert files(partial) == [".quark-state/fingerprint.json", ".quark-state/lock"]
        work(journal, 0)
    with Journal.open(partial, {"other": 1}) as journal:
        assert list(journal.finished) == ["block-0"]


def test_discard_state(partial: Path) -> None:
    with Journal.open(partial, FINGERPRINT) as journal:
        work(journal, 0)
        journal.discard_state()
    assert files(partial) == ["model-block-0.safetensors"]
    assert list(partial.parent.iterdir()) == [partial]


def mismatch(partial: Path, old: dict[str, Any], new: dict[str, Any]) -> str:
    Journal.open(partial, old).close()
    with pytest.raises(ConfigError) as caught:
        Journal.open(partial, new)
    assert "--resume never" in caught.value.hint
    Journal.open(partial, old).close()  # the lock is free again
    return str(caught.value)


def test_other_settings_are_named_with_both_values(partial: Path) -> None:
    changed = {"seed": 1, "recipe": {"entries": [{"path": "*"}, {"path": "*lm*"}, 5]}, "model": "x" * 200}
    text = mismatch(partial, FINGERPRINT, changed)
    assert "\n  seed: 0 -> 1\n" in text
    assert '\n  recipe.entries[1].path: "*head*" -> "*lm*"\n' in text
    assert "\n  recipe.entries[2]: (absent) -> 5\n" in text
    assert "\n  rows: [] -> (absent)" in text
    assert f'\n  model: (absent) -> "{"x" * 76}...\n' in text
    assert "entries[0]" not in text


def test_at_most_ten_settings_are_listed(partial: Path) -> None:
    text = mismatch(partial, {f"k{index}": 0 for index in range(14)}, {f"k{index}": 1 for index in range(14)})
    assert text.count("0 -> 1") == 10
    assert text.endswith("and 4 more")


def test_equal_means_equal_as_json(partial: Path) -> None:
    old = {"a": (1, 2), "b": float("nan"), "é": {1: None}}
    Journal.open(partial, old).close()
    Journal.open(partial, {"é": {"1": None}, "b": float("nan"), "a": [1, 2]}).close()
    with pytest.raises(ConfigError, match="a\\[0\\]: 1 -> true"):
        Journal.open(partial, {**old, "a": [True, 2]})


@pytest.mark.parametrize("name", ["fingerprint.json", "journal.json"])
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "[" * 100_000, '{"schema": "quark/journal/9"}', '{"schema": "quark/journal/1", "parts": [1]}'],
)
def test_damaged_state(partial: Path, name: str, content: str) -> None:
    run(partial, 0)
    (partial / ".quark-state" / name).write_text(content)
    with pytest.raises(ConfigError):
        Journal.open(partial, FINGERPRINT)


def test_a_record_that_is_gone_is_damage(partial: Path) -> None:
    run(partial, 0, 1)
    next(partial.glob(".quark-state/record-*.json")).unlink()
    with pytest.raises(ConfigError, match="damaged"):
        Journal.open(partial, FINGERPRINT)


def test_what_is_written_for_a_part_does_not_grow_with_the_parts_before_it(partial: Path) -> None:
    sizes = []
    for number in range(6):
        with Journal.open(partial, FINGERPRINT) as journal:
            journal.finish(f"part-{number}", {"losses": {str(tensor): 0.5 for tensor in range(500)}})
            journal.keep()
        sizes.append((partial / ".quark-state" / "journal.json").stat().st_size)
    assert max(sizes) < 2000
    assert len(list(partial.glob(".quark-state/record-*.json"))) == 6


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_hidden(partial: Path, damage: str) -> None:
    run(partial, 0)
    path = partial / ".quark-state" / "hidden-a.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + (b"\xff" if damage == "flip" else b""))
    if damage == "remove":
        path.unlink()
    with Journal.open(partial, FINGERPRINT) as journal, pytest.raises(ConfigError, match="damaged") as caught:
        journal.hidden()
    assert "--resume never" in caught.value.hint


def test_directory_that_is_not_ours(partial: Path) -> None:
    partial.touch()
    with pytest.raises(UsageError, match="not a directory"):
        Journal.open(partial, FINGERPRINT)
    partial.unlink()
    partial.mkdir()
    (partial / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not empty"):
        Journal.open(partial, FINGERPRINT)
    assert files(partial) == ["thesis.tex"]


def test_finished_but_not_renamed(partial: Path) -> None:
    (partial / "quark").mkdir(parents=True)
    (partial / "quark" / "manifest.json").touch()
    with pytest.raises(UsageError, match="is a finished checkpoint that was not renamed") as caught:
        Journal.open(partial, FINGERPRINT)
    assert caught.value.hint.endswith("/out")


def test_second_process_is_refused(partial: Path) -> None:
    with Journal.open(partial, FINGERPRINT) as journal:
        work(journal, 0)
        for resume in ("auto", "never", "require"):
            with pytest.raises(ResourceError, match=rf"pid {os.getpid()}\) is working here") as caught:
                Journal.open(partial, FINGERPRINT, resume=resume)
            assert "another run of this process" in caught.value.what and "stop it" not in caught.value.hint
    run(partial, 1)
    assert len(files(partial)) == 9


def test_old_state_never_meets_a_new_fingerprint(partial: Path) -> None:
    """A kill in the middle of `--resume never` may leave journal.json without its fingerprint."""
    run(partial, 0)
    (partial / "model-block-0.safetensors").unlink()
    (partial / ".quark-state" / "fingerprint.json").unlink()
    for _ in range(2):
        with Journal.open(partial, {"other": 1}) as journal:
            assert journal.finished == {}


@pytest.mark.parametrize("damage", ["short", "other bytes"])
def test_verify_forgets_a_part_without_a_hidden_alone(partial: Path, damage: str) -> None:
    run(partial, 0, 1, 2, hidden=False)
    path = partial / "model-block-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(b"short" if damage == "short" else data)
    with Journal.open(partial, FINGERPRINT) as journal:
        assert journal.verify() == ["block-1"]
        assert list(journal.finished) == ["block-0", "block-2"]
        assert not path.exists()


def test_verify_forgets_a_part_and_all_that_follow_from_its_hidden(partial: Path) -> None:
    run(partial, 0, 1, 2)
    path = partial / "model-block-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with Journal.open(partial, FINGERPRINT) as journal:
        assert journal.verify() == ["block-0", "block-1", "block-2"]  # the hidden states of block-0 is overwritten


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("journal.json", '"block-0"', '"block-7"'),
        ("journal.json", '"hidden-a', '"a'),
        ("journal.json", "}", "}}"),
        ("record-*.json", '"size": ', '"Size": '),
        ("record-*.json", '"size": ', '"size":  '),
    ],
)
def test_a_journal_that_was_changed_is_not_believed(partial: Path, name: str, old: str, new: str) -> None:
    run(partial, 0, 1)
    path = next(partial.glob(f".quark-state/{name}"))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match="damaged"):
        Journal.open(partial, FINGERPRINT)


def test_an_abandoned_place_is_as_it_was(tmp_path: Path) -> None:
    partial = tmp_path / "new" / "folder" / "out.partial"
    with pytest.raises(ZeroDivisionError), Journal.lock(partial) as journal:
        assert partial.is_dir()
        journal.start(FINGERPRINT)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), Journal.lock(partial) as journal:
        journal.start(FINGERPRINT)
        journal.keep()
        raise ZeroDivisionError
    assert files(partial) == [".quark-state/fingerprint.json", ".quark-state/lock"]
    with pytest.raises(ConfigError), Journal.lock(partial) as journal:
        journal.start({"other": 1})
    assert files(partial) == [".quark-state/fingerprint.json", ".quark-state/lock"]


@pytest.mark.parametrize("name", ["out.partial", "out.partial.state", "out.partial/quark", "out.partial/.quark-state"])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_nothing_is_done_through_a_link(tmp_path: Path, name: str, resume: Any) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(mine)
    with pytest.raises(UsageError, match="is a link"):
        Journal.open(tmp_path / "out.partial", FINGERPRINT, resume=resume)
    assert files(mine) == ["thesis.tex"]


def test_verify_goes_on_from_the_hidden_before(partial: Path) -> None:
    run(partial, 0, 1, 2)
    (partial / "model-block-2.safetensors").unlink()
    with Journal.open(partial, FINGERPRINT) as journal:
        assert journal.verify() == ["block-2"]
        check_hidden(journal, 1)
        work(journal, 2)
        check_hidden(journal, 2)


def test_verify_starts_over_when_the_hidden_is_overwritten(partial: Path) -> None:
    run(partial, 0, 1, 2, 3)
    (partial / "model-block-2.safetensors").unlink()
    with Journal.open(partial, FINGERPRINT) as journal:
        assert journal.verify() == ["block-0", "block-1", "block-2", "block-3"]
        assert journal.hidden() is None


def test_open_removes_what_a_kill_left(partial: Path) -> None:
    run(partial, 0)
    before = files(partial)
    for name in ("model-block-1.safetensors", "sub/model-block-1-00002.safetensors", "model-block-1.safetensors.tmp"):
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).touch()
    (partial / ".quark-state" / ".writing-1-journal.json").touch()
    (partial / ".writing-abc").mkdir()
    (partial / ".writing-abc" / ".tmp123").touch()
    (partial / "report.json").touch()
    Journal.open(partial, FINGERPRINT).close()
    assert files(partial) == sorted([*before, "report.json"])
    assert not (partial / ".writing-abc").exists()


class Crash(BaseException):
    """Stands for a kill; not an Exception, so nothing may catch and swallow it."""


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_failure_at_any_step_keeps_the_previous_state(
    partial: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run(partial, 0)
    real = getattr(os, name)
    for step in range(20):
        calls = iter([False] * step + [True])

        def crash(*args: Any, calls: Any = calls) -> None:
            if next(calls, False):
                raise Crash
            real(*args)

        with Journal.open(partial, FINGERPRINT) as journal, monkeypatch.context() as patch:
            patch.setattr(os, name, crash)
            try:
                work(journal, 1)
            except Crash:
                pass
            else:
                break
            done = len(journal.finished)
        with Journal.open(partial, FINGERPRINT) as journal:
            assert journal.verify() == []
            assert done == 1 <= len(journal.finished)
            check_hidden(journal, len(journal.finished) - 1)
            if len(journal.finished) == 2:  # only the very last sync was lost: the part is done
                break
    assert step >= 3


def test_full_disk_while_finishing(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with Journal.open(partial, FINGERPRINT) as journal:
        work(journal, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(ResourceError, match="the disk is full"):
                journal.finish("block-1", {}, value(1))
            with pytest.raises(ResourceError, match=r"journal\.json: the disk is full"):
                journal.note("batch", 4)
        assert (list(journal.finished), journal.notes) == (["block-0"], {})
        work(journal, 1)
        check_hidden(journal, 1)


# Each child goes on where the last one was killed: first at every single sync and rename in turn (no cleaning up
# happens, as with SIGKILL), then by real SIGKILLs at random moments. The work depends on the hidden states alone.
WORKER = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import torch
from quarkcli.disk.journal import Journal
from quarkcli.disk.outputs import MANIFEST
from quarkcli.disk.writer import atomic_write_json, write_part

PARTS = 4

def job(partial):
    if (partial / MANIFEST).exists() and not (partial / ".quark-state").exists():
        return  # killed between the end and the renaming
    with Journal.open(partial, {"seed": 1}) as journal:
        assert journal.verify() == []
        for index in range(len(journal.finished), PARTS):
            hidden = journal.hidden() or {"x": torch.arange(50)}
            out = {"x": hidden["x"] * 5 + index}
            written = write_part(partial, f"b{index}", {"w": hidden["x"], "v": out["x"].to(torch.int8)}, limit=400)
            journal.finish(f"b{index}", {"files": [file.record() for file in written]}, out)
        (partial / MANIFEST).parent.mkdir(exist_ok=True)
        atomic_write_json(partial / MANIFEST, {})
        journal.discard_state()

def in_child(function, kill_after=None):
    if child := os.fork():
        time.sleep(kill_after or 0)
        kill_after and os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        function()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)

def dying_job(partial, step):
    count = 0
    def counting(real):
        def call(*args):
            nonlocal count
            count += 1
            if count == step:
                os._exit(9)
            return real(*args)
        return call
    os.fsync, os.replace = counting(os.fsync), counting(os.replace)
    job(partial)

def digest(partial):
    return {str(p.relative_to(partial)): hashlib.sha256(p.read_bytes()).hexdigest() for p in partial.rglob("*.*")}

root = Path(sys.argv[1])
job(root / "calm.partial")
codes = []
for step in range(1, 200):
    codes.append(in_child(lambda: dying_job(root / "steps.partial", step)))
    if codes[-1] != 9:
        break
kills = []
for round in range(4):
    partial = root / f"kill{round}.partial"
    for tries in range(100):  # later kills come later, so that slow machines get on too
        moment = random.Random(len(kills)).uniform(0.001, 0.025) * (1 + tries)
        kills.append(in_child(lambda: job(partial), moment))
        if kills[-1] != -9:
            break
    partial.rename(partial.with_suffix(".done"))
equal = [digest(path) == digest(root / "calm.partial") for path in [root / "steps.partial", *root.glob("*.done")]]
print(json.dumps({"codes": codes, "kills": kills, "equal": equal}))
"""


def test_killed_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WORKER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["codes"][-1] == 0, done.stderr
    assert result["codes"].count(9) >= 8
    assert set(result["kills"]) == {0, -9}, done.stderr
    assert result["equal"] == [True] * 5
