"""Reads the index of errors: what each kind means, its causes and its cure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "assets" / "errors.yaml"


@dataclass(frozen=True)
class Kind:
    """One kind of error.

    exit     exit codes that it ends with
    means    one sentence
    cure     what to do
    example  a message as it is printed
    """

    code: str
    exit: tuple[int, ...]
    means: str
    causes: tuple[str, ...]
    cure: str
    example: str


def index() -> dict[str, Kind]:
    """Returns every kind of error by its code, in the order of the file."""
    import yaml

    rows: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {code: _kind(code, row) for code, row in rows.items()}


def _kind(code: str, row: dict[str, Any]) -> Kind:
    given = row["exit"]
    ends = (given,) if isinstance(given, int) else tuple(given)
    return Kind(code, ends, row["means"], tuple(row["causes"]), row["cure"], row["example"])
