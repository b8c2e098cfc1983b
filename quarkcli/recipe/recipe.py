"""A recipe: what a file or a flag asks for, before it meets a model. Torch-free.

A file is native when its top level says `schema: quark/recipe/1`. Any other is read as NVIDIA ModelOpt's or AMD
Quark's, or as a bare list or dict of entries, and keeps its own list exactly as written: nothing of ours is appended,
and no entry must match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from quarkcli.errors import ConfigError, UsageError, near_misses
from quarkcli.recipe import catalog, checkpoint_config, imports, quark_config, schema, steps
from quarkcli.recipe.attributes import native, to_spec
from quarkcli.recipe.entries import SLOTS, Entry, Origin, Share
from quarkcli.recipe.load import Document, Path_
from quarkcli.recipe.match import slot_pattern
from quarkcli.recipe.normalize import Canonical, Normalized, normalize, refusal
from quarkcli.recipe.search import with_search
from quarkcli.recipe.settings import adjusted

WEIGHT_KINDS = ("weight", "input", "output", "bias")
ATTENTION_KINDS = ("q", "k", "v", "p")


@dataclass
class Recipe:
    """A recipe as written.

    name        for people and for the default output directory
    scheme      name of the scheme, or None when `entries` were written out
    entries     the ordered list: deny-all and the scheme's entries, or the recipe's own
    exclusions  whether the family's and the default exclusions apply
    share       rows that join weights into scale groups; None: the family's groups; empty: none at all
    notes       what to tell the user about the file: legacy forms, and what has no meaning here
    """

    name: str
    file: str
    scheme: str | None
    entries: list[Entry]
    kv_cache: str | None = None
    attention: str | None = None
    algorithms: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    exclusions: bool = True
    share: Sequence[Share] | None = None
    calib_data: str | None = None
    calib_samples: int | None = None
    calib_seqlen: int | None = None
    calib_column: str | None = None
    bos: Literal["auto", "on", "off"] | None = None
    seed: int | None = None
    moe_calibration: Literal["routed", "all"] | None = None
    dialect: str | None = None
    description: str = ""
    notes: list[str] = field(default_factory=list)


DENY_ALL = Entry("*", enable=False, origin=Origin("built-in: deny all"))

_SECTIONS = ("metadata", "quantize")
_QUANTIZE = ("quant_cfg", "algorithm", "effective_bits")
_METADATA = ("recipe_type", "description")
_TYPE = "ptq"
_QUARK = ("global_quant_config", "layer_quant_config", "layer_type_quant_config")
_SHOWN_NOTES = 3


def from_scheme(name: str) -> Recipe:
    """The recipe `--scheme NAME` stands for. Raises UsageError for an unknown scheme."""
    stem = catalog.find("schemes", name).stem
    origin = Origin(f"scheme {stem}")
    return Recipe(stem, "", stem, [DENY_ALL, *scheme_entries(stem, "*", origin, user=True)])


def from_file(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of a file. Raises ConfigError with file, line and column.

    settings   `a.b=value` of `--set`, applied to the file with its imports in place
    """
    document = adjusted(imports.expanded(catalog.document(path)), settings)
    if is_native(document):
        return _native(document, path)
    return _foreign(document, path)


def from_config(data: Any, name: str = "config") -> Recipe:
    """The recipe of what a file would hold, as Python data. It has no folder: no imports, and no schemes beside it."""
    document = Document(deepcopy(data), name, {})
    nowhere = Path(f"<{name}>") / name
    recipe = _native(document, nowhere) if is_native(document) else _foreign(document, nowhere)
    return replace(recipe, file="")


def is_native(document: Document) -> bool:
    return isinstance(document.data, dict) and document.data.get("schema") == schema.NATIVE


def located(where: Origin, call: Any, *args: Any, **kwargs: Any) -> Any:
    """`call(*args)`, with a place given to a user error that has none."""
    try:
        return call(*args, **kwargs)
    except (ConfigError, UsageError) as error:
        raise ConfigError(error.what, where=error.where or str(where), hint=error.hint) from error


def scheme_model(name: str) -> schema.SchemeModel:
    return schema.validate(schema.SchemeModel, catalog.document(catalog.find("schemes", name)))


def scheme_entries(
    name: str, module: str, origin: Origin, *, user: bool, required: bool = True, beside: Path | None = None
) -> list[Entry]:
    """The entries of a scheme for modules that match `module`: every kind, those it lacks switched off.

    beside   folder of the recipe that asks; its schemes are known as well
    """
    document = catalog.document(catalog.find("schemes", name, beside))
    model = schema.validate(schema.SchemeModel, document)
    unit = f"{origin}"
    entries = []
    for kind in WEIGHT_KINDS:
        cfg = getattr(model, kind, None)
        if cfg is not None:
            located(document.origin(kind), native.to_spec, cfg)
        entries.append(
            Entry(
                quantizer_path=slot_pattern(module, f"{kind}_quantizer"),
                cfg=cfg,
                enable=cfg is not None,
                required=required,
                origin=origin,
                unit=unit,
                user=user,
            )
        )
    return entries


