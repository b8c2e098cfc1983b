"""Builds the report of a run under way from its plan and the records of finished parts.

It is read without the lock, while a process works there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from quarkcli.disk.outputs import of_folder
from quarkcli.disk.state import damaged, load
from quarkcli.disk.writer import STATE, disk_errors

_REPORT = "report.json"


class Unfinished(NamedTuple):
    """Holds the report that a run under way began with, and a record for every part that is done."""

    report: dict[str, Any]
    records: dict[str, dict[str, Any]]


def keep(partial: Path, folder: str, report: str) -> None:
    """Keeps the report that a run begins with. It is no part of what a run goes on from, so nothing waits for the disk.

    folder   of the checkpoint in the output
    report   its JSON text
    """
    path = partial / STATE / _REPORT
    with disk_errors(path, len(report)):
        path.write_text(f'{{"folder": "{folder}", "report": {report}}}', encoding="utf-8", errors="backslashreplace")


def is_unfinished(directory: Path) -> bool:
    """True for the directory of a run under way that has begun its report."""
    return (directory / STATE / _REPORT).is_file()


def read(partial: Path) -> Unfinished:
    """Returns what is known by now. Raises ConfigError for damaged files."""
    state = partial / STATE
    begun = load(state / _REPORT)
    records: dict[str, dict[str, Any]] = {}
    try:
        for path in sorted(state.glob("journal*.json")):  # one for each rank that works alone
            for part in load(path)["parts"]:
                records[part["name"]] = load(state / part["record"]["file"])
        return Unfinished(begun["report"], of_folder(records, begun["folder"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(state / _REPORT) from error
