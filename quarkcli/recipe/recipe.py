"""Reads a recipe, which a file or a flag asks for, before it meets a model. Torch-free.

A file is native when its top level says `schema: quark/recipe/1`. Any other is read as NVIDIA ModelOpt's or AMD
Quark's, or as a bare list or dict of entries, and keeps its own list exactly as written: nothing of ours is appended,
and no entry must match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from quarkcli.errors import ConfigError, QuarkError, UsageError
from quarkcli.recipe import catalog, foreign, imports, schema
from quarkcli.recipe.attributes import native, to_spec
from quarkcli.recipe.entries import ATTENTION_KINDS, SETTING, SLOTS, TARGET_KINDS, Entry, Origin, Share
from quarkcli.recipe.load import Document, of_data
from quarkcli.recipe.match import slot_pattern
from quarkcli.recipe.mistakes import together
from quarkcli.recipe.normalize import LEGACY, Canonical, Normalized, normalize
from quarkcli.recipe.search import with_search
from quarkcli.recipe.settings import adjusted
from quarkcli.recipe.tried import is_weight, located, patterns, tried

# Finds mistakes in what rooms below know.
Check = Callable[[Document], Iterable[QuarkError]]


@dataclass
class Recipe:
    """A recipe as written.

    name              for people and for the default output directory
    scheme            name of the scheme, or None when `entries` were written out
    entries           the ordered list: deny-all and the scheme's entries, or the recipe's own
    algorithm_places  the file, or the `--set`, that each of `algorithms` comes from; empty: `file`
    exclusions        whether the family's and the default exclusions apply
    share             rows that join weights into scale groups; None: the family's groups; empty: none at all
    expert_inputs     `own`: every expert has a static input scale of its own; else those of a layer share one
    notes             what to tell the user about the file: legacy forms, and what has no meaning here
    differs           what the tool that the file was written for would do otherwise
    """

    name: str
    file: str
    scheme: str | None
    entries: list[Entry]
    kv_cache: str | None = None
    attention: str | None = None
    algorithms: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    algorithm_places: Sequence[str] = ()
    exclusions: bool = True
    share: Sequence[Share] | None = None
    expert_inputs: Literal["shared", "own"] = "shared"
    calib_data: str | None = None
    calib_samples: int | None = None
    calib_seqlen: int | None = None
    calib_column: str | None = None
    bos: Literal["auto", "on", "off"] | None = None
    seed: int | None = None
    moe_calibration: Literal["routed", "all"] | None = None
    min_expert_tokens: int | None = None
    dialect: str | None = None
    description: str = ""
    notes: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    @property
    def file_name(self) -> str:
        """The name as a part of a file's name, which leads to no other folder."""
        return self.name.translate(str.maketrans("/\0", "--"))


DENY_ALL = Entry("*", enable=False, origin=Origin("built-in: deny all"))

_SHOWN_NOTES = 3
_ENTRY_SETTING = "quantize.quant_cfg."


def from_scheme(name: str) -> Recipe:
    """Returns the recipe that `--scheme NAME` stands for. Raises UsageError for an unknown scheme."""
    stem = catalog.find("schemes", name).stem
    origin = Origin(f"scheme {stem}")
    return Recipe(stem, "", stem, [DENY_ALL, *scheme_entries(stem, "*", origin, user=True)])


def from_file(path: Path, settings: Sequence[str] = (), also: Check = lambda document: ()) -> Recipe:
    """Returns the recipe of a file. Raises ConfigError with all mistakes of it, each with file, line and column.

    settings   `a.b=value` of `--set`, applied to the file with its imports in place
    also       finds mistakes in what other rooms know: algorithms, dialects
    """
    document = whole = imports.expanded(catalog.document(path))
    if any(text.startswith(_ENTRY_SETTING) for text in settings):
        document = _spelled_out(document, path)
    idle = []
    for text in settings:
        before, document = document, adjusted(document, [text])
        if repr(document.data) == repr(before.data):
            idle.append(f"--set {text} changes nothing: the recipe has this value already")
    recipe = _checked(document, path, also)
    recipe.notes += [*whole.notes, *idle]
    return recipe


