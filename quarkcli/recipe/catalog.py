"""Where recipes, schemes, model families and cache formats are found, and the names they have.

Lookup order: a file path; beside the recipe that asks; the user's folder (`$QUARK_HOME`, else `~/.config/quark`);
built-in. A file's name without `.yaml` is the registered name; `_` and `-` are the same. Nothing is registered by hand.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Literal

from quarkcli.errors import ConfigError, UsageError, near_misses
from quarkcli.recipe import load

Kind = Literal["schemes", "kv_cache", "ptq", "models"]
_NOUN = {"schemes": "scheme", "kv_cache": "KV cache scheme", "ptq": "recipe", "models": "model family"}
_LISTING = {
    "schemes": "quark schemes list",
    "kv_cache": "quark schemes list",
    "ptq": "quark recipes list",
    "models": "quark models list",
}


def built_in_folder() -> Path:
    """The shipped `recipes/` folder: inside the package in a wheel, beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "schemes").is_dir():
            return folder
    raise ConfigError("the built-in recipes are missing from this installation", where=str(package))


def user_folder() -> Path:
    """The user's own recipes, laid out like the built-in folder."""
    home = os.environ.get("QUARK_HOME")
    return Path(home) if home else Path.home() / ".config" / "quark"


def _same(name: str) -> str:
    return name.replace("-", "_").lower()


def files(kind: Kind, beside: Path | None = None) -> dict[str, Path]:
    """Name -> file. Built-in names first; a user file cannot take a built-in name."""
    found = {path.stem: path for path in sorted((built_in_folder() / kind).glob("*.yaml"))}
    taken = {_same(name) for name in found}
    for folder in (user_folder() / kind, beside):
        if folder is None or not folder.is_dir():
            continue
        for path in sorted(folder.glob("*.yaml")):
            if _same(path.stem) in taken:
                if folder != beside:
                    raise ConfigError(f"'{path.stem}' is a built-in {_NOUN[kind]}; rename the file", where=str(path))
                continue
            found[path.stem] = path
    return found


def find(kind: Kind, name: str, beside: Path | None = None) -> Path:
    """The file of a registered name. An unknown one is a UsageError (schemes) or ConfigError (recipes)."""
    known = files(kind, beside)
    for stem, path in known.items():
        if _same(stem) == _same(name):
            return path
    close = near_misses(name, known)
    hint = (f"did you mean {', '.join(close)}? " if close else "") + f"see '{_LISTING[kind]}'"
    error = ConfigError if kind in {"ptq", "models"} else UsageError
    raise error(f"unknown {_NOUN[kind]} '{name}'", hint=hint)


def find_recipe(name_or_path: str) -> Path:
    """A recipe by path or by registered name."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml", ".json"} or path.is_file():
        if path.is_file():
            return path
        raise ConfigError("no such recipe file", where=name_or_path, hint="see 'quark recipes list'")
    return find("ptq", name_or_path)


def document(path: Path) -> load.Document:
    """A parsed file, read once per process unless it changes."""
    resolved = path.resolve()
    try:
        stamp = resolved.stat().st_mtime_ns
    except OSError:
        stamp = 0
    return _document(resolved, path, stamp)


@lru_cache(maxsize=256)
def _document(resolved: Path, shown: Path, stamp: int) -> load.Document:
    return load.read(shown)
