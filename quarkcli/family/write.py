"""Writes a family as YAML text as a person would: short lists and mappings stand on one line."""

from __future__ import annotations

import json
import re
from typing import Any

from quarkcli.family.schema import FamilyModel

_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")  # words that mean themselves in YAML; `on`, `null` and the like are not
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def to_yaml(family: FamilyModel, comment: str = "") -> str:
    """Returns the file that gives this family when it is read again, on its own; keys that say nothing are left out."""
    lines = [f"# {line}" for line in comment.splitlines()]
    for key, value in family.model_dump(exclude_defaults=True, exclude={"extends"}).items():
        if isinstance(value, dict) and key not in {"attention", "residual", "heads"}:
            lines.append(f"{key}:")
            lines += [f"  {_flow(name)}: {_flow(item)}" for name, item in value.items() if item is not None]
        elif isinstance(value, list) and value and not isinstance(value[0], str):
            lines.append(f"{key}:")
            lines += [f"  - {_flow(item)}" for item in value]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else _quoted(value)
    return json.dumps(value)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
