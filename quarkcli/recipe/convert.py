"""Turns a recipe of any kind into the canonical list, and into a commented native file of it. Torch-free."""

from __future__ import annotations

from typing import Any

import yaml

from quarkcli.errors import ConfigError
from quarkcli.recipe import schema
from quarkcli.recipe.attributes import to_spec
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.entries import Entry
from quarkcli.recipe.recipe import Recipe, attention_entries, cache_entries
from quarkcli.recipe.tried import is_weight

_WIDTH = 116


def all_entries(recipe: Recipe) -> list[Entry]:
    """Returns the recipe's own list, with the entries of its cache and attention schemes at the end."""
    entries = list(recipe.entries)
    for key, make in (("kv_cache", cache_entries), ("attention", attention_entries)):
        name = getattr(recipe, key)
        if name not in (None, "none"):
            entries += make(name, entries[-1].origin)
    return entries


def canonical(recipe: Recipe) -> list[dict[str, Any]]:
    """Returns entries with explicit `quantizer_path`, `cfg` as written, `enable`, and `parent_class` where given."""
    rows = []
    for entry in all_entries(recipe):
        row: dict[str, Any] = {"quantizer_path": entry.quantizer_path, "cfg": entry.cfg, "enable": entry.enable}
        if entry.parent_class is not None:
            row["parent_class"] = entry.parent_class
        rows.append(row)
    return rows


def as_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Returns canonical entries as a YAML list, a line each."""
    return [f"- {flow(row)}" for row in rows]


def as_native(recipe: Recipe) -> str:
    """Returns a native recipe file that gives the same plan, commented.

    The comments say where each entry came from and what it means.
    """
    head: dict[str, Any] = {
        "schema": schema.NATIVE,
        "metadata": {"name": recipe.name, "description": recipe.description or f"converted from {recipe.name}"},
    }
    lines = [
        f"# Converted from {recipe.file or recipe.name}. Later entries win. An entry with cfg replaces all attributes;",
        "# one without cfg only switches on or off. No entry has to match, as in the original.",
        *_dumped(head),
        f"exclusions: {'default' if recipe.exclusions else 'none'}",
        *_calibration(recipe),
        "quantize:",
        *_algorithms(recipe),
        "  quant_cfg:",
    ]
    for entry in all_entries(recipe):
        lines += _entry_lines(entry)
    return "\n".join(lines) + "\n"


def _dumped(data: Any) -> list[str]:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=_WIDTH).splitlines()


def flow(data: Any) -> str:
    """Returns data as YAML in one line."""
    text = yaml.safe_dump(data, default_flow_style=True, sort_keys=False, allow_unicode=True, width=100_000)
    return text.removesuffix("...\n").strip()


def _algorithms(recipe: Recipe) -> list[str]:
    if not recipe.algorithms:
        return []
    rows = [{"method": name, **parameters} for name, parameters in recipe.algorithms]
    return ["  algorithm:", *(f"    - {flow(row)}" for row in rows)]


def _calibration(recipe: Recipe) -> list[str]:
    given = {
        "data": recipe.calib_data,
        "samples": recipe.calib_samples,
        "seqlen": recipe.calib_seqlen,
        "column": recipe.calib_column,
        "bos": recipe.bos,
        "seed": recipe.seed,
        "moe": recipe.moe_calibration,
        "min_expert_tokens": recipe.min_expert_tokens,
    }
    given = {key: value for key, value in given.items() if value is not None}
    lines = [f"calibration: {flow(given)}"] if given else []
    if recipe.share is not None:
        lines.append(f"share: {flow([row.as_dict() for row in recipe.share])}")
    if recipe.expert_inputs != "shared":
        lines.append(f"expert_inputs: {recipe.expert_inputs}")
    return [*lines, f"export: {flow({'dialect': recipe.dialect})}"] if recipe.dialect else lines


def _entry_lines(entry: Entry) -> list[str]:
    cfg, meaning = _native_cfg(entry)
    row: dict[str, Any] = {"quantizer_path": entry.quantizer_path}
    if entry.parent_class is not None:
        row["parent_class"] = entry.parent_class
    if cfg is not None:
        row["cfg"] = cfg
    row |= {"enable": entry.enable, "required": False}
    lines = [f"    # {entry.origin}" + (f": {meaning}" if meaning else "")]
    first, *others = [f"{key}: {flow(value)}" for key, value in row.items()]
    return [*lines, f"    - {first}", *(f"      {line}" for line in others)]


def _native_cfg(entry: Entry) -> tuple[Any, str]:
    """Returns the cfg in native words, and in short. A cfg that weights and activations read differently stays."""
    if entry.cfg is None:
        return None, ""
    try:
        specs = [to_spec(entry.cfg, weight=weight) for weight in (True, False)]
    except ConfigError:  # not for weights, or not for activations; then it is for the others
        specs = [to_spec(entry.cfg, weight=is_weight(entry.quantizer_path))]
    if is_weight(entry.quantizer_path):
        specs = specs[:1]
    elif _is_activation(entry.quantizer_path):
        specs = specs[-1:]
    if all(spec == specs[0] for spec in specs):
        return spec_to_yaml(specs[0]), specs[0].describe()
    return entry.cfg, f"weights {specs[0].describe()}; activations {specs[1].describe()}"


def _is_activation(pattern: str) -> bool:
    return any(f"{kind}_quantizer" in pattern for kind in ("input", "output", "bmm", "softmax"))
