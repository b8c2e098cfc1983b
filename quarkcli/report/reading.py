"""The report of a finished run, read from its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quarkcli.documents import text
from quarkcli.documents.report import Report
from quarkcli.documents.shape import check
from quarkcli.errors import AccessError, ModelError

SCHEMA = "quark/report/2"


def read(directory: Path) -> dict[str, Any]:
    """Returns `quark/report.json` of a directory. Raises AccessError, ModelError; nothing else is looked for."""
    if not directory.is_dir():
        raise AccessError("no such directory", where=str(directory))
    path = directory / "quark" / "report.json"
    if not path.is_file():
        partial = directory.with_name(f"{directory.name}.partial")
        hint = f"{partial} is an unfinished run" if partial.is_dir() else "only checkpoints that quark wrote have one"
        raise ModelError("no report (quark/report.json)", where=str(directory), hint=hint)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AccessError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    found = text.parse_object(content, str(path))
    if found.get("schema") != SCHEMA:
        raise ModelError(f"not a report of the form {SCHEMA}", where=str(path))
    check(Report, found, str(path))
    return found
