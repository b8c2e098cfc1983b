"""Finds recipes, schemes, model families and cache formats by name.

Lookup order: a file path; beside the recipe that asks; the user's folder (`$QUARK_HOME`, else `~/.config/quark`);
built-in. A file's name without `.yaml` is the registered name; `_` and `-` are the same. A scheme may list `aliases`.
Nothing is registered by hand, but a Python program can add schemes of its own while it runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal

from quarkcli.errors import ConfigError, QuarkError, UsageError, near_misses, some
from quarkcli.recipe import load

Kind = Literal["schemes", "kv_cache", "attention", "ptq", "models"]
KINDS: tuple[Kind, ...] = ("schemes", "kv_cache", "attention", "ptq", "models")
# Kinds that are schemes -> what they are for, as listings say it.
SCHEMES: dict[Kind, str] = {"schemes": "weights", "kv_cache": "kv-cache", "attention": "attention"}
_NOUN = {
    "schemes": "scheme",
    "kv_cache": "KV cache scheme",
    "attention": "attention scheme",
    "ptq": "recipe",
    "models": "model family",
}
_LISTING = {
    "schemes": "quark schemes list",
    "kv_cache": "quark schemes list",
    "attention": "quark schemes list",
    "ptq": "quark recipes list",
    "models": "quark models list",
}
# How a name of a kind is given, and which commands show it.
_FLAGS: dict[Kind, tuple[str, str]] = {"schemes": ("--scheme", "schemes"), "ptq": ("--recipe", "recipes")}
_SUFFIXES = {".yaml", ".yml", ".json"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_REGISTERED = Path("<registered>")  # stands for the folder of what a program registered
_registered: dict[Path, load.Document] = {}


# Where NVIDIA keeps its general recipes, and how their names ended before the cache had a prefix.
_PEER_FOLDER = ("general", "ptq")
_PEER_FOLDERS = {"models", "huggingface", "ptq"}
_OLDER_CACHE = re.compile(r"-(fp8|nvfp4|fp8_cast|nvfp4_cast)_kv$")


@lru_cache(maxsize=1)
def built_in_folder() -> Path:
    """Returns the shipped `recipes/` folder: inside the package in a wheel, beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "schemes").is_dir():
            return folder
    raise ConfigError(
        "the built-in recipes are missing from this installation", where=str(package), kind="E-INSTALLATION"
    )


def user_folder() -> Path:
    """Returns the user's own recipes, laid out like the built-in folder; it need not exist."""
    home = os.environ.get("QUARK_HOME")
    return Path(home) if home else Path(os.path.expanduser("~")) / ".config" / "quark"  # noqa: PTH111 - never raises


def is_users_folder(folder: Path) -> bool:
    """True when a folder below the user's folder exists and can be read. In a container `~` may belong to nobody."""
    try:
        return folder.is_absolute() and folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
    except OSError:
        return False


def is_within(path: Path, folder: Path) -> bool:
    """True when a file lies below a folder after links are followed. Files from others may not reach outside it."""
    try:
        return path.is_file() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a name too long, one with a NUL, links in a circle
        return False


def same(name: str) -> str:
    """Returns the form in which names are compared: `_` and `-`, and capitals, make no difference."""
    return name.replace("-", "_").lower()


def files(kind: Kind, beside: Path | None = None) -> dict[str, Path]:
    """Returns a mapping from name to file, built-in names first.

    A file of the user cannot take a built-in name, nor one that a program registered.

    Raises ConfigError for one in the user's folder that does. Beside a recipe lie other recipes as well: there `find`
    refuses the file when its name is asked for.
    """
    found = {**_built_in(kind), **_added(kind)}
    beside = _foreign(beside)
    users = user_folder() / kind
    folders = [users] if is_users_folder(users) else []
    folders += [beside] if beside is not None and beside.is_dir() else []
    taken = _owners(kind, found) if folders else {}
    for folder in folders:
        own: dict[str, Path] = {}
        for path in sorted(folder.glob("*.yaml")):
            if folder == beside and not is_within(path, folder):
                continue
            mine = {same(name): path for name in (path.stem, *_aliases_of(kind, path))}
            owners = [(taken | own)[name] for name in mine if name in taken or name in own]
            if owners and folder != beside:
                raise _refused(kind, path, owners[0])
            if not owners:
                own |= mine
                found = {name: other for name, other in found.items() if same(name) != same(path.stem)}
                found[path.stem] = path
    return found


