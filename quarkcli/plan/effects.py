"""Finds entries that match nothing, or enable without effect. A user's own are errors, with near misses."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from quarkcli.errors import ConfigError, near_misses
from quarkcli.plan.model import Decision, Plan
from quarkcli.plan.names import ATTENTION_CLASS, Hits, stage_of
from quarkcli.recipe import nearby
from quarkcli.recipe.entries import Entry
from quarkcli.recipe.match import Patterns, module_pattern, starred

_SLOT = re.compile(r"[.*](weight|input|output|bias|[qkvp]_bmm|softmax)_quantizer(\.\d+)?$")
# How alike a pattern's word and a module's name are when one is taken for the other misspelled.
_ALIKE = 0.85


def check_matches(plan: Plan) -> None:
    """Raises ConfigError for the first required entry that matches no slot; warns of others that a user should see.

    What need not match is no news, unless the user wrote it, or its word is that of a module misspelled.
    """
    modules = _one_of_each(plan.targets)
    for index in _unmatched(plan):
        entry = plan.entries[index]
        if entry.required:
            raise _absent(plan, entry)
        if entry.user or _misspelled(entry.quantizer_path, modules):
            count = 4 * (len(plan.targets) + len(plan.attention))
            plan.warnings.append(f"{entry.origin}: '{_shown(entry)}' matched none of {count} quantizers")


def _unmatched(plan: Plan) -> Iterator[int]:
    """Yields the first entry of every unit that matched nothing."""
    seen: set[str] = set()
    units = [entry.unit or f"#{index}" for index, entry in enumerate(plan.entries)]
    matched = {unit for unit, count in zip(units, plan.matches, strict=True) if count}
    for index, unit in enumerate(units):
        if unit not in matched and unit not in seen:
            seen.add(unit)
            yield index


def _one_of_each(names: Iterable[str]) -> list[str]:
    """Returns one name of each set of names that differ in their numbers only."""
    return list({starred(name): name for name in names}.values())


def _misspelled(pattern: str, modules: list[str]) -> bool:
    """True when the plain word of a pattern is nearly, not exactly, the start or end of a module's name.

    Its numbers may be others: a list may name blocks that this model does not have.
    """
    word = _SLOT.sub("", pattern).strip("*.").rpartition("*")[2].strip(".")
    if pattern.startswith("re:") or not word:
        return False
    word, steps = starred(word), word.count(".") + 1
    names = [starred(name).split(".") for name in modules]
    known = {".".join(own) for name in names for own in (name[:steps], name[-steps:])}
    return word not in known and bool(difflib.get_close_matches(word, known, n=1, cutoff=_ALIKE))


def _shown(entry: Entry) -> str:
    """Returns the pattern of an entry as the user wrote it. A flag's is on modules, any other on slots."""
    return module_pattern(entry.quantizer_path) if entry.origin.is_flag else entry.quantizer_path


def _absent(plan: Plan, entry: Entry) -> ConfigError:
    """Returns the error for an entry that matches nothing."""
    parent = entry.parent_class
    shown = _shown(entry)
    by_module = shown != entry.quantizer_path
    classes = {target.name: target.parent_class for target in plan.targets.values()}
    owners = classes if by_module else classes | dict.fromkeys(plan.attention, ATTENTION_CLASS)
    if parent is not None and parent not in owners.values():
        return _unknown_class(plan, entry, owners)
    own = [name for name in owners if parent in (None, owners[name])]
    wanted = set(own)
    pool = own if by_module else [slot for slot, _ in plan.slots() if slot.rpartition(".")[0] in wanted]
    count, of_class = (len(own), f" of the class {parent}") if parent is not None else (len(classes), "")
    what = f"'{shown}' matches none of {count} modules{of_class}"
    return ConfigError(what, where=str(entry.origin), hint=nearby.hint(shown, pool), kind="E-PATTERN-NOMATCH")


