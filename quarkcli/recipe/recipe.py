"""A recipe: what a file or a flag asks for, before it meets a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quarkcli.errors import ConfigError, UsageError
from quarkcli.recipe import catalog, schema
from quarkcli.recipe.attributes import native
from quarkcli.recipe.entries import Entry, Origin
from quarkcli.recipe.load import Document

WEIGHT_KINDS = ("weight", "input", "output", "bias")
ATTENTION_KINDS = ("q", "k", "v", "p")


@dataclass
class Recipe:
    """A recipe as written.

    name        for people and for the default output directory
    scheme      name of the scheme, or None when `entries` were written out
    entries     the ordered list: deny-all and the scheme's entries, or the recipe's own
    exclusions  whether the family's and the default exclusions apply
    """

    name: str
    file: str
    scheme: str | None
    entries: list[Entry]
    kv_cache: str | None = None
    attention: str | None = None
    algorithms: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    exclusions: bool = True
    calib_data: str | None = None
    calib_samples: int | None = None
    calib_seqlen: int | None = None
    calib_column: str | None = None
    seed: int | None = None
    moe_calibration: Literal["routed", "all"] | None = None
    dialect: str | None = None
    description: str = ""


DENY_ALL = Entry("*", enable=False, origin=Origin("built-in: deny all"))


def from_scheme(name: str) -> Recipe:
    """The recipe `--scheme NAME` stands for. Raises UsageError for an unknown scheme."""
    stem = catalog.find("schemes", name).stem
    origin = Origin(f"scheme {stem}")
    return Recipe(stem, "", stem, [DENY_ALL, *scheme_entries(stem, "*", origin, user=True)])


def from_file(path: Path) -> Recipe:
    """A native recipe file. Raises ConfigError with file, line and column."""
    document = catalog.document(path)
    data = document.data
    if not isinstance(data, dict) or data.get("schema") != schema.NATIVE:
        raise ConfigError(
            f"not a native recipe: the top level has no 'schema: {schema.NATIVE}'",
            where=str(document.origin()),
            hint="see 'quark recipes show nvfp4' for the form",
        )
    model = schema.validate(schema.RecipeModel, document)
    quantize = model.quantize
    if quantize.scheme is not None:
        where = document.origin("quantize", "scheme")
        entries = [
            DENY_ALL,
            *_located(where, scheme_entries, quantize.scheme, "*", where, user=True, beside=path.parent),
        ]
    else:
        assert quantize.quant_cfg is not None
        entries = [_entry(document, index, row) for index, row in enumerate(quantize.quant_cfg)]
    named: list[tuple[catalog.Kind, str | None]] = [("kv_cache", quantize.kv_cache), ("attention", quantize.attention)]
    for kind, name in named:
        if name is not None and name != "none":
            _located(document.origin("quantize", kind), catalog.find, kind, name, path.parent)
    steps = quantize.algorithm or []
    if isinstance(steps, str):
        steps = [schema.AlgorithmStep(method=steps)]
    return Recipe(
        name=model.metadata.name or path.stem,
        file=str(path),
        scheme=quantize.scheme,
        entries=entries,
        kv_cache=quantize.kv_cache,
        attention=quantize.attention,
        algorithms=[(step.method, dict(step.model_extra or {})) for step in steps],
        exclusions=model.exclusions == "default",
        calib_data=model.calibration.data,
        calib_samples=model.calibration.samples,
        calib_seqlen=model.calibration.seqlen,
        calib_column=model.calibration.column,
        seed=model.calibration.seed,
        moe_calibration=model.calibration.moe,
        dialect=model.export.dialect,
        description=model.metadata.description,
    )


def _located(where: Origin, call: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except (ConfigError, UsageError) as error:
        raise ConfigError(error.what, where=error.where or str(where), hint=error.hint) from error


def _entry(document: Document, index: int, row: schema.EntryModel) -> Entry:
    place = ("quantize", "quant_cfg", index)
    origin = document.origin(*place)
    cfg, enable = _split_enable(row.cfg, row.enable, origin)
    if cfg is not None:
        _located(document.origin(*place, "cfg"), native.to_spec, cfg)
    return Entry(
        quantizer_path=row.quantizer_path,
        cfg=cfg,
        enable=enable,
        parent_class=row.parent_class,
        required=row.required is not False,
        origin=origin,
        unit=str(origin),
        user=row.required is not False,  # what need not match need not have an effect either
    )


def _split_enable(
    cfg: dict[str, Any] | None, enable: bool | None, origin: Origin
) -> tuple[dict[str, Any] | None, bool]:
    """`enable` inside cfg moves up; a contradiction with the entry's own is an error."""
    if cfg is None or "enable" not in cfg:
        return cfg, True if enable is None else enable
    inner = cfg["enable"]
    if not isinstance(inner, bool):
        raise ConfigError(f"cfg.enable must be true or false, not {inner!r}", where=str(origin))
    if enable is not None and enable != inner:
        raise ConfigError("cfg.enable contradicts the entry's enable", where=str(origin), hint="keep one of the two")
    rest = {key: value for key, value in cfg.items() if key != "enable"}
    return rest or None, inner


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
            _located(document.origin(kind), native.to_spec, cfg)
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


def slot_pattern(module: str, slot: str) -> str:
    """The slot pattern of a module pattern: `*q_proj` -> `*q_proj.weight_quantizer`, `*` -> `*.weight_quantizer`."""
    if module.startswith("re:"):
        return f"re:(?:{module[3:]})\\.{slot}"
    return f"{module}.{slot}"


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
        _located(document.origin(kind), native.to_spec, cfg)
        entries.append(Entry(f"*.{kind}_bmm_quantizer", cfg, True, None, True, origin, unit, True))
    return entries