def names(kind: Kind, beside: Path | None = None) -> dict[str, Path]:
    """Returns a mapping from every name and alias to its file."""
    known = files(kind, beside)
    return known | {alias: path for path in known.values() for alias in _aliases_of(kind, path)}


def find(kind: Kind, name: str, beside: Path | None = None) -> Path:
    """Returns the file of a registered name or alias.

    An unknown one is a UsageError (schemes) or ConfigError (recipes).
    """
    if not isinstance(name, str):  # of a Python program
        what = f"{_NOUN[kind]}: its name must be text, not {shortened(name)}"
        raise UsageError(what, hint=f"see '{_LISTING[kind]}'", kind="E-PYTHON-CALL")
    beside = _foreign(beside)
    known = names(kind, beside)
    for one, path in known.items():
        if same(one) == same(name):
            _refuse_hidden(kind, path, name, beside)
            return path
    if kind == "schemes" and (answer := _elsewhere(name)):
        raise UsageError(f"no scheme is called '{name}' here", hint=answer, kind="E-SCHEME-UNKNOWN")
    close = near_misses(name, [*known, *(_presets() if kind == "ptq" else ())])
    hint = (f"did you mean {', '.join(close)}? " if close else "") + f"see '{_LISTING[kind]}'"
    hint = _misplaced(kind, name) or hint
    what = f"unknown {_NOUN[kind]} '{name}'"
    if kind == "models":
        raise ConfigError(what, hint=hint, kind="E-FAMILY-FILE")
    if kind == "ptq":
        raise ConfigError(what, hint=hint, kind="E-RECIPE-NOT-FOUND")
    raise UsageError(what, hint=hint, kind="E-SCHEME-UNKNOWN")


def _misplaced(kind: Kind, name: str) -> str | None:
    """Returns what to type for a scheme that was given as a recipe or a file, or the other way round; else None."""
    if kind in SCHEMES and (own := _scheme_here(kind, name)):
        return f"put {own} at {user_folder() / kind / own.stem}.yaml, then use the name {own.stem}"
    if kind == "ptq" and os.path.isfile(f"{name}.yaml"):  # noqa: PTH113 - never raises
        return f"give {name}.yaml, the file in this directory"
    if kind == "schemes" and Path(name).suffix in _SUFFIXES and Path(name).is_file():
        return f"use --recipe {name}: --scheme takes a name, no file"
    for other, (flag, listing) in _FLAGS.items() if kind in _FLAGS else ():
        known = names(other).keys() | (_presets().keys() if other == "ptq" else set())
        if other != kind and same(name) in map(same, known):
            return f"{name} is a {_NOUN[other]}: use {flag} {name} ('quark {listing} show {name}' prints it)"
    return None


def _scheme_here(kind: Kind, name: str) -> Path | None:
    """Returns the file of a scheme that is given by its path, or lies under its name in the working directory."""
    path = Path(name if Path(name).suffix in _SUFFIXES else f"{name}.yaml")
    try:
        return path if path.is_file() and _is_scheme(path, kind) else None
    except (OSError, QuarkError):  # what is wrong with it is said when it is asked for
        return None


def _elsewhere(name: str) -> str | None:
    """Returns what to type for a name that people know from elsewhere, and why; None for any other."""
    row = from_elsewhere("words", name)
    return f"use {' or '.join(row['type'])}: {row['why']}" if row else None