def _unknown_class(plan: Plan, entry: Entry, owners: Mapping[str, str]) -> ConfigError:
    """Returns the error for a class that no module has. A flag may leave `nn.` out."""
    prefix = "" if entry.origin.is_flag else "nn."
    parent = str(entry.parent_class).removeprefix("nn.")
    fitting = fitting_classes(plan, entry.quantizer_path) or sorted({*owners.values()} - {ATTENTION_CLASS})
    known = [name.removeprefix("nn.") for name in fitting]
    near = near_misses(parent, known, 1)
    listed = ", ".join(f"{prefix}{name}" for name in known)
    return ConfigError(
        f"unknown class of layer '{parent if entry.origin.is_flag else entry.parent_class}': "
        f"it matches none of {len(owners)} modules",
        where=str(entry.origin),
        hint=f"did you mean '{prefix}{near[0]}'?" if near else f"use one of {listed}",
        kind="E-PATTERN-NOMATCH",
    )


def fitting_classes(plan: Plan, pattern: str) -> list[str]:
    """Returns classes of modules that have a quantizer of this pattern; that of attention only if no other has one."""
    matches = Patterns().matcher(stage_of(pattern)[0])
    classes = {target.name: target.parent_class for target in plan.targets.values()}
    modules = {slot.rpartition(".")[0] for slot, _ in plan.slots() if matches(slot)}
    found = {classes.get(module, ATTENTION_CLASS) for module in modules}
    return sorted(found - {ATTENTION_CLASS} or found)


def check_effect(
    plan: Plan, outcomes: Iterable[tuple[Hits, Decision]], meant: Collection[int] = (), *, edited: bool = False
) -> None:
    """Raises ConfigError for an entry of the user's that enables and ends without any enabled slot, and for a plan that
    quantizes nothing.

    outcomes   what was decided, with the entries that spoke of it, in the order of the slots
    meant      entries that may leave others without effect: whoever edits a plan or switches by a flag means it
    edited     whether the plan is one that was edited
    """
    found = list(outcomes)
    deciders = {decision.entry for _, decision in found if decision.spec is not None}
    for indices in _enabling(plan).values():
        entry = plan.entries[indices[0]]
        if not plan.matches[indices[0]] or deciders.intersection(indices):
            continue
        winners = [decision for hits, decision in found if not set(hits).isdisjoint(indices)]
        if any(decision.spec is not None for decision in winners):
            continue  # overruled by another enabling entry: not without effect
        overruling = [d.entry for d in winners if d.entry is not None and d.entry not in indices]
        if not set(overruling).isdisjoint(meant):
            continue
        without_cfg = any(decision.entry in indices for decision in winners)  # on, and nothing to quantize with
        later = {} if without_cfg else dict.fromkeys(str(plan.entries[index].origin) for index in overruling)
        raise ConfigError(
            f"'{_shown(entry)}' switches quantizers on, but all of them end switched off",
            where=str(entry.origin),
            hint=f"check the later entries, which win: {'; '.join(list(later)[:3])}"
            if later
            else "add a cfg; there is none to switch on",
            kind="E-PLAN-EMPTY",
        )
    if not edited:
        _check_weights(plan)
    if not any(plan.quantized_alike()) and not any(module.specs for module in plan.attention.values()):
        listed = "; ".join(f"{_shown(e)} ({e.origin})" for e in plan.entries[:6])
        hint = f"check the entries, in their order: {listed}"
        if not listed:
            hint = "add entries that switch quantizers on, or use --scheme instead: the recipe has no entries"
        raise ConfigError("the plan quantizes nothing", hint=hint, kind="E-PLAN-EMPTY")


def _check_weights(plan: Plan) -> None:
    """Raises ConfigError when entries ask for weights and none is quantized: experts only, say, and a dense model.

    Then not even a cache that is quantized is what was meant. ModelOpt has the same guard.
    """
    asking = [e for e in plan.entries if e.enable and e.cfg is not None and "weight_quantizer" in e.quantizer_path]
    if asking and not any(plan.quantized_alike()):
        patterns = ", ".join(dict.fromkeys(f"'{_shown(entry)}'" for entry in asking[:3]))
        raise ConfigError(
            f"entries ask to quantize weights ({patterns}), and no weight is quantized",
            where=str(asking[0].origin),
            hint="run 'quark plan --scheme mxfp4 --modules' to see the names in this model",
            kind="E-PLAN-EMPTY",
        )


def _enabling(plan: Plan) -> dict[str, list[int]]:
    """Returns indices of the user's entries that enable, by what they count as."""
    units: dict[str, list[int]] = {}
    for index, entry in enumerate(plan.entries):
        if entry.user and entry.enable:
            units.setdefault(entry.unit or f"#{index}", []).append(index)
    return units
