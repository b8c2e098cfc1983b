"""Changes plans from a program, by the names NVIDIA ModelOpt gives its functions. Torch-free.

A plan of `quarkcli.make_plan` knows what it was resolved from (`Basis`). An edit appends entries to the end of the
ordered list and resolves the list again, in place. So `quarkcli.quantize` follows the edited plan, and the written
recipe has the new entries. The rules are those of the list: a cfg replaces all attributes, an entry without a cfg
only switches, a list makes a chain. An edit that makes no sense for a slot is refused at once and leaves the plan as
it was; `quantize` checks whether the plan has an effect.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from reprlib import repr as shortened
from typing import Any

from quarkcli.documents.native import native
from quarkcli.errors import ConfigError, UsageError
from quarkcli.plan.compose import Basis
from quarkcli.plan.effects import fitting_classes
from quarkcli.plan.model import TARGET_KINDS, Decision, Plan
from quarkcli.plan.names import ATTENTION_CLASS, Names, stage_of
from quarkcli.plan.resolve import attention_names, attention_slots, resolve
from quarkcli.recipe import nearby
from quarkcli.recipe.attributes import Cfg, to_spec
from quarkcli.recipe.attributes.partial import changed
from quarkcli.recipe.entries import Entry, Origin
from quarkcli.recipe.normalize import Canonical, normalize, path_text
from quarkcli.recipe.tried import is_weight, located

Selection = str | Callable[[str], bool]  # a pattern on slot names, or a function that says yes to some
ParentClass = str | type | None

_NUMBER, _MARK = re.compile(r"\.[0-9]+(?=\.)"), ".#"


def set_quantizer_by_cfg(plan: Plan, quant_cfg: Any) -> None:
    """Applies entries in order on top of the plan.

    quant_cfg   any shape that a `quant_cfg` may have, see `normalize_quant_cfg_list`

    The plan lists a pattern that matches nothing; it is an error only if its entry says `required`. Raises ConfigError
    if an entry is wrong.
    """
    found = normalize(quant_cfg)
    if found.notes:
        text = "; ".join(f"{path_text(path)}: {note}" for path, note in found.notes)
        warnings.warn(text, DeprecationWarning, stacklevel=2)
    _extend(plan, [_entry(plan, row) for row in found.entries])


@contextmanager
def set_quantizer_by_cfg_context(plan: Plan, quant_cfg: Any) -> Iterator[Plan]:
    """As `set_quantizer_by_cfg`, until the `with` block ends, also by an exception; then the plan is as it was before,
    whatever was edited inside.
    """
    before = dict(vars(plan))  # edits replace what a plan holds and change none of it
    try:
        set_quantizer_by_cfg(plan, quant_cfg)
        yield plan
    finally:
        vars(plan).clear()
        vars(plan).update(before)


def set_quantizer_attributes_full(
    plan: Plan, wildcard_or_filter: Selection, attributes: Cfg, parent_class: ParentClass = None
) -> None:
    """Replaces all attributes of the slots selected, and switches them on unless `attributes` has `enable: False`.

    attributes    a mapping in any vocabulary, or a list of them for a chain; others get their default
    parent_class  only slots of modules of this class: `"nn.Linear"`, or torch's class

    Raises ConfigError for wrong attributes and when nothing is selected.
    """
    name = "set_quantizer_attributes_full"
    row = {"quantizer_path": "*", "cfg": attributes}
    (canonical,) = normalize([row], lambda path: f"{name} {'.'.join(map(str, path[2:]))}".rstrip()).entries
    _extend(plan, _rows(plan, wildcard_or_filter, canonical, _class_name(parent_class), name))


def set_quantizer_attributes_partial(
    plan: Plan, wildcard_or_filter: Selection, partial_attributes: Cfg, parent_class: ParentClass = None
) -> None:
    """Changes some attributes of the slots selected and keeps the others; slots that never had any stay as they are.

    partial_attributes  a mapping, which goes into every stage of a chain, or one mapping per stage of a chain; a key
                        replaces that key's whole value. `enable` switches; without it, slots stay on or off. `axis`
                        and `block_sizes` exclude each other, and setting one takes the other out. Words of ours or of
                        ModelOpt's, whatever the slots were written in

    Whether a slot is a chain never changes. Raises ConfigError for wrong attributes, for a list where there is no chain
    of that length, and when nothing with attributes is selected.
    """
    name = "set_quantizer_attributes_partial"
    parent = _class_name(parent_class)
    if isinstance(wildcard_or_filter, str) and stage_of(wildcard_or_filter)[1] is not None:
        raise ConfigError(
            "one stage of a chain (two quantizations in a row) cannot be changed alone",
            where=_call(name, wildcard_or_filter),
            hint="use set_quantizer_attributes_full, or a list with a mapping for every stage",
            kind="E-PYTHON-VALUE",
        )
    given, enable = _switch(partial_attributes, name)
    selected = _selected(plan, wildcard_or_filter, parent, name)
    if not any(given if isinstance(given, list) else [given]):
        if enable is None:
            raise ConfigError("no attribute is given", where=name, kind="E-PYTHON-VALUE")
        row = Canonical("*", None, enable)
        _extend(plan, _rows(plan, wildcard_or_filter, row, parent, name))
        return
    alike: dict[str, list[str]] = {}
    for slot, decision in selected.items():
        if decision.cfg:
            alike.setdefault(_key(slot, decision), []).append(slot)
    if not alike:
        raise ConfigError(
            "none of the selected quantizers has attributes to change",
            where=_call(name, wildcard_or_filter),
            hint="use set_quantizer_attributes_full",
            kind="E-PYTHON-VALUE",
        )
    rows = [(slots, *_merged(slots[0], selected[slots[0]], given, enable)) for slots in alike.values()]
    if isinstance(wildcard_or_filter, str) and len(rows) == 1 and len(rows[0][0]) == len(selected):
        said = [(wildcard_or_filter, parent, *rows[0][1:])]
    else:
        said = [(pattern, None, cfg, on) for slots, cfg, on in rows for pattern in _patterns(plan, slots)]
    origin = Origin(_call(name, wildcard_or_filter))
    unit = _unit(plan, origin)
    _extend(plan, [Entry(pattern, cfg, on, scope, True, origin, unit, on) for pattern, scope, cfg, on in said])


def set_quantizer_attribute(
    plan: Plan, wildcard_or_filter: Selection, attribute: Cfg, parent_class: ParentClass = None
) -> None:
    """The old name of `set_quantizer_attributes_partial`."""
    warnings.warn(
        "set_quantizer_attribute is deprecated; use set_quantizer_attributes_partial, or set_quantizer_attributes_full",
        DeprecationWarning,
        stacklevel=2,
    )
    set_quantizer_attributes_partial(plan, wildcard_or_filter, attribute, parent_class)


def enable_quantizer(plan: Plan, wildcard_or_filter: Selection, parent_class: ParentClass = None) -> None:
    """Switches slots on, with the attributes they have. Raises ConfigError when none of them has any."""
    name = "enable_quantizer"
    parent = _class_name(parent_class)
    selected = _selected(plan, wildcard_or_filter, parent, name)
    if not any(decision.cfg for decision in selected.values()):
        raise ConfigError(
            "none of the selected quantizers has attributes to be switched on with",
            where=_call(name, wildcard_or_filter),
            hint="use set_quantizer_attributes_full",
            kind="E-PYTHON-VALUE",
        )
    _extend(plan, _rows(plan, wildcard_or_filter, Canonical("*", None, True), parent, name))


def disable_quantizer(plan: Plan, wildcard_or_filter: Selection, parent_class: ParentClass = None) -> None:
    """Switches slots off; they keep their attributes. Raises ConfigError when nothing is selected."""
    row = Canonical("*", None, False)
    _extend(plan, _rows(plan, wildcard_or_filter, row, _class_name(parent_class), "disable_quantizer"))


# --- the list ---------------------------------------------------------------------------------------------------------


def _extend(plan: Plan, entries: Sequence[Entry]) -> None:
    """Appends entries to the list behind the plan and puts what that resolves to into the plan."""
    basis = _basis(plan)
    overrides = replace(basis.overrides, entries=(*basis.overrides.entries, *entries))
    resolved = resolve(basis.recipe, overrides, basis.layout, guards=False)
    resolved.basis = replace(basis, overrides=overrides)
    vars(plan).update(vars(resolved))


def _basis(plan: Plan) -> Basis:
    if not isinstance(plan, Plan):
        raise _not("plan", "a plan", plan, "give what quarkcli.make_plan returns")
    if plan.basis is None:
        raise UsageError(
            "this plan cannot be edited", hint="use a plan that quarkcli.make_plan made", kind="E-PYTHON-CALL"
        )
    return plan.basis


def _check(plan: Plan, selection: Selection) -> None:
    """Raises UsageError for arguments of another type, which would fail inside with a message about our code."""
    _basis(plan)
    if not isinstance(selection, str) and not callable(selection):
        hint = "give one pattern at a time, or a function of a quantizer's name"
        raise _not("wildcard_or_filter", "a pattern or a function", selection, hint)


def _not(name: str, wanted: str, value: Any, hint: str) -> UsageError:
    return UsageError(f"{name} must be {wanted}, not {shortened(value)}", hint=hint, kind="E-PYTHON-CALL")


def _entry(plan: Plan, row: Canonical) -> Entry:
    origin = Origin(f"set_quantizer_by_cfg {path_text(row.place)}")
    if row.cfg is not None:
        located(origin, to_spec, row.cfg, weight=is_weight(row.quantizer_path))
    must = row.required is True  # what need not match need not have an effect either
    unit = _unit(plan, origin)
    return Entry(row.quantizer_path, row.cfg, row.enable, row.parent_class, must, origin, unit, must)


def _rows(plan: Plan, selection: Selection, row: Canonical, parent: str | None, call: str) -> list[Entry]:
    """Returns the entries that say `row` of a pattern, or of every slot that a function selects."""
    _check(plan, selection)
    origin = Origin(_call(call, selection))
    if isinstance(selection, str):
        patterns = [selection]
    else:
        patterns = _patterns(plan, list(_selected(plan, selection, parent, call)))
    for pattern in patterns if row.cfg is not None else ():
        located(origin, to_spec, row.cfg, weight=is_weight(pattern))
    unit = _unit(plan, origin)
    # What the user switched on here must have an effect; a switch off has one by itself.
    return [Entry(pattern, row.cfg, row.enable, parent, True, origin, unit, row.enable) for pattern in patterns]


def _unit(plan: Plan, origin: Origin) -> str:
    """Returns a unit of its own for each call, also when two calls say the same."""
    return f"{origin} #{len(_basis(plan).overrides.entries)}"


# --- slots ------------------------------------------------------------------------------------------------------------


def _selected(plan: Plan, selection: Selection, parent: str | None, call: str) -> dict[str, Decision]:
    """Returns slots by name. Raises ConfigError when there are none, with near misses of a pattern or its classes."""
    _check(plan, selection)
    found = dict(_matched(plan, selection, parent) if isinstance(selection, str) else _chosen(plan, selection, parent))
    if found:
        return found
    pattern = selection if isinstance(selection, str) else ""
    hint = nearby.hint(pattern, [slot for slot, _ in plan.slots()])
    what = "the pattern selects no quantizer"
    if parent is not None:
        what += f" of modules of the class {parent}"
        classes = fitting_classes(plan, pattern)
        hint = f"use parent_class={classes[0]!r}, or leave it out" if classes else hint
    raise ConfigError(what, where=_call(call, selection), hint=hint, kind="E-PYTHON-VALUE")


def _matched(plan: Plan, pattern: str, parent: str | None) -> Iterator[tuple[str, Decision]]:
    """Yields the slots of a pattern, those of a chain also by `*weight_quantizer.1`."""
    names = Names([Entry(pattern)])
    for weight, hits in names.of_weights(plan.targets.values()):
        if parent in (None, weight.parent_class):
            for kind, own in zip(TARGET_KINDS, hits, strict=True):
                if own:
                    yield f"{weight.name}.{kind}_quantizer", plan.targets[weight.name].slots[kind]
    names.learn(attention_slots(plan.attention))
    for module in plan.attention.values() if parent in (None, ATTENTION_CLASS) else ():
        for kind, decision in module.slots.items():
            if names.of_slot(attention_names(module.name, kind)):
                yield f"{module.name}.{kind}_bmm_quantizer", decision


def _chosen(plan: Plan, selection: Callable[[str], bool], parent: str | None) -> Iterator[tuple[str, Decision]]:
    classes = {target.name: target.parent_class for target in plan.targets.values()}
    for slot, decision in plan.slots():
        kind = classes.get(slot.rpartition(".")[0], ATTENTION_CLASS)
        if parent in (None, kind) and selection(slot):
            yield slot, decision


def _patterns(plan: Plan, slots: Sequence[str]) -> list[str]:
    """Returns patterns that match these slots and no other.

    Numbers are folded where that makes no difference, so that 46,000 experts are a few rows.
    """
    left = list(slots)
    found: list[str] = []
    for kept in (0, 1):  # numbers written out, from the left: of blocks, for example
        sizes = Counter(_folded(slot, kept) for slot, _ in plan.slots())
        mine: dict[str, list[str]] = {}
        for slot in left:
            mine.setdefault(_folded(slot, kept), []).append(slot)
        whole = {pattern: members for pattern, members in mine.items() if 1 < len(members) == sizes[pattern]}
        found += ["re:" + re.escape(pattern).replace(re.escape(_MARK), r"\.[0-9]+") for pattern in whole]
        done = {slot for members in whole.values() for slot in members}
        left = [slot for slot in left if slot not in done]
    return found + left


def _folded(slot: str, kept: int) -> str:
    """Returns the name with a mark for its numbered steps but the first `kept`."""
    first = _NUMBER.search(slot) if kept else None
    end = first.end() if first is not None else 0
    return slot[:end] + _NUMBER.sub(_MARK, slot[end:])


def _call(name: str, selection: Selection) -> str:
    return f"{name}('{selection}')" if isinstance(selection, str) else f"{name}({_function(selection)})"


def _function(selection: Callable[[str], bool]) -> str:
    return getattr(selection, "__name__", type(selection).__name__)


def _class_name(parent: ParentClass) -> str | None:
    """Returns `nn.Linear` of torch's class or of its name."""
    if parent is None or isinstance(parent, str):
        return parent
    if not isinstance(parent, type):
        raise _not("parent_class", "a class or its name", parent, "give 'nn.Linear', for example")
    return f"nn.{parent.__name__}"


