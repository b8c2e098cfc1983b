"""Finds heads that are the embedding by config.json: with a tensor of their own, or without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quarkcli.family.config import TIED, text_config
from quarkcli.family.schema import FamilyModel, HeaderLike


def tied_head(family: FamilyModel, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> str | None:
    """Returns the head's name when it is the embedding and has no tensor of its own."""
    heads = _heads(family) if _ties(family, config) else []
    if not heads or any(f"{head}.weight" in headers for head in heads):
        return None
    return heads[0]


def doubled_head(
    family: FamilyModel, config: Mapping[str, Any], headers: Mapping[str, HeaderLike], tables: Iterable[str]
) -> tuple[str, str] | None:
    """Returns the tensors of a head and of the embedding, where the files have both of what config.json says is one.

    tables   tensors of embeddings, among which may be a table of positions (OPT) or one with spare rows (Llama 3.2)
    """
    heads = [f"{head}.weight" for head in _heads(family) if f"{head}.weight" in headers]
    if not heads or not _ties(family, config) or config.get(TIED) is False:
        return None
    rows, *width = headers[heads[0]].shape
    wide = [table for table in tables if list(headers[table].shape[1:]) == width]
    table = min(wide, key=lambda name: abs(headers[name].shape[0] - rows), default=None)
    return (heads[0], table) if table else None


def _heads(family: FamilyModel) -> list[str]:
    return [module for module in family.tail if module in family.roles.get("head", [])]


def _ties(family: FamilyModel, config: Mapping[str, Any]) -> bool:
    """True where the outer part of the config says so, which transformers reads, or that of the text model."""
    said = {part[TIED] for part in (text_config(config), config) if TIED in part}
    return any(said or {family.tied})