def exclusion_entries(module: str, origin: Origin, *, user: bool, required: bool) -> list[Entry]:
    """Entries that switch a module's own slots off; cache and attention slots are never touched."""
    unit = f"exclude {origin}"
    return [
        Entry(slot_pattern(module, f"{kind}_quantizer"), None, False, None, required, origin, unit, user)
        for kind in WEIGHT_KINDS
    ]


def cache_entries(name: str, origin: Origin, beside: Path | None = None) -> list[Entry]:
    """Entries for the k and v slots of every attention. `beside` as in `scheme_entries`."""
    document = catalog.document(catalog.find("kv_cache", name, beside))
    return _bmm_entries(document, schema.validate(schema.CacheModel, document), f"cache {origin}", origin)


def attention_entries(name: str, origin: Origin, beside: Path | None = None) -> list[Entry]:
    """Entries for the q, k, v and p slots that an attention scheme names, of every attention."""
    document = catalog.document(catalog.find("attention", name, beside))
    return _bmm_entries(document, schema.validate(schema.AttentionModel, document), f"attention {origin}", origin)


def _bmm_entries(document: Document, model: Any, unit: str, origin: Origin) -> list[Entry]:
    entries = []
    for kind in ATTENTION_KINDS:
        cfg = getattr(model, kind, None)
        if cfg is None:
            continue
        located(document.origin(kind), native.to_spec, cfg)
        entries.append(Entry(f"*.{kind}_bmm_quantizer", cfg, True, None, True, origin, unit, True))
    return entries


# --- native ----------------------------------------------------------------------------------------------------------


def _native(document: Document, path: Path) -> Recipe:
    model = schema.validate(schema.RecipeModel, document)
    quantize = model.quantize
    if quantize.scheme is not None:
        where = document.origin("quantize", "scheme")
        entries = [
            DENY_ALL,
            *located(where, scheme_entries, quantize.scheme, "*", where, user=True, beside=path.parent),
        ]
    else:
        rows = document.at(("quantize", "quant_cfg"))
        found = normalize(rows, _where(document), ("quantize", "quant_cfg"))
        entries = [_entry(document, row, required=_is_own(document, row)) for row in found.entries]
    named: list[tuple[catalog.Kind, str | None]] = [("kv_cache", quantize.kv_cache), ("attention", quantize.attention)]
    for kind, name in named:
        if name is not None and name != "none":
            located(document.origin("quantize", kind), catalog.find, kind, name, path.parent)
    rows = quantize.algorithm or []
    given = [schema.AlgorithmStep(method=rows)] if isinstance(rows, str) else rows
    calibration = model.calibration
    return Recipe(
        name=model.metadata.name or path.stem,
        file=str(path),
        scheme=quantize.scheme,
        entries=entries,
        kv_cache=quantize.kv_cache,
        attention=quantize.attention,
        algorithms=[_step(step) for step in given],
        exclusions=model.exclusions == "default",
        share=_share(document, model),
        calib_data=calibration.data,
        calib_samples=calibration.samples,
        calib_seqlen=calibration.seqlen,
        calib_column=calibration.column,
        bos=calibration.bos,
        seed=calibration.seed,
        moe_calibration=calibration.moe,
        dialect=model.export.dialect,
        description=model.metadata.description,
    )


def _share(document: Document, model: schema.RecipeModel) -> list[Share] | None:
    if model.share is None:
        return None
    return [Share(tuple(row.slots), document.origin("share", index)) for index, row in enumerate(model.share)]


def _step(step: schema.AlgorithmStep) -> tuple[str, dict[str, Any]]:
    """(method, parameters); `slots` stands among them."""
    slots = {} if step.slots is None else {SLOTS: list(step.slots)}
    return step.method, {**slots, **(step.model_extra or {})}


def _is_own(document: Document, row: Canonical) -> bool:
    """An entry written in the recipe itself must match something; what it imports need not."""
    return document.origin(*row.place).text == document.file


# --- others ----------------------------------------------------------------------------------------------------------


def _foreign(document: Document, path: Path) -> Recipe:
    found, description = _normalized(document)
    entries = [_entry(document, row, required=False) for row in (*found.entries, *found.kv)]
    algorithms, entries = with_search(found.algorithms, entries)
    return Recipe(
        name=path.stem,
        file=str(path),
        scheme=None,
        entries=entries,
        algorithms=algorithms,
        exclusions=False,
        description=description,
        notes=_notes(document, found),
    )


