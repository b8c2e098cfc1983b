"""Reads and checks the JSON files of a journal, and holds the settings of two runs against each other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quarkcli.errors import ConfigError

DATE = "date"  # key of a file's date
_ABSENT = "(absent)"
_SHOWN_KEYS = 10
_SHOWN_CHARACTERS = 80


def compare(partial: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises ConfigError that lists the settings which differ."""
    before, now = _flatten(old), _flatten(new)
    differing = [key for key in {**now, **before} if now.get(key, _ABSENT) != before.get(key, _ABSENT)]
    if not differing:
        return
    lines = [f"  {key}: {_short(before, key)} -> {_short(now, key)}" for key in differing[:_SHOWN_KEYS]]
    if len(differing) > _SHOWN_KEYS:
        lines.append(f"  and {len(differing) - _SHOWN_KEYS} more")
    what = "the unfinished run there has other settings (old -> new):\n" + "\n".join(lines)
    mend = "use the old settings"
    if all(key.endswith(f".{DATE}") for key in differing):  # copied or downloaded anew, perhaps
        mend = "run touch -d OLD FILE where a file has the old content"
    hint = f"{mend}, or use --resume never to delete {partial} and start again"
    raise ConfigError(what, where=str(partial), hint=hint, kind="E-RESUME-CHANGED")


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    """Returns dotted keys (`recipe.entries[3].enable`) -> JSON text; empty containers are values."""
    if isinstance(value, dict) and value:
        pairs = [(f"{key}.{name}" if key else name, item) for name, item in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(f"{key}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {key: json.dumps(value, ensure_ascii=False)}
    return {path: text for name, item in pairs for path, text in _flatten(item, name).items()}


def _short(flat: dict[str, str], key: str) -> str:
    text = flat.get(key, _ABSENT)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def plain(value: Any) -> Any:
    """Returns `value` as JSON gives it back (lists for tuples, text keys), so that memory and file never differ."""
    return json.loads(json.dumps(value))


def load(path: Path) -> dict[str, Any]:
    """Returns a JSON object. Raises ConfigError for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path) from error
    if not isinstance(value, dict):
        raise damaged(path)
    return value


def damaged(path: Path) -> ConfigError:
    """Returns the error that a file of the state cannot be used."""
    hint = f"use --resume never to delete {path.parent.parent} and start again"
    return ConfigError(
        "the state of the unfinished run is damaged", where=str(path), hint=hint, kind="E-RESUME-DAMAGED"
    )


def checksum(parts: list[dict[str, Any]], notes: dict[str, Any]) -> str:
    """Returns the sha256 of what a journal says."""
    return sha256(json.dumps([parts, notes], sort_keys=True).encode())


def sha256(data: bytes) -> str:
    """Returns the sha256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def is_sound(path: Path, file: dict[str, Any]) -> bool:
    """True when a finished file has the size, and where that is known the hash, with which it was written."""
    if not path.is_file() or path.stat().st_size != file["size"]:
        return False
    if "sha256" not in file:
        return True
    with path.open("rb") as stream:
        return bool(hashlib.file_digest(stream, "sha256").hexdigest() == file["sha256"])