def _checked(document: Document, path: Path, also: Check) -> Recipe:
    """Returns the recipe of a document. Raises ConfigError with all its mistakes."""
    native = is_native(document)
    try:
        recipe = _native(document, path) if native else _foreign(document, path)
    except (ConfigError, UsageError) as error:
        more = [*tried(document, path), *also(document)] if native else []
        raise together([error, *more], where=document.file, hint=error.hint) from error
    if native and (found := [*patterns(document), *also(document)]):
        raise together(found, where=document.file)
    return recipe


def from_config(data: Any, name: str = "config") -> Recipe:
    """Returns the recipe of what a file would hold, as Python data.

    It has no folder: no imports, and no schemes beside it.
    """
    document = of_data(deepcopy(data), name)
    nowhere = Path(f"<{name}>") / name
    recipe = _native(document, nowhere) if is_native(document) else _foreign(document, nowhere)
    return replace(recipe, file="")


def _spelled_out(document: Document, path: Path) -> Document:
    """Returns a native recipe with its scheme written out as entries, so that a setting can name one of them."""
    scheme = document.data["quantize"].get("scheme") if is_native(document) and _has_scheme(document) else None
    if scheme is None:
        return document
    where = document.origin("quantize", "scheme")
    made = located(where, scheme_entries, scheme, "*", where, user=True, beside=path.parent)
    rows: list[dict[str, Any]] = [{"quantizer_path": "*", "enable": False}]
    for entry in made:
        cfg = {} if entry.cfg is None else {"cfg": deepcopy(entry.cfg)}
        rows.append({"quantizer_path": entry.quantizer_path, **cfg, "enable": entry.enable})
    quantize = {key: value for key, value in document.data["quantize"].items() if key != "scheme"}
    data = {**document.data, "quantize": {**quantize, "quant_cfg": rows}}
    return Document(data, document.file, {**document.places, ("quantize", "quant_cfg"): where}, document.imports)


def _has_scheme(document: Document) -> bool:
    quantize = document.data.get("quantize")
    return isinstance(quantize, Mapping) and isinstance(quantize.get("scheme"), str) and "quant_cfg" not in quantize


def is_native(document: Document) -> bool:
    return isinstance(document.data, dict) and document.data.get("schema") == schema.NATIVE


def scheme_model(name: str) -> schema.SchemeModel:
    return schema.validate(schema.SchemeModel, catalog.document(catalog.find("schemes", name)))


def scheme_entries(
    name: str, module: str, origin: Origin, *, user: bool, required: bool = True, beside: Path | None = None
) -> list[Entry]:
    """Returns the entries of a scheme for modules that match `module`: every kind, those it lacks switched off.

    beside   folder of the recipe that asks; its schemes are known as well
    """
    document = catalog.document(catalog.find("schemes", name, beside))
    model = schema.validate(schema.SchemeModel, document)
    unit = f"{origin}"
    entries = []
    for kind in TARGET_KINDS:
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
    """Returns entries that switch a module's own slots off; cache and attention slots are never touched."""
    unit = f"exclude {origin}"
    return [
        Entry(slot_pattern(module, f"{kind}_quantizer"), None, False, None, required, origin, unit, user)
        for kind in TARGET_KINDS
    ]


def cache_entries(name: str, origin: Origin, beside: Path | None = None) -> list[Entry]:
    """Returns entries for the k and v slots of every attention. `beside` as in `scheme_entries`."""
    document = catalog.document(catalog.find("kv_cache", name, beside))
    return _bmm_entries(document, schema.validate(schema.CacheModel, document), f"cache {origin}", origin)


def attention_entries(name: str, origin: Origin, beside: Path | None = None) -> list[Entry]:
    """Returns entries for the q, k, v and p slots that an attention scheme names, of every attention."""
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
        entries = _entries(document, found.entries, lambda row: _is_own(document, row))
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
        algorithm_places=[_place(document, "quantize", "algorithm", index) for index in range(len(given))],
        exclusions=model.exclusions == "default",
        share=_share(document, model),
        expert_inputs=model.expert_inputs,
        calib_data=calibration.data,
        calib_samples=calibration.samples,
        calib_seqlen=calibration.seqlen,
        calib_column=calibration.column,
        bos=calibration.bos,
        seed=calibration.seed,
        moe_calibration=calibration.moe,
        min_expert_tokens=calibration.min_expert_tokens,
        dialect=_listed(model.export.dialect),
        description=model.metadata.description,
    )