# --- attributes -------------------------------------------------------------------------------------------------------


def _switch(attributes: Any, call: str) -> tuple[Any, bool | None]:
    """Returns (attributes without `enable`, the `enable` among them)."""
    several = isinstance(attributes, list | tuple)
    stages = native(list(attributes) if several else [attributes])
    if not stages or not all(isinstance(stage, Mapping) for stage in stages):
        raise ConfigError(
            f"attributes must be a mapping or a list of mappings, not {attributes!r}",
            where=call,
            kind="E-PYTHON-VALUE",
        )
    switches = {repr(stage["enable"]): stage["enable"] for stage in stages if "enable" in stage}
    if len(switches) > 1 or not all(isinstance(value, bool) for value in switches.values()):
        raise ConfigError(
            f"enable must be true or false, not {' and '.join(switches)}", where=call, kind="E-PYTHON-VALUE"
        )
    rest = [{key: value for key, value in stage.items() if key != "enable"} for stage in stages]
    return rest if several else rest[0], next(iter(switches.values()), None)


def _merged(slot: str, decision: Decision, given: Any, enable: bool | None) -> tuple[Any, bool]:
    """Returns (cfg, on) of a slot after a partial change. Raises ConfigError naming the slot."""
    origin = Origin(slot)
    old = decision.cfg
    assert old is not None
    weight = is_weight(slot)
    cfg = located(origin, changed, old, given, weight=weight)
    before, after = (located(origin, to_spec, each, weight=weight) for each in (old, cfg))
    if decision.spec is not None and len(decision.spec.stages) != len(before.stages):
        raise ConfigError(
            "a stage of this chain is off", where=slot, hint="use set_quantizer_attributes_full", kind="E-PYTHON-VALUE"
        )
    if len(before.stages) != len(after.stages):
        raise ConfigError(
            "this would make a chain (two quantizations in a row), or end one",
            where=slot,
            hint="use set_quantizer_attributes_full",
            kind="E-PYTHON-VALUE",
        )
    return cfg, decision.spec is not None if enable is None else enable


def _key(slot: str, decision: Decision) -> str:
    """Returns a key that is equal for slots which a partial change treats alike."""
    on = decision.spec is not None
    return json.dumps([decision.cfg, on, is_weight(slot)], default=str)
