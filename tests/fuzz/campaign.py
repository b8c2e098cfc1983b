"""Runs cases one after the other and says of each what was wrong with it."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.forks import Done, Forks
from tests.fuzz.cases import KINDS, MADE, Case, World

LIMIT = 20.0
# What a shell may see of a hostile input: done, usage, recipe, model, access, resources, data, check.
_CODES = {0, 2, 3, 4, 5, 6, 7, 8}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MINE = {"o", "o.partial", "home", ".out", ".err"}


class Campaign:
    """One prepared world. `counts`: how many cases of every kind ended with which exit code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "home").mkdir()
        (folder / "world").mkdir()
        self.quark = Forks(folder / "home")
        self.world = World(folder / "world", self.quark)
        self.clean = {name: tensors(self.world.folder / name) for name in MADE}
        self.counts: Counter[tuple[str, int]] = Counter()

    def close(self) -> None:
        self.quark.close()

    def run(self, seed: int, number: int, only: str = "") -> list[str]:
        """What is wrong with one case, a line each; the same numbers give the same case."""
        random = Random(f"{seed} {number}")
        kinds = [only] if only else list(KINDS)
        kind = random.choices(kinds, [KINDS[name][0] for name in kinds])[0]
        work = self.folder / "case"
        work.mkdir()
        try:
            case = KINDS[kind][1](self.world, work, random)
            before = contents(work)
            done = self.quark(*case.command, cwd=work, timeout=LIMIT, env=case.env)
            self.counts[kind, done.code] += 1
            return [
                f"{kind} #{number}: {problem}\n    {case.what}\n    quark {' '.join(case.command):.300}"
                for problem in self._problems(case, done, work, before)
            ]
        finally:
            shutil.rmtree(work)

    def _problems(self, case: Case, done: Done, work: Path, before: dict[str, str]) -> Iterator[str]:
        if done.code not in _CODES:
            last = (done.err.strip().splitlines() or [""])[0]
            yield f"more than {LIMIT:g} s" if done.code == -9 else f"exit {done.code}: {last:.300}"
        if found := _CONTROL.search(done.out + done.err):
            yield f"{found[0]!r} reaches the terminal"
        after = contents(work)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        if outside := sorted(name for name in changed if name.split("/")[0] not in _MINE):
            yield f"files beside the output: {outside[:3]}"
        published = (work / "o" / "config.json").is_file()
        if (done.code == 0) != published and case.command[0] == "quantize" and "--dry-run" not in case.command:
            yield f"exit {done.code}, and a checkpoint is {'there' if published else 'not there'}"
        if published and case.same and tensors(work / "o") != self.clean[case.same]:
            yield "the published tensors differ from those of the clean run"


def tensors(folder: Path) -> dict[str, str]:
    """Hashes of the weight files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> hash, of all files but those of the output."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.relative_to(folder).parts[0] not in _MINE
    }


def campaign(
    seed: int, seconds: float, only: str = "", first: int = 0, count: int = 10**9
) -> tuple[list[str], Counter]:
    """All problems found within the time, and the counts of exit codes by kind."""
    folder = Path(tempfile.mkdtemp(prefix="quark-fuzz-"))
    problems: list[str] = []
    try:
        running = Campaign(folder)
        try:
            end = time.monotonic() + seconds
            for number in range(first, first + count):
                if time.monotonic() > end:
                    break
                found = running.run(seed, number, only)
                for line in found:
                    print(line, flush=True)
                problems += found
        finally:
            running.close()
        return problems, running.counts
    finally:
        shutil.rmtree(folder)
