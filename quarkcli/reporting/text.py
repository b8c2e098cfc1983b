"""Writes the text of report.json: readable, and not long for a model with tens of thousands of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_SHORT = 4000  # characters of a value that is broken into lines


def written(report: Mapping[str, Any]) -> str:
    """Returns the JSON text: a list of rows has a line for each row, a long value one line, a short one many."""
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {_value(value)}" for key, value in report.items()) + "\n}\n"


def _value(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return "[\n" + ",\n".join(f"    {_line(row)}" for row in value) + "\n  ]"
    line = _line(value)
    if len(line) > _SHORT or not isinstance(value, dict | list):
        return line
    return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n  ")


_line = json.JSONEncoder(ensure_ascii=False).encode
