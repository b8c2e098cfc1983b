"""Expands imports between recipe files, `imports: {name: path}` and `$import: name`, and keeps places. Torch-free.

A path is looked for beside the file that names it, at the root of the tree that file lies in (`configs/x` in
`ROOT/configs/y.yaml` is `ROOT/configs/x`), in the user's `units` folder and among the built-in units. What is built in
imports built-in files only, and no unit of the user's may have the path of a built-in one; the working directory has
no say. As a value, `$import` is replaced by the snippet, and keys beside it override the snippet's, deeply; a list of
names merges from left to right. As a list member, a snippet that is a list is spliced in and one that is a mapping
takes its place. A snippet has its own imports, in a first YAML document of its file if it is a list. An
import that its file does not use is a note: published ModelOpt recipes have such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from quarkcli.errors import ConfigError, did_you_mean
from quarkcli.recipe import catalog
from quarkcli.recipe.entries import Origin
from quarkcli.recipe.load import IMPORTS, Document, Path_

MARK = "$import"
_SUFFIXES = ("", ".yaml", ".yml")
_MAX_VALUES = 100_000


def expanded(document: Document) -> Document:
    """Returns `document` with every import in place and without its `imports` section.

    Raises ConfigError with the place.
    """
    expander = _Expander()
    data = expander.whole(_Source(document, (Path(document.file).resolve(),)), ())
    return Document(data, document.file, expander.places, notes=tuple(expander.notes))


@dataclass(frozen=True)
class _Source:
    """A file that is being copied, and those that import it, outermost first, itself last."""

    document: Document
    stack: tuple[Path, ...]

    def where(self, path: Path_) -> str:
        return str(self.document.origin(*path))


class _Expander:
    """Copies values out of documents into one tree and notes where each was written."""

    def __init__(self) -> None:
        self.places: dict[Path_, Origin] = {}
        self.count = 0
        self.used: set[tuple[Path, str]] = set()  # files, and names of their imports
        self.notes: dict[str, None] = {}  # a file may be imported more than once

    def whole(self, source: _Source, target: Path_) -> Any:
        """Returns all of a source, expanded, and notes the imports that it does not use."""
        found = self.copy(source, (), target)
        for name in _names(source):
            if (source.stack[-1], name) not in self.used:
                where = source.where((IMPORTS, name))
                self.notes[f"{where}: '{name}' is imported, and nothing in this file uses it"] = None
        return found

    def copy(self, source: _Source, path: Path_, target: Path_) -> Any:
        """Returns the value at `path` of a source, expanded, for the place `target` of the tree."""
        self.count += 1
        if self.count > _MAX_VALUES:
            raise ConfigError(
                f"imports expand to more than {_MAX_VALUES} values", where=source.where(path), kind="E-IMPORT"
            )
        value = source.document.at(path)
        if isinstance(value, dict):
            return self.mapping(source, path, target, value)
        self.places[target] = source.document.origin(*path)
        return self.items(source, path, target, value) if isinstance(value, list) else value

    def mapping(self, source: _Source, path: Path_, target: Path_, value: dict[Any, Any]) -> Any:
        merged: Any = {}
        for name in _listed(value[MARK], source, path) if MARK in value else ():
            merged = _merged(merged, self.snippet(source, name, path, target))
        self.places[target] = source.document.origin(*path)
        own = [key for key in value if key != MARK and (path or key != IMPORTS)]
        if own and not isinstance(merged, dict):
            raise ConfigError(
                "an import can only be overridden if it is a mapping", where=source.where(path), kind="E-IMPORT"
            )
        for key in own:
            merged[key] = _merged(merged.get(key), self.copy(source, (*path, key), (*target, key)))
        return merged

    def items(self, source: _Source, path: Path_, target: Path_, value: list[Any]) -> list[Any]:
        out: list[Any] = []
        for index, item in enumerate(value):
            place = (*path, index)
            if not isinstance(item, dict) or list(item) != [MARK]:
                out.append(self.copy(source, place, (*target, len(out))))
                continue
            for name in _listed(item[MARK], source, place):
                outer, self.places = self.places, {}
                found = self.snippet(source, name, place, ())
                members = found if isinstance(found, list) else [found]
                inner, self.places = self.places, outer
                self.places |= _moved(inner, target, len(out), spliced=members is found)
                out += members
        return out

    def snippet(self, source: _Source, name: str, path: Path_, target: Path_) -> Any:
        """Returns the whole of an imported file, expanded."""
        file = _file(source, name, path)
        self.used.add((source.stack[-1], name))
        resolved = _resolved(file)
        if resolved in source.stack:
            circle = " -> ".join(step.name for step in (*source.stack[source.stack.index(resolved) :], resolved))
            raise ConfigError(f"imports go in a circle: {circle}", where=source.where(path), kind="E-IMPORT")
        return self.whole(_Source(catalog.snippet(file), (*source.stack, resolved)), target)


def _moved(places: dict[Path_, Origin], target: Path_, first: int, *, spliced: bool) -> dict[Path_, Origin]:
    """Returns `places` of a snippet that becomes member `first` of the list at `target`.

    A list that is spliced in gives the members from there.
    """
    if not spliced:
        return {(*target, first, *path): place for path, place in places.items()}
    return {(*target, first + int(path[0]), *path[1:]): place for path, place in places.items() if path}


def _listed(value: Any, source: _Source, path: Path_) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return value
    raise ConfigError(
        f"{MARK} must be a name or a list of names, not {value!r}", where=source.where((*path, MARK)), kind="E-IMPORT"
    )


def _merged(old: Any, new: Any) -> Any:
    """Returns `new` over `old`: mappings key by key, everything else replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
    return new


