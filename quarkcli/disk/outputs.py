"""Names the directories of an output, one or one for each dialect in a directory that lists them, and our own files.

<output>/dialects.json          the list; written last, so that it is there when all of them are complete
<output>/<dialect>/             a checkpoint with a manifest of its own
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quarkcli.errors import UsageError

OURS = "quark"  # the folder of a checkpoint's own records
MANIFEST, LOG = f"{OURS}/manifest.json", f"{OURS}/quark.log"
REPORT, PAGE = f"{OURS}/report.json", f"{OURS}/report.html"
RECIPE, SOURCE_CARD = f"{OURS}/recipe.yaml", f"{OURS}/source_README.md"
LIST = "dialects.json"
PARTIAL = ".partial"  # what the folder of an unfinished run has behind the name of its output
SCHEMA = "quark/dialects/1"
STAGING = ".writing-"  # prefix of temporary folders and files; the journal removes what a kill left behind
LONGEST_NAME, LONGEST_PATH = 255, 3500  # bytes; room is left for the files inside


def check_file(file: Path) -> None:
    """Raises UsageError for a file whose name is too long to be written: another name, which is longer, comes first."""
    if what := too_long(file, f"{STAGING}4194304-"):  # the largest process number of Linux
        raise UsageError(what, where=f"{str(file)[:80]}...", hint="choose a shorter name", kind="E-OUTPUT-FILE")


def too_long(path: Path, added: str) -> str:
    """Returns what is wrong with the length of a path, if anything; `added`: what names beside it have more."""
    sizes = [len(os.fsencode(name)) for name in path.parts] or [0]
    most = LONGEST_NAME - len(added)
    if sizes[-1] > most:
        return f"the name of the output is too long; at most {most} bytes"
    if max(sizes) > LONGEST_NAME:
        return f"the name of a directory is too long; at most {LONGEST_NAME} bytes"
    if len(os.fsencode(path)) > LONGEST_PATH:
        return f"the name of the output is too long; at most {LONGEST_PATH:,} bytes with its directories"
    return ""


def nearest(path: Path) -> Path:
    """Returns the folder of a path that need not exist yet: itself, or the nearest around it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def beside(output: Path) -> Path:
    """Returns the folder of an unfinished run of an output. Any place gives a name: see `partial_path`."""
    return Path(f"{output if output.name not in ('', '..') else output.resolve()}{PARTIAL}")


def listing(folders: list[str]) -> dict[str, Any]:
    """Returns the contents of the list."""
    return {"schema": SCHEMA, "dialects": folders}


def listed(output: Path) -> list[str]:
    """Returns the folders that an output lists as checkpoints; empty for one that is a checkpoint itself, or neither.

    A checkpoint has no list, though it may have a file of this name. Only plain names count: a list that was changed
    must not lead out of the directory.
    """
    path = output / LIST
    try:
        value = json.loads(path.read_bytes()) if path.is_file() and not (output / MANIFEST).is_file() else None
    except (OSError, ValueError, RecursionError):
        return []
    names = value.get("dialects") if isinstance(value, dict) and value.get("schema") == SCHEMA else None
    return [name for name in names if _is_plain(name)] if isinstance(names, list) else []


def checkpoints(output: Path) -> list[Path]:
    """Returns the finished checkpoints of ours in an output: itself, or those that it lists."""
    found = [output, *(output / name for name in listed(output))]
    return [folder for folder in found if (folder / MANIFEST).is_file()]


def hint(output: Path) -> str:
    """Returns where the checkpoints are, for a directory that is none itself but lists some."""
    found = [str(folder) for folder in checkpoints(output) if folder != output]
    return f"give one of its checkpoints: {', '.join(found)}" if found else ""


def within(folder: str, name: str) -> str:
    """Returns a file's name in the output. `folder`: of its checkpoint, empty where there is one."""
    return f"{folder}/{name}" if folder else name


def of_folder(records: Mapping[str, Mapping[str, Any]], folder: str) -> dict[str, dict[str, Any]]:
    """Returns the records of parts with the files of one checkpoint, by their names in it."""
    start = within(folder, "")
    return {
        part: {
            **record,
            "files": [
                {**file, "file": file["file"].removeprefix(start)}
                for file in record["files"]
                if file["file"].startswith(start)
            ],
        }
        for part, record in records.items()
    }


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..") and "\0" not in name
