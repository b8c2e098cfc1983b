"""Recognizes configs of other tools that are no recipes here, and says what to type in their place. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quarkcli.recipe import catalog, schema

_MODEL = ("architectures", "model_type")
_BITSANDBYTES = ("load_in_4bit", "load_in_8bit")
_GPTQ, _AWQ, _AUTOROUND = "gptq", "awq", "auto-round"
_FP8_TILES = [128, 128]


def advice(data: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Returns what a mapping is, and what to type; None for one that nobody knows.

    The config of a GPTQ, AWQ, AutoRound, bitsandbytes, FP8 or MXFP4 checkpoint, alone or in a config.json, a recipe of
    llm-compressor, the config.json of a model that is not quantized, and a scheme.
    """
    if catalog.is_scheme(data) and data.keys() <= schema.SchemeModel.model_fields.keys():
        folder = catalog.user_folder() / "schemes"
        return "this is a scheme and not a recipe", f"put it into {folder}, then use --scheme with its name"
    inside = data.get("quantization_config")
    if not isinstance(inside, Mapping) and any(key in data for key in _MODEL):
        return "this is the config.json of a model without a quantization_config", "use --model with its directory"
    found = inside if isinstance(inside, Mapping) else data
    if words := _of_config(found):
        return "this is the quantization config of another tool", words
    if modifiers := list(_modifiers(data)):
        return "this is a recipe of llm-compressor", _of_modifiers(modifiers)
    return None


def _of_config(config: Mapping[Any, Any]) -> str:
    """Returns the flags that ask for what a checkpoint's config describes; "" for a config that nobody knows."""
    method = str(config.get("quant_method", "")).replace("_", "-")
    bits = config.get("bits", config.get("w_bit"))
    if method == "fp8":
        return "use --scheme fp8_block128" if config.get("weight_block_size") == _FP8_TILES else "use --scheme ptpc_fp8"
    if method == "mxfp4":
        return "use --scheme mxfp4_weight_only"
    if method == "bitsandbytes" or any(key in config for key in _BITSANDBYTES):
        flags = "--scheme int8_dynamic" if config.get("load_in_8bit") else "--scheme int4_wo_64 --algorithm gptq"
        return f"use {flags}; the formats of bitsandbytes are not written"
    if not isinstance(bits, int):
        return ""
    size = config.get("group_size", config.get("q_group_size", -1))
    if method == _AWQ or "w_bit" in config:
        return _use(bits, size, not config.get("zero_point", True), "awq")
    if method == _AUTOROUND or "iters" in config:
        return _use(bits, size, config.get("sym", True), "gptq,autoround")
    return _use(bits, size, config.get("sym", True), "gptq")


def _use(bits: int, size: Any, symmetric: Any, algorithm: str) -> str:
    """Returns the flags for integers of some bits in groups (-1: whole rows), or where to look for near ones."""
    rows = "per_channel" if size == -1 else size
    scheme = f"{'int' if symmetric else 'uint'}{bits}_wo_{rows}"
    if scheme not in catalog.names("schemes"):
        return f"use --algorithm {algorithm} with a scheme: 'quark schemes list' shows all; none is {scheme}"
    return f"use --scheme {scheme} --algorithm {algorithm}"


def _modifiers(data: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yields name and settings of each modifier, at any depth: stages hold them."""
    for key, value in data.items():
        if str(key).endswith("Modifier"):
            yield str(key), value if isinstance(value, Mapping) else {}
        elif isinstance(value, Mapping):
            yield from _modifiers(value)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, str)]


def _of_modifiers(modifiers: list[tuple[str, Mapping[Any, Any]]]) -> str:
    known = catalog.elsewhere()
    names = [known["modifiers"].get(catalog.same(name)) for name, _ in modifiers]
    presets = [str(settings["scheme"]) for _, settings in modifiers if "scheme" in settings]
    scheme = known["presets"].get(catalog.same(presets[0]), "NAME") if presets else "NAME"
    algorithms = ",".join(name for name in names if name)
    ignored = [one for _, settings in modifiers for one in _texts(settings.get("ignore")) if one != "lm_head"]
    flags = [f"--scheme {scheme}", *([f"--algorithm {algorithms}"] if algorithms else [])]
    flags += [f"--exclude '{pattern}'" for pattern in dict.fromkeys(ignored)]
    lost = [name for (name, _), ours in zip(modifiers, names, strict=True) if ours is None]
    more = "; 'quark schemes list' shows all names" if scheme == "NAME" else ""
    return f"use {' '.join(flags)}{more}" + (f"; {', '.join(lost)} has no equivalent" if lost else "")
