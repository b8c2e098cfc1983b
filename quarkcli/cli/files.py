"""Writes files of commands that people asked for."""

from __future__ import annotations

from pathlib import Path

from quarkcli.cli import output
from quarkcli.errors import ResourceError, UsageError


def write(to: Path, text: str, *, replace: bool = False) -> None:
    """Writes a file and prints its name. Raises UsageError for one that is there already, unless it may be replaced."""
    if to.exists() and not (replace and to.is_file()):
        raise UsageError("exists already", where=str(to), hint="choose another name", kind="E-OUTPUT-FILE")
    if not to.parent.is_dir():
        raise UsageError("there is no such directory", where=str(to.parent), kind="E-OUTPUT-FILE")
    try:
        to.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise ResourceError(what, where=str(to), kind="E-DISK-WRITE") from error
    output.data(str(to), whole=True)
