"""YAML with places: a strict reader on `yaml.compose` that remembers line and column of every value.

YAML 1.1 surprises are removed: duplicate keys are refused, `on`, `off`, `yes` and `no` are text, `012` is text, `1e-4`
is a number. Aliases may not expand a document beyond `MAX_NODES` values, and a file may not exceed `MAX_BYTES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quarkcli.errors import ConfigError
from quarkcli.recipe.entries import Origin

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 64

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_CONSTANTS: dict[str, Any] = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
    ".inf": float("inf"),
    "-.inf": float("-inf"),
    ".nan": float("nan"),
}

# What plain values are given without being asked; anything else was written out as `!tag`.
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
}

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed file: plain data, and where each value was written (by its path of keys and indices)."""

    data: Any
    file: str
    places: dict[Path_, tuple[int, int]]

    def origin(self, *path: str | int) -> Origin:
        """Where the value at `path`, or its nearest written parent, stands."""
        for length in range(len(path), -1, -1):
            place = self.places.get(tuple(path[:length]))
            if place is not None:
                return Origin(self.file, *place)
        return Origin(self.file)


def read(path: Path) -> Document:
    """Parse a YAML file. Raises ConfigError with file, line and column."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=str(path)) from error
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{len(text)} bytes; at most {MAX_BYTES} are read", where=str(path))
    try:
        return parse(text.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text (byte {error.start})", where=str(path)) from error


def parse(text: str, file: str) -> Document:
    """Parse YAML text; `file` names it in messages."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        raise ConfigError(str(error.problem or error.context), where=where) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError("not valid YAML", where=file) from error
    builder = _Builder(file)
    data = builder.build(node, ()) if node is not None else None
    return Document(data, file, builder.places)


class _Builder:
    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[Path_, tuple[int, int]] = {}
        self.nodes = 0

    def build(self, node: yaml.Node, path: Path_) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise self.error(node, f"more than {MAX_NODES} values or {MAX_DEPTH} levels, aliases included")
        if node.tag not in _TAGS:
            raise self.error(node, f"unknown tag {node.tag}")
        self.places.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
        return self.scalar(node)

    def mapping(self, node: yaml.MappingNode, path: Path_) -> dict[Any, Any]:
        out: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(key_node, "a key must be plain text or a number")
            key = self.scalar(key_node)
            if key in out:
                raise self.error(key_node, f"duplicate key '{key}'")
            place = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            self.places[(*path, key)] = place
            out[key] = self.build(value_node, (*path, key))
        return out

    def scalar(self, node: yaml.Node) -> Any:
        text: str = node.value
        if getattr(node, "style", None) is not None:  # quoted or block text
            return text
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INTEGER.fullmatch(text):
            return int(text.replace("_", ""))
        if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9_]+", text):
            return float(text.replace("_", ""))
        return text

    def error(self, node: yaml.Node, what: str) -> ConfigError:
        mark = node.start_mark
        return ConfigError(what, where=f"{self.file}:{mark.line + 1}:{mark.column + 1}")
