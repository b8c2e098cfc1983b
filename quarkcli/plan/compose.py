"""Composes recipe and flags into one list of entries in the resolved order (design: later wins).

1 deny all; 2 the scheme, or the recipe's own entries; 3 `--layer-type`; 4 `--layer`; 5 family and default exclusions;
6 `--exclude`; 7 `--include`; 8 KV cache; 9 attention, then `--min-kv-scale`; 10 edits of the plan. An exclusion of
module pattern M switches off M's own four slots only. An entry that gives attributes to a class by name
(`nn.Embedding`) is an explicit choice, and the default exclusion of that class does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quarkcli.errors import UsageError
from quarkcli.family import PROTECTED, ROLE_CLASSES, Layout, check_unprotect
from quarkcli.recipe.entries import Entry, Origin
from quarkcli.recipe.match import slot_pattern
from quarkcli.recipe.recipe import Recipe, attention_entries, cache_entries, exclusion_entries, scheme_entries


@dataclass
class Overrides:
    """Holds the additions of flags to a recipe, in the order given. `entries` are edits of a plan and come last.

    on_indivisible   `keep`: modules whose width groups do not divide are not quantized; `pad`: a weight's last group
                     ends with its row
    """

    layer_types: Sequence[str] = ()
    layers: Sequence[str] = ()
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    unprotect: Sequence[str] = ()
    kv_cache: str | None = None
    attention: str | None = None
    min_kv_scale: float | None = None
    on_indivisible: Literal["error", "keep", "pad"] = "error"
    allow_unmatched: bool = False
    entries: Sequence[Entry] = ()


@dataclass(frozen=True)
class Basis:
    """Holds the inputs that a plan was resolved from. `asked` is the request to its maker and is not read here."""

    recipe: Recipe
    overrides: Overrides
    layout: Layout
    asked: object = None


@dataclass
class Composed:
    """The list.

    exclusions_start  index of its first exclusion: `--include` without a scheme goes back to the state before
    restores          entry index -> pattern whose earlier state comes back
    edits_start       index of the first edit
    """

    entries: list[Entry]
    exclusions_start: int
    restores: dict[int, str] = field(default_factory=dict)
    edits_start: int = 0

    @property
    def meant(self) -> frozenset[int]:
        """Returns entries that may leave others of the user's without effect: edits, and what a flag switches off."""
        off = (i for i, entry in enumerate(self.entries) if entry.unit == OFF)
        return frozenset([*off, *range(self.edits_start, len(self.entries))])


OFF = "switched off by a flag"
# Flags of schemes that take the place of what the recipe names -> the field, of `Overrides` and of `Recipe`.
OWN_NAMES = {"--kv-cache": "kv_cache", "--attention": "attention"}
# The slots that only this speaks of: k and v are the cache's also where an attention scheme names them.
_OWN = {"kv_cache": ("k", "v"), "attention": ("q", "p")}


def compose(recipe: Recipe, overrides: Overrides, layout: Layout) -> Composed:
    """Returns entries of recipe and flags in their resolved order. Raises UsageError or ConfigError for bad flags."""
    check_unprotect(overrides.unprotect)
    entries = list(recipe.entries)
    required = not overrides.allow_unmatched
    beside = _folder(recipe)
    for flag in overrides.layer_types:
        entries += _of_class(flag, required, beside)
    for flag in overrides.layers:
        pattern, scheme = _pair(flag, "--layer")
        origin = Origin(f"--layer '{flag}'")
        entries += scheme_entries(scheme, pattern, origin, user=True, required=required, beside=beside)
    composed = Composed(entries, len(entries))
    if recipe.exclusions:
        named = {entry.parent_class for entry in entries if entry.enable and entry.cfg is not None}
        lifted = [role for role, kind in ROLE_CLASSES.items() if kind in named]
        entries += _default_exclusions(layout, [*overrides.unprotect, *lifted])
    for pattern in overrides.exclude:
        entries += exclusion_entries(pattern, Origin(f"--exclude '{pattern}'"), user=True, required=required)
    for pattern in overrides.include:
        _include(composed, recipe, pattern, required)
    entries += _of_attention("kv_cache", cache_entries, recipe, overrides.kv_cache, recipe.kv_cache)
    entries += _of_attention("attention", attention_entries, recipe, overrides.attention, recipe.attention)
    composed.edits_start = len(entries)
    entries += overrides.entries
    return composed


def _of_attention(key: str, make: Any, recipe: Recipe, flag: str | None, own: str | None) -> list[Entry]:
    """Returns entries of the flag's scheme, else of the recipe's."""
    name = flag if flag is not None else own
    origin = Origin(f"--{key.replace('_', '-')} {name}" if flag is not None else f"{recipe.name}: {key} {name}")
    if flag == "none":  # the recipe's own entries may have switched them on
        return [Entry(f"*.{kind}_bmm_quantizer", None, False, None, False, origin, OFF) for kind in _OWN[key]]
    if name is None or name == "none":
        return []
    found: list[Entry] = make(name, origin, _folder(recipe))
    return found


def _pair(flag: str, name: str) -> tuple[str, str]:
    pattern, equals, scheme = flag.rpartition("=")
    if not equals or not pattern or not scheme:
        raise UsageError(
            f"'{flag}' is not of the form PATTERN=SCHEME",
            where=name,
            hint=f"write {name} '*down_proj=fp8'",
            kind="E-FLAG-VALUE",
        )
    return pattern, scheme


def _folder(recipe: Recipe) -> Path | None:
    """Returns the folder of a recipe's file. Flags can name the schemes in it."""
    return Path(recipe.file).parent if recipe.file else None


def _of_class(flag: str, required: bool, beside: Path | None) -> list[Entry]:
    class_name, scheme = _pair(flag, "--layer-type")
    parent = class_name if class_name.startswith("nn.") else f"nn.{class_name}"
    origin = Origin(f"--layer-type '{flag}'")
    return [
        Entry(e.quantizer_path, e.cfg, e.enable, parent, e.required, e.origin, e.unit, e.user)
        for e in scheme_entries(scheme, "*", origin, user=True, required=required, beside=beside)
    ]


def _default_exclusions(layout: Layout, unprotect: Sequence[str]) -> list[Entry]:
    """Returns one unit per protected role: the modules that have it, by name."""
    entries: list[Entry] = []
    for role, reason in PROTECTED.items():
        if role in unprotect:
            continue
        modules = [module for module, kept in layout.protected.items() if kept == role]
        for module in modules:
            origin = Origin(f"default exclusion, role {role}: {reason}")
            entries += exclusion_entries(module, origin, user=False, required=False)
    return entries


def _include(composed: Composed, recipe: Recipe, pattern: str, required: bool) -> None:
    origin = Origin(f"--include '{pattern}'")
    if recipe.scheme is not None:
        composed.entries += scheme_entries(
            recipe.scheme, pattern, origin, user=True, required=required, beside=_folder(recipe)
        )
        return
    for kind in ("weight", "input", "output", "bias"):
        slot = slot_pattern(pattern, f"{kind}_quantizer")
        composed.restores[len(composed.entries)] = slot
        composed.entries.append(Entry(slot, None, True, None, required, origin, str(origin), True))
