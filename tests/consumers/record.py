"""docs/consumers.json: what was loaded by whom, in which release, when, and what it scored."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "docs" / "consumers.json"
SCHEMA = "quark/consumers/1"
RUN, INPUTS, KERNEL, DIFFERS, FAILED = "run", "inputs", "kernel", "differs", "failed"
OUTCOMES = {
    RUN: "loaded, and scores as quark does",
    INPUTS: "loaded, but inputs are treated otherwise than the files say",
    KERNEL: "taken up to a kernel that the build lacks",
    DIFFERS: "loaded, and scores otherwise",
    FAILED: "not loaded",
}


@dataclass(frozen=True)
class Run:
    """One checkpoint in one consumer.

    ours, theirs  mean log-probability of the same tokens; None where it was not loaded
    stage         the last that began (see `vllm/worker.py`); empty where all went well
    reason        what stopped it
    standins      products in torch that took the place of kernels which the build lacks
    """

    model: str
    scheme: str
    dialect: str
    cache: str
    consumer: str
    version: str
    date: str
    tokens: int
    outcome: str
    ours: float
    theirs: float | None = None
    stage: str = ""
    reason: str = ""
    standins: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        return self.consumer, self.model, self.scheme, self.dialect, self.cache


def read(path: Path = PATH) -> list[Run]:
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["schema"] == SCHEMA
    return [Run(**{**row, "standins": tuple(row.get("standins", ()))}) for row in document["runs"]]


def write(new: Iterable[Run], path: Path = PATH) -> None:
    """Adds runs; one of the same checkpoint in the same consumer is replaced."""
    runs = {run.key: run for run in [*read(path), *new]}
    lines = ",\n".join(f"  {json.dumps(_row(runs[key]))}" for key in sorted(runs))
    path.write_text(f'{{"schema": "{SCHEMA}", "runs": [\n{lines}\n]}}\n', encoding="utf-8")


def _row(run: Run) -> dict[str, object]:
    """Without what is empty."""
    return {name: value for name, value in asdict(run).items() if value or name in ("cache", "ours")}