def from_elsewhere(kind: Literal["words", "flags"], name: str) -> dict[str, Any] | None:
    """Returns the row of words.yaml that has a name: `type`, what to type here, and `why`; None for any other."""
    return next((row for row in elsewhere()[kind] if same(name) in row["names"]), None)


def elsewhere() -> dict[str, Any]:
    """Returns what words.yaml says of names in other tools."""
    found: dict[str, Any] = document(built_in_folder() / "words.yaml").data
    return found


def register(name: str, document: load.Document) -> None:
    """Makes a scheme known under `name` until the process ends or `unregister`. Raises UsageError for a bad name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be the name of a scheme",
            hint="use only letters, digits, '_', '-' and '.'",
            kind="E-SCHEME-NAME",
        )
    taken = {same(known) for known in names("schemes")}
    for wanted in (name, *_given_aliases(document)):
        if same(wanted) in taken:
            raise UsageError(f"a scheme '{wanted}' exists already", hint="choose another name", kind="E-SCHEME-NAME")
    _registered[_REGISTERED / f"{name}.yaml"] = document


def unregister(name: str) -> None:
    """Forgets what `register` made known. Raises UsageError for any other name."""
    path = find("schemes", name)
    if path not in _registered:
        own = "built in" if path.parent == built_in_folder() / "schemes" else f"the file {path}"
        raise UsageError(
            f"scheme '{path.stem}' cannot be removed: it is {own}",
            hint="remove only schemes that were registered in this process",
            kind="E-SCHEME-NAME",
        )
    del _registered[path]


def _foreign(beside: Path | None) -> Path | None:
    """Returns a folder in which schemes may lie beside a recipe; those of built-in recipes are built in."""
    return None if beside is not None and beside.parent == built_in_folder() else beside


@cache
def _built_in(kind: Kind) -> Mapping[str, Path]:
    return {path.stem: path for path in sorted((built_in_folder() / kind).glob("*.yaml"))}


def _added(kind: Kind) -> dict[str, Path]:
    return {path.stem: path for path in _registered} if kind == "schemes" else {}


def _owners(kind: Kind, known: dict[str, Path]) -> dict[str, Path]:
    """Returns the file behind every name and alias, in the form in which names are compared."""
    return {same(name): path for stem, path in known.items() for name in (stem, *_aliases_of(kind, path))}


def _aliases_of(kind: Kind, path: Path) -> list[str]:
    """Returns the aliases a scheme gives itself.

    Only files with the word are parsed: a start-up need not read them all.
    """
    if kind != "schemes":
        return []
    if path in _registered:
        return _given_aliases(document(path))
    return _aliases_in(path, _stamp(path))


@lru_cache(maxsize=256)
def _aliases_in(path: Path, stamp: int) -> list[str]:
    try:
        return _given_aliases(document(path)) if b"aliases" in path.read_bytes() else []
    except (OSError, QuarkError):  # what is wrong with it is said when it is asked for
        return []


def _given_aliases(document: load.Document) -> list[str]:
    given = document.data.get("aliases") if isinstance(document.data, dict) else None
    return [str(alias) for alias in given] if isinstance(given, list) else []


def _refuse_hidden(kind: Kind, owner: Path, name: str, beside: Path | None) -> None:
    """A scheme beside the recipe that has the name asked for, and would be passed over for `owner`, is an error."""
    if kind != "schemes" or beside is None or not beside.is_dir():
        return
    for path in beside.glob("*.yaml"):
        if is_within(path, beside) and same(path.stem) == same(name) and path != owner and _is_scheme(path):
            raise _refused(kind, path, owner)


def _is_scheme(path: Path, kind: Kind = "schemes") -> bool:
    return is_scheme(document(path).data, kind)


def is_scheme(data: object, kind: Kind = "schemes") -> bool:
    """True for the content of a file that describes a scheme of a kind."""
    slots = {"weight"} if kind == "schemes" else {"k", "v", "q", "p"}
    return isinstance(data, dict) and not slots.isdisjoint(data) and "schema" not in data


def _refused(kind: Kind, path: Path, owner: Path) -> ConfigError:
    """Returns the error for a `path` that has a name of `owner`."""
    if owner in _registered:
        what = f"a registered {_NOUN[kind]}"
    elif owner.parent == built_in_folder() / kind:
        what = f"a built-in {_NOUN[kind]}"
    else:
        what = f"taken by {owner}"
    return ConfigError(f"'{path.stem}' is {what}; rename the file", where=str(path), kind="E-NAME-TAKEN")


def find_recipe(name_or_path: str) -> Path:
    """Returns the file of a recipe by path, registered name, or a name of NVIDIA's (constant, path, old form)."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    preset = _presets().get(name_or_path)
    if preset is not None:
        return built_in_folder() / "units" / f"{preset}.yaml"
    modelled = _of_a_model(path)
    if modelled is not None:
        return modelled
    foreign = path.parent.parts[-2:] == _PEER_FOLDER
    if path.is_dir() and not foreign and same(name_or_path) not in _owners("ptq", files("ptq")):
        raise ConfigError(
            "this is a directory, not a recipe", where=name_or_path, hint=_inside(path), kind="E-RECIPE-NOT-FOUND"
        )
    if path.suffix in _SUFFIXES and not foreign:
        raise ConfigError(
            "no such recipe file",
            where=name_or_path,
            hint="run 'quark recipes list' for the names, or correct the path",
            kind="E-RECIPE-NOT-FOUND",
        )
    name = (
        path.with_suffix("").name
        if foreign and path.suffix in {".yaml", ".yml"}
        else path.name
        if foreign
        else name_or_path
    )
    older = _OLDER_CACHE.sub(r"-kv_\1", name)
    return find("ptq", older if same(older) in _owners("ptq", files("ptq")) else name)


