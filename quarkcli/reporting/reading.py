"""Reads the report of a run from its directory: finished, or under way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quarkcli.disk import outputs, unfinished
from quarkcli.documents import text
from quarkcli.documents.report import Report
from quarkcli.documents.shape import check
from quarkcli.errors import AccessError, ModelError
from quarkcli.reporting import build


def read(directory: Path) -> dict[str, Any]:
    """Returns the report of a directory. Raises AccessError, ModelError; nothing else is looked for."""
    beside = outputs.beside(directory)
    hint = f"run 'quark report {beside}' for the unfinished run there" if beside.is_dir() else ""
    if not directory.is_dir():
        raise AccessError("there is no such directory", where=str(directory), hint=hint, kind="E-PATH-NOT-FOUND")
    path = directory / outputs.REPORT
    if unfinished.is_unfinished(directory):
        found = build.filled(*unfinished.read(directory))
    elif path.is_file():
        found = _parsed(path)
    else:
        if unfinished.is_unfinished(directory.parent):  # a folder of several checkpoints under way
            hint = f"run 'quark report {directory.parent}' for the unfinished run there"
        hint = hint or outputs.hint(directory) or "give a checkpoint that quark wrote; others have no report"
        raise ModelError(f"has no report ({outputs.REPORT})", where=str(directory), hint=hint, kind="E-REPORT-NONE")
    if found.get("schema") != build.SCHEMA:
        raise ModelError(f"is not a report of the form {build.SCHEMA}", where=str(path), kind="E-REPORT-NONE")
    check(Report, found, str(path))
    return found


def has_report(directory: Path) -> bool:
    """True where there is a report to read."""
    return unfinished.is_unfinished(directory) or (directory / outputs.REPORT).is_file()


def _parsed(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AccessError(f"cannot be read: {error.strerror or error}", where=str(path), kind="E-FILE-READ") from error
    return text.parse_object(content, str(path), paths=True)
