"""Holds the facts of all that is built in, computed once and shipped, so that lists need not compute them.

`make docs` writes the file from what the commands compute. It bears a digest of every built-in recipe file: where one
was changed since, it is not used, and the commands compute. Files of the user are read each time.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from quarkcli.recipe import catalog

Group = Literal["recipes", "schemes", "models", "algorithms"]
Row = dict[str, Any]

FILE = Path(__file__).resolve().parent.parent / "assets" / "listings.json"
LOSSES = FILE.with_name("losses.json")
_PLACE = "file"  # of a row: the path, which depends on the installation


def of_file(group: Group, path: Path) -> Row | None:
    """Returns the row of a built-in file; None for one of the user's, or when it must be computed."""
    row = shipped(group).get(key(path))
    return {**row, _PLACE: str(path)} if row is not None and _PLACE in row else row


def shipped(group: Group) -> dict[str, Row]:
    """Returns the rows of a group by `key`; none when they are not those of the recipe files that are here."""
    return _read(catalog.built_in_folder()).get(group, {})


def losses(scheme: str) -> list[Row]:
    """Returns what a scheme of ours has cost on the models that were measured: `docs/losses.json` in short."""
    found: dict[str, list[Row]] = json.loads(LOSSES.read_text(encoding="utf-8"))["schemes"]
    return found.get(scheme, [])


def key(path: Path) -> str:
    """Returns the name of a file's row: its path below the built-in folder; empty for a file that lies elsewhere."""
    folder = catalog.built_in_folder()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else ""


def written(rows: dict[Group, dict[str, Row]]) -> str:
    """Returns the file's text for these rows."""
    bare = {
        group: {name: {**row, _PLACE: name} if _PLACE in row else row for name, row in of.items()}
        for group, of in rows.items()
    }
    return json.dumps({"digest": digest(catalog.built_in_folder()), **bare}, indent=1, ensure_ascii=False) + "\n"


def digest(folder: Path) -> str:
    """Returns the digest of all recipe files below a folder, names included."""
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*.yaml")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()


@lru_cache(maxsize=1)
def _read(folder: Path) -> dict[str, Any]:
    """Returns what the file holds; nothing where it is missing, or of other recipe files than those in the folder."""
    try:
        found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.get("digest") == digest(folder) else {}