def _listed(names: str | list[str] | None) -> str | None:
    """Returns a list as the command line writes it."""
    return ",".join(names) if isinstance(names, list) else names


def _share(document: Document, model: schema.RecipeModel) -> list[Share] | None:
    if model.share is None:
        return None
    return [
        Share(tuple(row.slots), document.origin("share", index), row.exact) for index, row in enumerate(model.share)
    ]


def _step(step: schema.AlgorithmStep) -> tuple[str, dict[str, Any]]:
    """Returns (method, parameters); `slots` stands among them."""
    slots = {} if step.slots is None else {SLOTS: list(step.slots)}
    return step.method, {**slots, **(step.model_extra or {})}


def _place(document: Document, *path: str | int) -> str:
    """Returns the file, or the `--set` that changed what stands at `path`."""
    origin = document.blamed(*path)
    return str(origin) if origin.text.startswith(SETTING) else document.file


def _is_own(document: Document, row: Canonical) -> bool:
    """True for an entry of the recipe itself, which must match something. Imported entries need not."""
    text = document.origin(*row.place).text
    return text == document.file or text.startswith(SETTING)


# --- others ----------------------------------------------------------------------------------------------------------


def _foreign(document: Document, path: Path) -> Recipe:
    found, description = foreign.normalized(document, _where(document))
    entries = _entries(document, (*found.entries, *found.kv), lambda row: False)
    algorithms, entries = with_search(found.algorithms, entries)
    return Recipe(
        name=path.stem,
        file=str(path),
        scheme=None,
        entries=entries,
        algorithms=algorithms,
        exclusions=False,
        share=None
        if found.share is None
        else [Share(tuple(slots), document.origin(*place), True) for slots, place in found.share],
        expert_inputs=found.expert_inputs,
        description=description,
        notes=_notes(document, found),
        differs=[f"{document.origin(*place)}: {text}" for place, text in found.differs],
    )


# --- entries ---------------------------------------------------------------------------------------------------------


def _where(document: Document) -> Any:
    return lambda path: str(document.origin(*path))


def _entries(document: Document, rows: Iterable[Canonical], required: Callable[[Canonical], bool]) -> list[Entry]:
    """Returns all entries. Raises ConfigError with the mistakes of every one."""
    found: list[Entry] = []
    wrong: list[QuarkError] = []
    for row in rows:
        try:
            found.append(_entry(document, row, required=required(row)))
        except ConfigError as error:
            wrong.append(error)
    if wrong:
        raise together(wrong, where=document.file)
    return found


def _entry(document: Document, row: Canonical, *, required: bool) -> Entry:
    """Returns an entry whose attributes have been tried, with its place."""
    origin = document.origin(*row.place)
    if row.cfg is not None:
        located(document.blamed(*row.place, "cfg"), to_spec, row.cfg, weight=is_weight(row.quantizer_path))
    must = row.required if row.required is not None else required
    # Entries that --set or an import put in one place are several all the same.
    unit = f"{origin} {'.'.join(map(str, row.place))}"
    # What need not match need not have an effect either.
    return Entry(row.quantizer_path, row.cfg, row.enable, row.parent_class, must, origin, unit, must)


def _notes(document: Document, found: Normalized) -> list[str]:
    """Returns the notes with their places: of legacy forms the first ones, of what has no effect every one."""
    cut = [note for note in found.notes if note[1].startswith(LEGACY)][_SHOWN_NOTES:]
    hidden = set(cut)
    notes = [f"{document.origin(*place)}: {text}" for place, text in found.notes if (place, text) not in hidden]
    if cut:
        notes.append(f"there are {len(cut)} more such notes; 'quark recipes convert' writes the file in today's form")
    return notes
