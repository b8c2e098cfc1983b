"""Writes files of commands that people asked for."""

from __future__ import annotations

from pathlib import Path

from quarkcli.cli import output
from quarkcli.errors import UsageError


def check_new(to: Path, *, replace: bool = False) -> None:
    """Raises UsageError for a file that is there, unless it may be replaced, and for a place where none can be made."""
    from quarkcli.disk import outputs

    outputs.check_file(to)
    if to.exists() and not (replace and to.is_file()):
        raise UsageError("exists already", where=str(to), hint="choose another name", kind="E-OUTPUT-FILE")
    check_folder(to.parent)


def check_folder(folder: Path) -> None:
    """Raises UsageError where there is no such directory."""
    if folder.is_dir():
        return
    what, hint = "there is no such directory", "make the directory first, or choose another"
    if folder.exists():
        what, hint = "is a file, not a directory", "choose another place"
    raise UsageError(what, where=str(folder), hint=hint, kind="E-OUTPUT-FILE")


def write(to: Path, text: str, *, replace: bool = False) -> None:
    """Writes a file whole or not at all. Raises UsageError as `check_new` does, ResourceError."""
    from quarkcli.disk.writer import atomic_write_text

    check_new(to, replace=replace)
    atomic_write_text(to.resolve(), text)


def write_named(to: Path, text: str, *, replace: bool = False) -> None:
    """Does as `write`, and prints the file's name."""
    write(to, text, replace=replace)
    output.data(str(to), whole=True)