# --- files -----------------------------------------------------------------------------------------------------------


def _names(source: _Source) -> Mapping[Any, Any]:
    """Returns the `imports` of a source."""
    names = source.document.imports if source.document.imports is not None else {}
    if not isinstance(names, Mapping):
        raise ConfigError(f"{IMPORTS} must map names to files", where=source.where((IMPORTS,)), kind="E-IMPORT")
    return names


def _file(source: _Source, name: str, path: Path_) -> Path:
    """Returns the file behind a name of the source's `imports`."""
    names = _names(source)
    if name not in names:
        otherwise = f"add it to 'imports', which has {', '.join(map(str, names)) or 'no name'}"
        hint = did_you_mean(name, map(str, names), otherwise)
        raise ConfigError(
            f"'{name}' is not among the imports of this file",
            where=source.where((*path, MARK)),
            hint=hint,
            kind="E-IMPORT",
        )
    wanted = names[name]
    where = source.where((IMPORTS, name))
    path_like = isinstance(wanted, str) and Path(wanted).parts and "\0" not in wanted
    if not path_like or Path(wanted).is_absolute() or ".." in Path(wanted).parts:
        raise ConfigError(
            f"an import must name a file, not {_shortened(repr(wanted))}",
            where=where,
            hint="write configs/numerics/fp8, for example",
            kind="E-IMPORT",
        )
    return _found(source.document.file, wanted, where)


def _found(importer: str, wanted: str, where: str) -> Path:
    """Returns the file that `wanted` means in the file `importer`."""
    known = _built_in(wanted)
    if not _is_built_in(importer):
        known = _own(importer, wanted, known, where) or known
    if known is not None:
        return known
    roots = (_users(), _units())
    names = [path.relative_to(root).with_suffix("").as_posix() for root in roots for path in _all(root)]
    otherwise = "put it beside this file or into the units folder of $QUARK_HOME, or name a built-in one"
    hint = did_you_mean(wanted, names, otherwise)
    raise ConfigError(f"no file '{_shortened(wanted)}' to import", where=where, hint=hint, kind="E-IMPORT")


def _own(importer: str, wanted: str, known: Path | None, where: str) -> Path | None:
    """Returns the file of the user's that is meant; `known` is the built-in one of this path."""
    file = _resolved(Path(importer).absolute())
    trees = [folder.parent for folder in file.parents if folder.name == Path(wanted).parts[0]]
    beside = next((path for root in (file.parent, *trees) if (path := _in(root, wanted))), None)
    own = _in(_users(), wanted, linked=True)
    if beside is None and own is not None and known is not None:
        raise ConfigError(
            f"'{wanted}' is the name of a built-in unit and of the file {own}", where=where, kind="E-NAME-TAKEN"
        )
    return beside or own


def _users() -> Path:
    return _resolved(catalog.user_folder() / "units")


def _units() -> Path:
    return catalog.built_in_folder() / "units"


# What is built in does not change while a program runs, and lists of recipes ask for it hundreds of times.
@lru_cache(maxsize=256)
def _is_built_in(importer: str) -> bool:
    return _resolved(Path(importer).absolute()).is_relative_to(catalog.built_in_folder())


@lru_cache(maxsize=256)
def _built_in(wanted: str) -> Path | None:
    return _in(_units(), wanted)


@lru_cache(maxsize=256)
def _resolved(path: Path) -> Path:
    return path.resolve()


def _in(root: Path, wanted: str, *, linked: bool = False) -> Path | None:
    """Returns the file `wanted` below a folder. Only where `linked` may it be a link that leads elsewhere."""
    if linked and not catalog.is_users_folder(root):
        return None
    candidates = [root / f"{wanted}{suffix}" for suffix in _SUFFIXES]
    return next((path for path in candidates if catalog.is_within(path, root) or (linked and _is_file(path))), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _all(root: Path) -> list[Path]:
    if not catalog.is_users_folder(root):
        return []
    return sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES[1:])
