"""Changes a part of a cfg, in its own words or in those of another vocabulary. Torch-free.

A change in the words of the cfg replaces those keys. Our own words say everything, so that a cfg is first written in
them when the change is. ModelOpt's say less: there the change is what differs between what they mean with it and
without it, and all else of the cfg (scale rule, observer, smallest scale) stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from quarkcli.errors import ConfigError
from quarkcli.recipe.attributes import Cfg, modelopt, native, to_spec, vocabularies, words_of
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.spec import ELEMENTS, ScaleSpec, TensorSpec

_REPLACES_EACH_OTHER = {"axis": "block_sizes", "block_sizes": "axis"}
_CHAIN_KEYS = {"then", "stored"}
Change = Mapping[str, Any]


def changed(old: Cfg, given: Change | Sequence[Change], *, weight: bool) -> Cfg:
    """Returns `old` with the attributes that are given.

    They are a mapping for every stage of a chain, or a list with one per stage.

    Raises ConfigError for a list of another length, and for words that cannot be put beside those of `old`.
    """
    spec = to_spec(old, weight=weight)
    changes = _for_each(given, len(spec.stages))
    keys = {str(key) for change in changes for key in change}
    chained = isinstance(old, Mapping) and spec.then is not None  # our own words nest
    known = any(keys <= words for words in vocabularies())
    if not chained and (keys <= words_of(old) or not known):  # what nobody knows is refused where the cfg is read
        updated = [_updated(stage, change) for stage, change in zip(_stages(old), changes, strict=True)]
        return updated[0] if isinstance(old, Mapping) else updated
    if keys <= set(native.KEYS) and not (chained and keys & _CHAIN_KEYS):
        change_one = _by_native
    elif keys <= set(modelopt.FIELDS):
        change_one = _by_modelopt
    else:
        raise ConfigError(
            f"{', '.join(sorted(keys - words_of(old)) or sorted(keys))} cannot be changed alone",
            hint="use words of quark or of ModelOpt, or set_quantizer_attributes_full",
            kind="E-ATTRIBUTE-CONFLICT",
        )
    stages = [replace(stage, then=None, stored="first") for stage in spec.stages]
    made = [change_one(stage, change, weight) for stage, change in zip(stages, changes, strict=True)]
    for before, after in zip(reversed(spec.stages[:-1]), reversed(made[:-1]), strict=True):
        made[-1] = replace(after, then=made[-1], stored=before.stored)
    return spec_to_yaml(made[-1])


def _for_each(given: Change | Sequence[Change], count: int) -> list[Change]:
    if isinstance(given, Mapping):
        return [given] * count
    if count == 1 or len(given) != count:
        stages = "a cfg without a chain" if count == 1 else f"a chain of {count}"
        raise ConfigError(
            f"{len(given)} mappings are given for {stages}",
            hint="use set_quantizer_attributes_full",
            kind="E-ATTRIBUTE-CONFLICT",
        )
    return list(given)


def _stages(cfg: Cfg) -> list[Change]:
    return [cfg] if isinstance(cfg, Mapping) else list(cfg)


def _updated(old: Change, given: Change) -> dict[str, Any]:
    gone = {_REPLACES_EACH_OTHER[key] for key in given if key in _REPLACES_EACH_OTHER and given[key] is not None}
    return {**{key: value for key, value in old.items() if key not in gone}, **given}


def _by_native(old: TensorSpec, change: Change, weight: bool) -> TensorSpec:
    return to_spec({**spec_to_yaml(old), **change}, weight=weight)


def _by_modelopt(old: TensorSpec, change: Change, weight: bool) -> TensorSpec:
    words = modelopt.from_spec(old)
    before, after = (modelopt.to_spec(each, weight=weight) for each in (words, _updated(words, change)))
    if old.scale is not None and after.scale is not None and _kind(before) != _kind(after):
        # Rules and zero points are of one kind of numbers.
        scale = replace(old.scale, rule=after.scale.rule)
        old = replace(old, scale=scale, zero_point=after.zero_point, rounding=after.rounding)
    return _carried(old, before, after)


def _kind(spec: TensorSpec) -> str:
    return ELEMENTS[spec.element].kind


def _carried(old: Any, before: Any, after: Any) -> Any:
    """Returns `old` with what differs between `before` and `after`, field by field."""
    changes = {}
    for field in fields(old):
        was, now, own = (getattr(each, field.name) for each in (before, after, old))
        if was != now:
            same = all(isinstance(each, ScaleSpec) for each in (was, now, own))
            changes[field.name] = _carried(own, was, now) if same else now
    return replace(old, **changes)