def _inside(folder: Path) -> str:
    """Returns which file of a directory to give instead."""
    within = sorted(str(path) for path in folder.glob("*") if path.suffix in _SUFFIXES)
    return (
        f"give a file in it: {some(within, 3)}"
        if within
        else "give a file, or a name that 'quark recipes list' shows: there is no recipe in it"
    )


def _of_a_model(path: Path) -> Path | None:
    """Returns the recipe of NVIDIA's for one model. It lies in a folder named after the model.

    The path is `models/NAME/RECIPE.yaml`.
    """
    folders = [part for part in path.parent.parts if part not in _PEER_FOLDERS]
    if not folders or len(folders) == len(path.parent.parts):
        return None
    stem = path.stem if path.suffix in {".yaml", ".yml"} else path.name
    wanted = {_letters(f"{folder}{stem}") for folder in folders}
    return next((file for name, file in files("ptq").items() if _letters(name) in wanted), None)


def _letters(name: str) -> str:
    return re.sub(r"[-_.]", "", name).lower()


@lru_cache(maxsize=1)
def _presets() -> dict[str, str]:
    """Returns a mapping from NVIDIA's constants (`NVFP4_DEFAULT_CFG` ...) to units."""
    path = built_in_folder() / "units" / "presets.yaml"
    found = load.read(path).data if path.is_file() else {}
    return dict(found)


def document(path: Path) -> load.Document:
    """Returns a parsed file, read once per process unless it changes; or what a program registered."""
    if path in _registered:
        return _registered[path]
    return _document(path.resolve(), path, _stamp(path))


def snippet(path: Path) -> load.Document:
    """Returns a parsed file that recipes import, read once per process unless it changes."""
    return _snippet(path, _stamp(path))


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=256)
def _document(resolved: Path, shown: Path, stamp: int) -> load.Document:
    return load.read(shown)


@lru_cache(maxsize=256)
def _snippet(path: Path, stamp: int) -> load.Document:
    return load.read_snippet(path)
