"""Reads files that are not native, by their content: ModelOpt's recipes and presets, Quark's configs, the config of a
checkpoint, bare lists and dicts of entries. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quarkcli.errors import ConfigError, did_you_mean
from quarkcli.recipe import checkpoint_config, quark_config, schema, steps, strangers
from quarkcli.recipe.load import Document, Path_
from quarkcli.recipe.normalize import Normalized, Where, normalize, refusal

_SECTIONS = ("metadata", "quantize")
_QUANTIZE = ("quant_cfg", "algorithm", "effective_bits")
_METADATA = ("recipe_type", "description")
_TYPE, _SEARCH = "ptq", "auto_quantize"
_QUARK = ("global_quant_config", "layer_quant_config", "layer_type_quant_config")


def normalized(document: Document, where: Where) -> tuple[Normalized, str]:
    """Returns the entries of a file that is not native, and its description. Raises ConfigError with places."""
    data = document.data
    if isinstance(data, Mapping) and "schema" in data:
        raise ConfigError(
            f"schema '{data['schema']}' is unknown",
            where=str(document.origin("schema")),
            hint=f"write schema: {schema.NATIVE}",
            kind="E-RECIPE-KIND",
        )
    if isinstance(data, Mapping):
        found = checkpoint_config.read(data, where)
        if found is not None:
            return found, "the quantization config of a checkpoint"
        if "Config" in data or "QConfig" in data or any(key in data for key in _QUARK):
            return quark_config.read(data, where), "a Quark config"
        if any(section in data for section in _SECTIONS):
            return _modelopt(document, data, where)
        if "quant_cfg" in data:
            return _quantize(document, data, (), where), ""
        _refuse_strange(document, data)
    found = normalize(data, where)
    _note_start(found, ())
    return found, ""


def _note_start(found: Normalized, place: Path_) -> None:
    """Notes that nothing is on here but what an entry switches on: ModelOpt begins with int8 everywhere."""
    whole = any(e.quantizer_path == "*" and e.parent_class is None for e in found.entries)
    if found.entries and not whole:
        text = "no entry matches '*'; ModelOpt quantizes all other modules to int8, and quark leaves them as they are"
        found.differs.append((place, text))


def _modelopt(document: Document, data: Mapping[str, Any], where: Where) -> tuple[Normalized, str]:
    metadata = data.get("metadata") or {}
    _refuse_search(document, data, metadata)
    _only(document, data, _SECTIONS, ())
    if not isinstance(metadata, Mapping):
        raise ConfigError("metadata must be a mapping", where=str(document.origin("metadata")), kind="E-RECIPE-SCHEMA")
    _only(document, metadata, _METADATA, ("metadata",))
    kind = metadata.get("recipe_type", _TYPE)
    if kind != _TYPE:
        raise ConfigError(
            f"recipe_type '{kind}' is not supported",
            where=str(document.origin("metadata", "recipe_type")),
            hint=f"use recipe_type: {_TYPE}",
            kind="E-RECIPE-KIND",
        )
    quantize = data.get("quantize")
    if not isinstance(quantize, Mapping):
        raise ConfigError(
            "'quantize' is missing",
            where=str(document.origin()),
            hint="add quantize: {quant_cfg: [...]}",
            kind="E-RECIPE-SCHEMA",
        )
    return _quantize(document, quantize, ("quantize",), where), str(metadata.get("description", ""))


def _refuse_search(document: Document, data: Mapping[str, Any], metadata: Any) -> None:
    """Raises ConfigError for a recipe that asks for a search among formats: none of its parts is a recipe by itself."""
    kind = metadata.get("recipe_type") if isinstance(metadata, Mapping) else None
    if kind != _SEARCH and _SEARCH not in data:
        return
    place = document.origin(_SEARCH) if _SEARCH in data else document.origin("metadata", "recipe_type")
    raise ConfigError(
        "an auto_quantize recipe asks for a search among formats; it does not say what to quantize",
        where=str(place),
        hint=f"run 'quark search --recipe {document.file} --model MODEL -o recipe.yaml' to make a recipe",
        kind="E-RECIPE-KIND",
    )


def _quantize(document: Document, data: Mapping[str, Any], base: Path_, where: Where) -> Normalized:
    """Returns the entries of ModelOpt's `quantize` section, or of a preset, which is that section alone."""
    _only(document, data, _QUANTIZE, base)
    if "quant_cfg" not in data:
        raise ConfigError(
            "'quant_cfg' is missing; ModelOpt would quantize everything to int8",
            where=str(document.origin(*base)),
            hint="if you want that, write quant_cfg: [{quantizer_path: '*', cfg: {num_bits: 8}}]",
            kind="E-RECIPE-SCHEMA",
        )
    found = normalize(data["quant_cfg"], where, (*base, "quant_cfg"))
    read_ = steps.from_modelopt(data.get("algorithm"), (*base, "algorithm"))
    if read_.problems:
        raise refusal(read_.problems, where)
    _note_start(found, (*base, "quant_cfg"))
    found.algorithms += read_.steps
    found.notes += read_.notes
    return found


def _only(document: Document, data: Mapping[Any, Any], known: tuple[str, ...], base: Path_) -> None:
    for key in data:
        if key not in known:
            hint = did_you_mean(str(key), known, f"use one of {', '.join(known)}")
            if key in schema.Quantize.model_fields or key in schema.RecipeModel.model_fields:
                hint = f"begin a native recipe with 'schema: {schema.NATIVE}'"
            raise ConfigError(
                f"unknown key '{key}'", where=str(document.origin(*base, key)), hint=hint, kind="E-RECIPE-SCHEMA"
            )


def _refuse_strange(document: Document, data: Mapping[Any, Any]) -> None:
    """A mapping is a legacy dict of patterns only where something in it looks like one."""
    if not data or any(_is_pattern(str(key)) for key in data):
        return
    what, hint = strangers.advice(data) or (
        "this is not a recipe: it has neither a schema nor quant_cfg nor patterns of quantizers",
        f"begin it with 'schema: {schema.NATIVE}'; 'quark recipes show nvfp4' prints an example",
    )
    raise ConfigError(what, where=str(document.origin()), hint=hint, kind="E-RECIPE-KIND")


def _is_pattern(key: str) -> bool:
    one_entry = key in ("quantizer_path", "quantizer_name")
    return one_entry or any(c in key for c in "*?[") or "quantizer" in key or key.startswith("nn.") or key == "default"
