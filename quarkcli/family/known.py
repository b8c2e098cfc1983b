"""Chooses the family file that fits a checkpoint. It reads a few lines of each file and parses only the chosen one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from quarkcli.errors import ConfigError, ModelError
from quarkcli.family.config import text_config
from quarkcli.family.infer import infer
from quarkcli.family.schema import FamilyModel, HeaderLike
from quarkcli.family.spelling import check_wrappers, spelled
from quarkcli.recipe import catalog
from quarkcli.recipe.load import Document
from quarkcli.recipe.schema import validate

# What a family does not take over from another.
_OWN = ("extends", "summary", "architectures", "model_types", "texts", "own_code")


@dataclass(frozen=True)
class Card:
    """Holds the entry of a family in a listing. Its file is not checked."""

    name: str
    file: Path
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    texts: tuple[str, ...]
    extends: str | None
    experts: bool | None  # None: as in the family it extends


def load(path: Path) -> FamilyModel:
    """Returns a family file, with what it takes over from others. Raises ConfigError with place."""
    return validate(FamilyModel, _merged(catalog.document(path), path, ()))


def _merged(document: Document, path: Path, seen: tuple[str, ...]) -> Document:
    """Returns the document with the keys of the family it extends below its own."""
    data = document.data
    name = data.get("extends") if isinstance(data, dict) else None
    if not isinstance(name, str):
        return document
    where = str(document.origin("extends"))
    if path.stem in seen:
        raise ConfigError(
            f"families extend each other: {' -> '.join((*seen, path.stem))}", where=where, kind="E-FAMILY-FILE"
        )
    try:
        parent = catalog.find("models", name)
    except ConfigError as error:
        raise ConfigError(error.what, where=where, hint=error.hint, kind="E-FAMILY-FILE") from error
    base = _merged(catalog.document(parent), parent, (*seen, path.stem)).data
    merged = {key: value for key, value in base.items() if key not in _OWN}
    for key, value in data.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
        if value is None:
            del merged[key]
    return replace(document, data=merged)


def cards() -> list[Card]:
    """Returns every family, built-in ones first, then the user's."""
    return [card(name, path) for name, path in catalog.files("models").items()]


def card(name: str, path: Path) -> Card:
    """Returns the entry of a family's file."""
    return _card(name, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=512)
def _card(name: str, path: Path, stamp: int) -> Card:
    text = path.read_text(encoding="utf-8", errors="replace")
    extends = re.search(r"^extends:[ ]*([\w.-]+)", text, re.MULTILINE)
    experts = re.search(r"^experts:[ ]*(\S*)", text, re.MULTILINE)
    return Card(
        name,
        path,
        _listed(text, "architectures", path),
        _listed(text, "model_types", path),
        _listed(text, "texts", path),
        extends[1] if extends else None,
        experts[1] not in {"null", "~"} if experts else None if extends else False,
    )


def _listed(text: str, key: str, path: Path) -> tuple[str, ...]:
    """Returns a list of plain words at the top level; written in another way, the whole file is parsed for it."""
    if not re.search(rf"^['\"]?{key}['\"]?[ ]*:", text, re.MULTILINE):
        return ()
    found = re.search(rf"^{key}:[ ]*\[([\w\s,.-]*)\]", text, re.MULTILINE)
    if found:
        return tuple(word.strip() for word in found[1].split(",") if word.strip())
    data = catalog.document(path).data
    values = data.get(key) if isinstance(data, dict) else None
    return tuple(str(value) for value in values) if isinstance(values, list) else ()


def has_experts(card: Card) -> bool:
    """True when a family has routed experts, by its own file or the one it extends."""
    known = {other.name.replace("-", "_"): other for other in cards()}
    for _ in known:
        if card.experts is not None or card.extends is None:
            break
        parent = known.get(card.extends.replace("-", "_"))
        if parent is None:
            break
        card = parent
    return bool(card.experts)


def identify(config: Mapping[str, Any]) -> tuple[str, FamilyModel] | None:
    """Returns the family that names the config's architecture, else its model type; None when there is none.

    Among several with the architecture, a user's own file, then one that names the model type too. A family that says
    which text models it wraps is that of no other.
    """
    architecture = (config.get("architectures") or [None])[0]
    model_type = config.get("model_type")
    text = text_config(config)
    inner = None if text is config else text.get("model_type")
    built_in = catalog.built_in_folder()

    def rank(card: Card) -> tuple[bool, bool, bool]:
        named, typed = architecture in card.architectures, model_type in card.model_types
        return named, (named or typed) and built_in not in card.file.parents, typed

    best = max((card for card in cards() if inner in (None, *(card.texts or (inner,)))), key=rank, default=None)
    if best is None or not any(rank(best)):
        return None
    return best.name, load(best.file)


def for_checkpoint(config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> tuple[str, FamilyModel, bool]:
    """Returns (name, family in this checkpoint's spelling, inferred) for a checkpoint."""
    check_wrappers(headers)
    found = identify(config)
    if found is not None:
        return found[0], spelled(found[1], headers), False
    found_here = infer(config, headers)
    _check_split(found_here)
    return str(config.get("model_type") or "unknown"), found_here, True


def _check_split(family: FamilyModel) -> None:
    """Refuses to guess whether rows of gate and up alternate: no shape tells, and a server would compute wrongly."""
    experts = family.experts
    mixed = [name for name, rule in experts.fused.items() if rule.split == "interleaved"] if experts else []
    if mixed and experts:
        raise ModelError(
            "gate and up of all experts are one tensor with a bias, and the order of their rows is unknown",
            where=f"{family.blocks}.*.{experts.path}.{mixed[0]}",
            hint="write a family file with 'split' ('quark models infer MODEL' begins one); docs/models.md explains it",
            kind="E-MODEL-FAMILY",
        )
