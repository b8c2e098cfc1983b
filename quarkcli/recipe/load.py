"""Reads YAML strictly, on `yaml.compose`, and remembers line and column of every value.

YAML 1.1 surprises are removed: duplicate keys are refused, `on`, `off`, `yes` and `no` are text, `012` is text, `1e-4`
is a number. Aliases may not expand a document beyond `MAX_NODES` values, and a file may not exceed `MAX_BYTES`. JSON is
read as the YAML that it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quarkcli.documents.native import native
from quarkcli.errors import ConfigError
from quarkcli.recipe.entries import SETTING, Origin

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 64
MAX_DIGITS = 100  # so that every whole number fits a float
_MAX_C_NESTING = 2000
IMPORTS = "imports"

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
    """A parsed file: plain data, and where each value was written (by its path of keys and indices).

    imports  its `imports` section as written, or None; the places of its values begin with `IMPORTS`
    notes    what to tell the user about its imports, with places
    """

    data: Any
    file: str
    places: dict[Path_, Origin]
    imports: Any = None
    notes: tuple[str, ...] = ()

    def origin(self, *path: str | int) -> Origin:
        """Returns the place of the value at `path`, or of its nearest written parent."""
        for length in range(len(path), -1, -1):
            place = self.places.get(tuple(path[:length]))
            if place is not None:
                return place
        return Origin(self.file)

    def blamed(self, *path: str | int) -> Origin:
        """Returns the place to name in an error about the value at `path`.

        That is the `--set` that changed a part of it, else its own place.
        """
        changes = (o for p, o in self.places.items() if p[: len(path)] == path and o.text.startswith(SETTING))
        return next(changes, self.origin(*path))

    def at(self, path: Path_) -> Any:
        """Returns the value at a path. Raises KeyError or IndexError for one that is not there."""
        value = self.data
        for step in path:
            value = value[step]
        return value


def of_data(data: Any, name: str) -> Document:
    """Returns Python data as a document; the place of a value is its path, as in `config.quant_cfg[3]`.

    Raises ConfigError for more than a file may hold.
    """
    places: dict[Path_, Origin] = {}
    waiting: list[tuple[Any, Path_, str]] = [(data, (), "")]
    while waiting:
        value, path, text = waiting.pop()
        if len(places) > MAX_NODES or len(path) > MAX_DEPTH:
            raise ConfigError(
                f"has more than {MAX_NODES} values or {MAX_DEPTH} levels", where=name, kind="E-RECIPE-YAML"
            )
        places[path] = Origin(name, path=text)
        if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
            raise ConfigError(
                f"a number has more than {MAX_DIGITS} digits", where=f"{name}{text}", kind="E-RECIPE-YAML"
            )
        if isinstance(value, Mapping):
            waiting += [(item, (*path, key), f"{text}{_step(key)}") for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(item, (*path, index), f"{text}[{index}]") for index, item in enumerate(value)]
    return Document(native(data), name, places)


def _step(key: Any) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


def read(path: Path) -> Document:
    """Parses a YAML or JSON file of one document. Raises ConfigError with file, line and column."""
    return parse(_yaml(path), str(path))


def read_snippet(path: Path) -> Document:
    """As `read`; a first document that holds nothing but `imports` may stand before the one that counts."""
    return parse(_yaml(path), str(path), snippet=True)


def read_text(path: Path) -> str:
    """Returns a file in UTF-8 of at most `MAX_BYTES`. Raises ConfigError for any other."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=str(path), kind="E-RECIPE-YAML") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"has {len(data)} bytes, and a recipe may have {MAX_BYTES}", where=str(path), kind="E-RECIPE-YAML"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text (byte {error.start})", where=str(path), kind="E-RECIPE-YAML") from error


def _yaml(path: Path) -> str:
    # JSON is YAML but for tabs, which it has nowhere but between tokens.
    found = read_text(path)
    return found.replace("\t", " ") if path.suffix == ".json" else found


def parse(text: str, file: str, *, snippet: bool = False) -> Document:
    """Parses YAML text; `file` names it in messages. `snippet` as in `read_snippet`."""
    try:
        nodes = _nodes(text, snippet)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        what = str(error.problem or error.context)
        if what.startswith("but ") and error.context:  # the end of the parser's sentence
            what = f"{error.context}, {what}"
        raise ConfigError(what, where=where, kind="E-RECIPE-YAML") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError("not valid YAML", where=file, kind="E-RECIPE-YAML") from error
    builder = _Builder(file)
    if len(nodes) > 2:
        raise builder.error(nodes[2], "has more than two YAML documents: one with imports and one that uses them")
    data = builder.build(nodes[-1], ()) if nodes else None
    if len(nodes) < 2:
        return Document(data, file, builder.places, data.get(IMPORTS) if isinstance(data, dict) else None)
    head = _Builder(file)
    first = head.build(nodes[0], ())
    if not isinstance(first, dict) or set(first) != {IMPORTS} or (isinstance(data, dict) and IMPORTS in data):
        raise head.error(nodes[0], f"the first of two YAML documents must hold '{IMPORTS}' and nothing else")
    places = {path: place for path, place in head.places.items() if path[:1] == (IMPORTS,)}
    return Document(data, file, places | builder.places, first[IMPORTS])


def _loader(text: str) -> Any:
    """Returns the loader of libyaml where it is installed, which is five times faster, else that of Python.

    It composes recursively in C, so what could nest deeper than a stack holds goes to the reader in Python.
    """
    nesting = sum(text.count(mark) for mark in ("[", "{", "- ", "? ")) + max(map(_indent, text.splitlines()), default=0)
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader) if nesting < _MAX_C_NESTING else yaml.SafeLoader


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _nodes(text: str, snippet: bool) -> list[yaml.Node]:
    loader = _loader(text)
    if snippet:
        return list(yaml.compose_all(text, Loader=loader))
    node = yaml.compose(text, Loader=loader)
    return [node] if node is not None else []


class _Builder:
    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[Path_, Origin] = {}
        self.nodes = 0

    def build(self, node: yaml.Node, path: Path_) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise self.error(node, f"has more than {MAX_NODES} values or {MAX_DEPTH} levels, aliases included")
        if node.tag not in _TAGS:
            raise self.error(node, f"unknown tag {node.tag}")
        self.places.setdefault(path, self.origin(node))
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
            self.places[(*path, key)] = self.origin(key_node)
            out[key] = self.build(value_node, (*path, key))
        return out

    def scalar(self, node: yaml.Node) -> Any:
        text: str = node.value
        if getattr(node, "style", None):  # quoted or block text; libyaml says "" for plain
            return text
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INTEGER.fullmatch(text):
            if len(text) > MAX_DIGITS:
                raise self.error(node, f"a number has {len(text)} characters, and it may have {MAX_DIGITS}")
            return int(text.replace("_", ""))
        if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9_]+", text):
            return float(text.replace("_", ""))
        return text

    def origin(self, node: yaml.Node) -> Origin:
        return Origin(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def error(self, node: yaml.Node, what: str) -> ConfigError:
        return ConfigError(what, where=str(self.origin(node)), kind="E-RECIPE-YAML")
