"""Reads NVIDIA ModelOpt's recipes that ask for a search among formats (`recipe_type: auto_quantize`). Torch-free.

What the file says becomes candidates, rules which weights may get which of them, and a budget; how the candidates are
scored is ours. Not quantizing is a candidate of every rule that allows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quarkcli.errors import ConfigError
from quarkcli.recipe import catalog, imports, schema
from quarkcli.recipe.load import Document
from quarkcli.recipe.recipe import Recipe, from_config

SECTION = "auto_quantize"
BASELINE = "baseline"
_DEFAULT_BITS = 4.8


@dataclass(frozen=True)
class Rule:
    """Weights whose modules match a pattern, and the formats that they may get.

    keep   they may stay as they are, too
    """

    patterns: tuple[str, ...]
    formats: tuple[str, ...]
    keep: bool = True


@dataclass(frozen=True)
class Search:
    """A search as a file asks for it.

    formats         name -> the recipe that gives every weight this format
    rules           the first that matches a module holds
    bits            mean bits per weight
    disabled        modules that stay as they are
    uncounted       modules that do not count in the budget
    active_experts  routed experts count by the share of them that a token runs through, not in full
    expert_ratio    that share; None: the model's
    rows            rows of text to score with; None: it does not say
    notes           what has no meaning here
    """

    formats: Mapping[str, Recipe]
    rules: Sequence[Rule]
    bits: float
    disabled: Sequence[str] = ()
    uncounted: Sequence[str] = ()
    active_experts: bool = False
    expert_ratio: float | None = None
    rows: int | None = None
    notes: list[str] = field(default_factory=list)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


class _Cost(_Strict):
    active_moe_expert_ratio: float | None = Field(default=None, gt=0, le=1)


class _Constraints(_Strict):
    effective_bits: float = Field(default=_DEFAULT_BITS, gt=0, le=16)
    cost_model: Literal["weight", "active_moe"] = "weight"
    cost: _Cost | None = None


class _Space(_Strict):
    module_name_patterns: list[str] = Field(min_length=1)
    candidate_formats: list[dict[str, Any]] = Field(min_length=1)
    allow_no_quant: bool = True


class _Section(_Strict):
    constraints: _Constraints
    candidate_formats: list[dict[str, Any]] = []
    module_search_spaces: list[_Space] = []
    auto_quantize_method: Literal["gradient", "kl_div"] = "gradient"
    score_size: int | None = Field(default=None, gt=0)
    disabled_layers: list[str] = []
    cost_excluded_layers: list[str] = []
    kv_cache: dict[str, Any] | None = None


class _Metadata(_Strict):
    recipe_type: Literal["auto_quantize"]
    description: str = ""


class _File(_Strict):
    metadata: _Metadata
    quantize: dict[str, Any] | None = None
    auto_quantize: _Section


def from_file(path: Path) -> Search:
    """Returns the search that a file asks for. Raises ConfigError with the place."""
    _check_file(path)
    raw = catalog.document(path)
    document = imports.expanded(raw)
    if not isinstance(document.data, Mapping) or SECTION not in document.data:
        raise ConfigError(
            "this is not a recipe for a search: it has no section 'auto_quantize'",
            where=str(document.origin()),
            hint=f"run 'quark quantize --recipe {path}', or 'quark search --schemes nvfp4,fp8'",
            kind="E-RECIPE-KIND",
        )
    file = schema.validate(_File, document)
    section = file.auto_quantize
    if (file.quantize is None) == (not section.candidate_formats):
        raise ConfigError(
            "auto_quantize.candidate_formats and 'quantize' exclude each other: 'quantize' is for modules that no "
            "search space names",
            where=str(document.origin(SECTION)),
            kind="E-RECIPE-KIND",
        )
    formats: dict[str, Recipe] = {}
    rules = []
    for index, space in enumerate(section.module_search_spaces):
        place = (SECTION, "module_search_spaces", index, "candidate_formats")
        names = _formats(raw, document, place, formats)
        rules.append(Rule(tuple(space.module_name_patterns), names, space.allow_no_quant))
    if file.quantize is not None:
        formats[BASELINE] = from_config(file.quantize, f"{path} quantize")
        rules.append(Rule(("*",), (BASELINE,), keep=False))
    else:
        rules.append(Rule(("*",), _formats(raw, document, (SECTION, "candidate_formats"), formats)))
    cost = section.constraints.cost
    return Search(
        formats, rules, section.constraints.effective_bits, section.disabled_layers, section.cost_excluded_layers,
        section.constraints.cost_model == "active_moe", cost.active_moe_expert_ratio if cost is not None else None,
        section.score_size, [*document.notes, *_notes(document, section)],
    )  # fmt: skip


def _check_file(path: Path) -> None:
    """Raises ConfigError unless there is such a file. Names of recipes do not do: none of them is for a search."""
    if path.is_file():
        return
    raise ConfigError(
        "this is a directory, not a file" if path.is_dir() else "there is no such file",
        where=str(path),
        hint="give a file with an auto_quantize section, not the name of a recipe; or use --schemes nvfp4,fp8 instead",
        kind="E-RECIPE-NOT-FOUND",
    )


def _formats(
    raw: Document, document: Document, place: tuple[str | int, ...], formats: dict[str, Recipe]
) -> tuple[str, ...]:
    """Returns the names of the formats listed at a place, and adds their recipes to `formats`.

    A format is called as the file imports it; one that is written out, by its number.
    """
    names = []
    for index, data in enumerate(document.at(place)):
        written = raw.at((*place, index))
        imported = written.get(imports.MARK) if isinstance(written, Mapping) and len(written) == 1 else None
        name = imported if isinstance(imported, str) else f"format{len(formats) + 1}"
        names.append(name)
        if name not in formats:
            formats[name] = from_config(data, f"{document.origin(*place, index)}")
    return tuple(names)


def _notes(document: Document, section: _Section) -> list[str]:
    found = []
    if section.auto_quantize_method != "gradient":
        text = "auto_quantize_method has no effect: quark always scores formats by the Fisher information"
        found.append((("auto_quantize_method",), text))
    if section.kv_cache is not None:
        found.append((("kv_cache",), "a search leaves the KV cache out: 'quark quantize --kv-cache' quantizes it"))
    return [f"{document.origin(SECTION, *path)}: {text}" for path, text in found]
