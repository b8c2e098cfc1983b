"""Faults of the file system at every event of a run: `campaign(seed, seconds)`.

A run's events are its opens, renames, listings, removals, copies (Python's audit events), syncs, stats, locks and
writes of weights, below the folder of the run alone. One after another, in an order that the seed gives, they fail:
once, or from then on. What must come of it is said in `_judge`. By hand: `python -m tests.fuzz.faults_on_disk SEED S`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.forks import PRELOADED, ROOT

AUDITED = {
    "open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "os.chmod",
    "shutil.rmtree", "shutil.copyfile",
}  # fmt: skip
ERRNOS = (errno.ENOSPC, errno.EIO, errno.EACCES)
BEFORE_WORK = {2, 4, 5, 6, 7}
COMMAND = ("quantize", "--model", "model", "--scheme", "mxfp4", "-o", "out", "-q")


class Fault(NamedTuple):
    """The `number`-th event fails with `error`; `lasting`: and all after it that change something on the disk."""

    number: int
    error: int
    lasting: bool
    overwrite: bool

    def __str__(self) -> str:
        more = " and all later writes" if self.lasting else ""
        return f"event {self.number}{more}: {errno.errorcode[self.error]}{', --overwrite' if self.overwrite else ''}"


class Ended(NamedTuple):
    code: int
    err: str
    event: str  # what failed, or the count of events


def campaign(seed: int, seconds: float) -> list[str]:
    """What went wrong within so many seconds, one line each; empty when all is as it should be."""
    line = [sys.executable, "-m", "tests.fuzz.faults_on_disk", str(seed), str(seconds)]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    if done.returncode:
        return [f"the campaign itself failed: {done.stderr[-2000:]}"]
    found: list[str] = json.loads(done.stdout)["failures"]
    return found


def serve(seed: int, seconds: float) -> dict[str, Any]:
    """The campaign in this process, which forks a child for every run."""
    import importlib

    import torch

    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        os.environ["QUARK_HOME"] = str(root / "home")
        calm, counts = _calm(root)
        faults = [
            Fault(number, error, lasting, overwrite)
            for overwrite in (False, True)
            for number in range(1, counts[overwrite] + 1)
            for error in ERRNOS
            for lasting in (False, True)
        ]
        random.Random(seed).shuffle(faults)
        failures: list[str] = []
        tried = 0
        for tried, fault in enumerate(faults, 1):  # noqa: B007 - told at the end
            if time.monotonic() > end:
                break
            failures += _try(root, fault, calm)
    return {"tried": tried, "of": len(faults), "failures": failures}


def _calm(root: Path) -> tuple[dict[str, str], dict[bool, int]]:
    """Hashes of a run that nothing disturbed, and how many events a run has, over nothing and over a checkpoint."""
    counts = {}
    for overwrite in (False, True):
        folder = _folder(root, overwrite)
        ended = _run(folder, Fault(0, 0, False, overwrite))
        assert ended.code == 0, ended.err
        counts[overwrite] = int(ended.event)
        calm = _hashes(folder / "out")
        shutil.rmtree(folder)
    return calm, counts


def _folder(root: Path, overwrite: bool) -> Path:
    from quarkcli.disk.embedded import EMBEDDED

    folder = Path(tempfile.mkdtemp(dir=root))
    shutil.copytree(EMBEDDED, folder / "model")
    (folder / "model" / "README.md").write_text("a card")
    (folder / "model" / "sub").mkdir()
    (folder / "model" / "sub" / "notes.txt").write_text("notes")
    if overwrite:
        done = root / "done"
        if not done.is_dir():
            assert _run(folder, Fault(0, 0, False, False)).code == 0
            (folder / "out").rename(done)
        shutil.copytree(done, folder / "out")
    return folder


def _try(root: Path, fault: Fault, calm: dict[str, str]) -> list[str]:
    folder = _folder(root, fault.overwrite)
    ended = _run(folder, fault)
    wrong = _judge(folder, fault, ended, calm)
    shutil.rmtree(folder)
    return [f"{fault}; {ended.event.replace(str(folder), '')}; exit {ended.code}: {text}" for text in wrong]


def _judge(folder: Path, fault: Fault, ended: Ended, calm: dict[str, str]) -> list[str]:
    """Before part 0: exit 2, 4, 5, 6 or 7, and nothing left. In the walk: exit 6. After the renaming: exit 0.

    Whatever happened, the same command without faults ends well, with the same bytes, and nothing is left beside.
    """
    wrong = []
    output, partial = folder / "out", folder / "out.partial"
    if any(word in ended.err for word in ("Traceback", "internal error")):
        wrong.append(f"not a plain message: {ended.err[-300:]}")
    if ended.code == 0:
        if _hashes(output) != calm:
            wrong.append("other bytes")
    else:
        first = ended.err.splitlines()[0] if ended.err else ""
        if not ended.err.startswith(("error: ", "warning: ")):
            wrong.append(f"no message: {first}")
        if ended.code not in ({6} if partial.exists() else BEFORE_WORK):
            wrong.append(f"exit code with {'a' if partial.exists() else 'no'} partial directory: {first}")
        if output.exists() and not fault.overwrite:
            wrong.append(f"failed, and the output is there: {first}")
        left = {path.name for path in folder.iterdir()} - {"model", "out"}
        if not partial.exists() and left and not any(name.startswith("out.partial.state") for name in left):
            wrong.append(f"left behind: {sorted(left)}: {first}")
    again = _run(folder, Fault(0, 0, False, overwrite=fault.overwrite or ended.code == 0))
    if again.code or _hashes(output) != calm:
        wrong.append(f"the next run: exit {again.code}: {again.err[:300]}")
    left = {path.name for path in folder.iterdir()} - {"model", "out"}
    if left and again.code == 0:
        wrong.append(f"left beside the output after the next run: {sorted(left)}")
    return wrong


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


# ---- one run, in a child


def _run(folder: Path, fault: Fault) -> Ended:
    err, told = folder.parent / f"{folder.name}.err", folder.parent / f"{folder.name}.event"
    child = os.fork()
    if not child:
        _child(folder, fault, err, told)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended = Ended(code, err.read_text(), told.read_text() if told.exists() else "")
    err.unlink()
    told.unlink(missing_ok=True)
    return ended


def _child(folder: Path, fault: Fault, err: Path, told: Path) -> None:
    code = 99
    try:
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        note = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.chdir(folder)
        events = _Events(folder, fault, note)
        events.install()
        from quarkcli.cli import main

        code = main.main([*COMMAND, *(["--overwrite"] if fault.overwrite else [])])
        events.active = False
        if not fault.number:
            os.write(note, str(events.count).encode())
    finally:
        sys.stderr.flush()
        os._exit(code)


class _Events:
    """Counts a run's events and lets some of them fail."""

    def __init__(self, folder: Path, fault: Fault, note: int) -> None:
        self.folder = f"{folder}/"
        self.fault = fault
        self.note = note
        self.count = 0
        self.active = True
        self.inside = False

    def install(self) -> None:
        """Audit events, and by hand what raises none. Replaced functions stay so: the process ends with the run."""
        import fcntl

        from quarkcli.disk import writer

        sys.addaudithook(self.hook)
        for owner, name in ((os, "fsync"), (os, "stat"), (fcntl, "flock"), (writer, "_save")):
            setattr(owner, name, self.watched(getattr(owner, name), f"{owner.__name__}.{name}"))

    def watched(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            self.event(name, args[-1] if name.endswith("_save") else args[0])
            return real(*args, **kwargs)

        return function

    def hook(self, name: str, args: tuple[Any, ...]) -> None:
        if name in AUDITED and self.active:
            self.event(name, args[0])

    def event(self, name: str, what: Any) -> None:
        if not self.active or self.inside:
            return
        self.inside = True
        try:
            path = self.path(what)
        finally:
            self.inside = False
        if not path.startswith(self.folder) or "/.out" in path:
            return
        self.count += 1
        hit = self.count == self.fault.number
        later = self.fault.lasting and self.count > self.fault.number > 0 and "/out" in path and name != "os.stat"
        if hit or later:
            if hit:
                os.write(self.note, f"{name} {path}".encode())
            raise OSError(self.fault.error, os.strerror(self.fault.error), path)

    def path(self, what: Any) -> str:
        if isinstance(what, int):
            try:
                return str(Path(f"/proc/self/fd/{what}").readlink())
            except OSError:
                return ""
        try:
            return str(Path.cwd() / os.fsdecode(what))
        except TypeError:
            return ""


if __name__ == "__main__":
    print(json.dumps(serve(int(sys.argv[1]), float(sys.argv[2])), indent=1))
