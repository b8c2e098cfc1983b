"""Writes docs/recipe_reference.md from the schema and the tables of formats: `make docs`. A test keeps it fresh."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from quarkcli import algorithms
from quarkcli.recipe import schema
from quarkcli.recipe.attributes import modelopt, native, quark
from quarkcli.spec import ELEMENTS, OBSERVERS, RULES, SCALE_FORMATS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe_reference.md"
HEAD = """# Recipe reference

Look up here each key of a recipe, of a scheme file and of a `cfg`. [Recipes](recipes.md) explains how they work
together, and [words](words.md) what slot, scheme or scale means. `quark recipes schema` prints the JSON Schema.

`make docs` generates this page from `quarkcli/recipe/schema.py` and the tables of formats; do not edit it.
"""
# Place in a file -> the model that reads it.
SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("A recipe file", "", schema.RecipeModel),
    ("metadata", "", schema.Metadata),
    ("quantize", "", schema.Quantize),
    ("An entry of quant_cfg", "quantize.quant_cfg[]", schema.EntryModel),
    ("A step of algorithm", "quantize.algorithm[]", schema.AlgorithmStep),
    ("A row of share", "share[]", schema.ShareModel),
    ("calibration", "", schema.Calibration),
    ("export", "", schema.Export),
    ("A scheme file", "schemes/NAME.yaml", schema.SchemeModel),
    ("A KV cache scheme", "kv_cache/NAME.yaml", schema.CacheModel),
    ("An attention scheme", "attention/NAME.yaml", schema.AttentionModel),
)


def section(title: str, place: str, model: type[BaseModel]) -> Iterator[str]:
    """Heading, what the model is for, and a row per key."""
    described = model.model_json_schema(by_alias=True)
    yield f"## {title}\n"
    yield (f"`{place}`: " if place else "") + str(described["description"]) + "\n"
    rows = []
    for key, value in described["properties"].items():
        default = "needed" if key in described.get("required", ()) else _default(value)
        rows.append((f"`{key}`", _kind(value), default, value.get("description", "")))
    if model is schema.RecipeModel:
        rows.insert(2, ("`imports`", "mapping of text", "", "name -> file; `$import: name` uses it"))
    yield _table(("key", "value", "default", "says"), rows)


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    return "" if default in (None, "", [], {}) or isinstance(default, dict) else f"`{_yaml(default)}`"


def _kind(value: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in value:
        return " or ".join(_kind(one) for one in value["anyOf"] if one.get("type") != "null")
    if "$ref" in value:
        return "mapping"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if value.get("type") == "array":
        return f"list of {_kind(value['items'])}s"
    words = {"string": "text", "integer": "whole number", "boolean": "true, false", "object": "mapping"}
    above = value.get("exclusiveMinimum")
    return words[value["type"]] + (f" above {above}" if above is not None else "")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def methods() -> str:
    """Every algorithm with its parameters."""
    rows = []
    for name in algorithms.names():
        member = importlib.import_module(f"{algorithms.__name__}.{name.replace('-', '_')}").ALGORITHM
        parameters = ", ".join(f"`{key}: {_yaml(value)}`" for key, value in member.parameters.items())
        rows.append((f"`{name}`", member.kind, parameters or "none"))
    return _table(("method", "kind", "parameters and their defaults"), rows)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_SHOWN = ("element", "granularity", "scale", "observer")


def words() -> Iterator[str]:
    """The three vocabularies of a cfg."""
    yield "## cfg, native words\n"
    yield _table(
        ("key", "values"),
        [
            ("`element`", _names(ELEMENTS)),
            ("`granularity`", "`tensor`, `token`, `{channel: 0}`, `{group: SIZE}`, `{tile: [ROWS, COLUMNS]}`"),
            ("`scale.dtype`, `scale.global_scale.dtype`", _names(SCALE_FORMATS)),
            ("`scale.rule`", _names(RULES)),
            ("`scale.when`", "`static`, `dynamic`"),
            ("`scale.minimum`", "a positive number"),
            ("`scale.constant_amax`", "a positive number; only for activations, and of two scales in the global one"),
            ("`observer`", "; ".join(f"`{name}`" + _with(given) for name, given in OBSERVERS.items())),
            (
                "others",
                _names(key for key in native.KEYS if key not in ("element", "granularity", "scale", "observer")),
            ),
        ],
    )
    yield "[Recipes](recipes.md) and [numbers](numerics.md) say what they mean, and their defaults.\n"
    yield "## cfg, ModelOpt's attributes\n"
    yield f"{_names(modelopt.FIELDS)}.\n"
    yield "## cfg, fields of a SPEC of Quark\n"
    yield f"{_names(quark.FIELDS)}.\n"
    yield "quark refuses fields that it cannot follow, and names them.\n"


def _names(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _with(parameters: dict[str, float]) -> str:
    return f" ({', '.join(f'{key} {value:g}' for key, value in parameters.items())})" if parameters else ""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, place, model in SECTIONS:
        parts += section(title, place, model)
        if model is schema.AlgorithmStep:
            parts.append(methods())
    return "\n".join([*parts, *words()]).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