def _normalized(document: Document) -> tuple[Normalized, str]:
    """The entries of a file that is not native, and its description."""
    data, where = document.data, _where(document)
    if isinstance(data, Mapping) and "schema" in data:
        raise ConfigError(
            f"schema '{data['schema']}' is unknown",
            where=str(document.origin("schema")),
            hint=f"schema: {schema.NATIVE}",
        )
    if isinstance(data, Mapping):
        found = checkpoint_config.read(data, where)
        if found is not None:
            return found, "the quantization config of a checkpoint"
        if "Config" in data or "QConfig" in data or any(key in data for key in _QUARK):
            return quark_config.read(data, where), "a Quark config"
        if any(section in data for section in _SECTIONS):
            return _modelopt(document, data)
        if "quant_cfg" in data:
            return _quantize(document, data, ()), ""
        _refuse_strange(document, data)
    return normalize(data, where), ""


def _modelopt(document: Document, data: Mapping[str, Any]) -> tuple[Normalized, str]:
    _only(document, data, _SECTIONS, ())
    metadata = data.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise ConfigError("metadata must be a mapping", where=str(document.origin("metadata")))
    _only(document, metadata, _METADATA, ("metadata",))
    kind = metadata.get("recipe_type", _TYPE)
    if kind != _TYPE:
        raise ConfigError(
            f"recipe_type '{kind}' is not supported",
            where=str(document.origin("metadata", "recipe_type")),
            hint=f"recipes of type {_TYPE} are read",
        )
    quantize = data.get("quantize")
    if not isinstance(quantize, Mapping):
        raise ConfigError("'quantize' is missing", where=str(document.origin()), hint="quantize: {quant_cfg: [...]}")
    return _quantize(document, quantize, ("quantize",)), str(metadata.get("description", ""))


def _quantize(document: Document, data: Mapping[str, Any], base: Path_) -> Normalized:
    """ModelOpt's `quantize` section, or one of its presets, which is that section alone."""
    _only(document, data, _QUANTIZE, base)
    if "quant_cfg" not in data:
        raise ConfigError(
            "'quant_cfg' is missing; ModelOpt would quantize everything to int8",
            where=str(document.origin(*base)),
            hint="say so: quant_cfg: [{quantizer_path: '*', cfg: {num_bits: 8}}]",
        )
    found = normalize(data["quant_cfg"], _where(document), (*base, "quant_cfg"))
    read_ = steps.from_modelopt(data.get("algorithm"), (*base, "algorithm"))
    if read_.problems:
        raise refusal(read_.problems, _where(document))
    found.algorithms += read_.steps
    found.notes += read_.notes
    return found


def _only(document: Document, data: Mapping[Any, Any], known: tuple[str, ...], base: Path_) -> None:
    for key in data:
        if key not in known:
            close = near_misses(str(key), known)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
            if key in schema.Quantize.model_fields or key in schema.RecipeModel.model_fields:
                hint = f"a native recipe begins with 'schema: {schema.NATIVE}'"
            raise ConfigError(f"unknown key '{key}'", where=str(document.origin(*base, key)), hint=hint)


def _refuse_strange(document: Document, data: Mapping[Any, Any]) -> None:
    """A mapping is a legacy dict of patterns only where something in it looks like one."""
    if data and not any(_is_pattern(str(key)) for key in data):
        raise ConfigError(
            "this is not a recipe: neither a schema, nor quant_cfg, nor patterns of quantizers",
            where=str(document.origin()),
            hint=f"a native recipe begins with 'schema: {schema.NATIVE}'; see 'quark recipes show nvfp4'",
        )


def _is_pattern(key: str) -> bool:
    one_entry = key in ("quantizer_path", "quantizer_name")
    return one_entry or any(c in key for c in "*?[") or "quantizer" in key or key.startswith("nn.") or key == "default"


# --- entries ---------------------------------------------------------------------------------------------------------


def _where(document: Document) -> Any:
    return lambda path: str(document.origin(*path))


def _entry(document: Document, row: Canonical, *, required: bool) -> Entry:
    """An entry whose attributes have been tried, with its place."""
    origin = document.origin(*row.place)
    if row.cfg is not None:
        located(document.origin(*row.place, "cfg"), to_spec, row.cfg, weight=is_weight(row.quantizer_path))
    must = row.required if row.required is not None else required
    # What need not match need not have an effect either.
    return Entry(row.quantizer_path, row.cfg, row.enable, row.parent_class, must, origin, str(origin), must)


def is_weight(pattern: str) -> bool:
    """True for a pattern that names weight or bias slots; others may mean activations as well."""
    return "weight" in pattern or "bias" in pattern


def _notes(document: Document, found: Normalized) -> list[str]:
    notes = [f"{document.origin(*place)}: {text}" for place, text in found.notes]
    if len(notes) > _SHOWN_NOTES:
        more = f"{len(notes) - _SHOWN_NOTES} more such notes; 'quark recipes convert' writes the file in today's form"
        return [*notes[:_SHOWN_NOTES], more]
    return notes
