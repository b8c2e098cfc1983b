"""Maps file tensors to the parameters that they fill. The map goes forward only and uses transformers' renaming rules.

Two functions: `build_map` reads names and shapes only and runs every conversion once on meta tensors; `materialize`
repeats one conversion with real tensors. The map is never inverted: transformers' reverse conversion gives wrong
names or layouts for several families.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from quarkcli.errors import ModelError
from quarkcli.model.experts import as_usual
from quarkcli.model.library import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from quarkcli.model.skeleton import DTYPES, HeaderLike


@dataclass
class Group:
    """File tensors that become parameters together.

    target    name transformers calls the group by
    files     (source pattern, file tensor name) in the order of collection; for stacked experts this order IS the
              expert order
    rule      transformers' converter, or None when the file tensor is the parameter
    params    parameter (or persistent buffer) names it fills
    """

    target: str
    files: list[tuple[str, str]] = field(default_factory=list)
    rule: Any = None
    params: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.files]

    @property
    def tells_by_shape(self) -> bool:
        """True when the converter transposes what has not the parameter's shape, and nothing else."""
        return any(getattr(operation, "check_dims", False) for operation in getattr(self.rule, "operations", ()))


@dataclass
class NameMap:
    """The whole map; every file tensor is in exactly one group or in `unknown`.

    by_file, by_param  the group of a file tensor, of a parameter
    unknown            file tensors that are no parameter (MTP layers, old rotary buffers), in file order
    missing            parameters that no file tensor fills, tied ones included
    wrong_shapes       parameter -> what is wrong, for parameters whose file tensors have another shape
    """

    by_file: dict[str, Group]
    by_param: dict[str, Group]
    unknown: list[str]
    missing: list[str]
    wrong_shapes: dict[str, str]

    def files_of(self, params: Iterable[str]) -> list[str]:
        """Returns file tensors that fill these parameters, each once, in expert order."""
        return list(dict.fromkeys(name for param in params for name in self.by_param[param].names))


def build_map(model: Any, headers: Mapping[str, HeaderLike]) -> NameMap:
    """Maps file tensors to the parameters of `model`, a skeleton on the meta device. Reads no weights."""
    params = model.state_dict()
    groups, unknown = _collect(model, params, headers)
    known = NameMap({}, {}, unknown, [], {})
    for group in groups:
        _place(known, group, _convert_shapes(model, group, headers), params)
    known.missing = [name for name in params if name not in known.by_param]
    lost = set(known.unknown)
    known.unknown = [name for name in headers if name in lost]
    return known


def materialize(model: Any, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the parameters of `group` from its real file tensors.

    Every tensor of the group must be in `tensors`. A parameter that is stored as it is shares memory with its file
    tensor; stacked and split ones are new.
    """
    if group.rule is None:
        return {group.target: tensors[group.names[0]]}
    rule = deepcopy(group.rule)
    for pattern, name in group.files:
        rule.add_tensor(group.target, name, pattern, tensors[name])
    return rule.convert(group.target, model=model, config=model.config)


def rearranged(model: Any, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `materialize`, with gradients into `tensors`, which transformers' converters stop.

    A conversion only moves values, so it is run on their places: file values are then looked up by place.
    """
    if group.rule is None:
        return materialize(model, group, tensors)
    places, start = {}, 0
    for name in group.names:
        count = tensors[name].numel()
        places[name] = torch.arange(start, start + count, device=tensors[name].device).view(tensors[name].shape)
        start += count
    values = torch.cat([tensors[name].reshape(-1) for name in group.names])
    return {name: values[place] for name, place in materialize(model, group, places).items()}


def _collect(model: Any, params: Mapping[str, Any], headers: Iterable[str]) -> tuple[list[Group], list[str]]:
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    single = _of_single_experts()
    usual = {pattern: rule for rule in single for pattern in rule.source_patterns if pattern not in by_pattern}
    by_pattern |= usual
    groups: dict[str, Group] = {}
    unknown = []
    for name in sorted(headers, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, params)
        if target not in params and name in params:  # already in the form the model has in memory
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, params)
        if target not in params and ".experts." in name:
            target, pattern = rename_source_key(name, renamings, single, model.base_model_prefix, params)
        if target not in params or (pattern in usual and not as_usual(model.get_submodule(target.rpartition(".")[0]))):
            unknown.append(name)
            continue
        rule = by_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(target, Group(target, rule=rule))
        if group.files and (rule is None or group.rule is None):
            raise ModelError(
                f"the tensors {group.names[0]!r} and {name!r} both fill the parameter {target!r}",
                kind="E-CLASS-TENSORS",
            )
        group.files.append((pattern or name, name))
    return list(groups.values()), unknown


def _of_single_experts() -> list[Any]:
    """Returns rules for experts one by one, as quark writes them, where a class has none since its own are fused."""
    gate_up = WeightConverter(
        source_patterns=["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
        target_patterns="experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    )
    down = WeightConverter(
        source_patterns="experts.*.down_proj.weight",
        target_patterns="experts.down_proj",
        operations=[MergeModulelist(dim=0)],
    )
    return [gate_up, down]


def _convert_shapes(model: Any, group: Group, headers: Mapping[str, HeaderLike]) -> dict[str, torch.Tensor]:
    empty = {
        name: torch.empty(tuple(headers[name].shape), dtype=DTYPES.get(headers[name].dtype), device="meta")
        for name in group.names
    }
    try:
        return materialize(model, group, empty)
    except Exception as error:
        shapes = ", ".join(f"{name} {list(headers[name].shape)}" for name in group.names[:3])
        raise ModelError(
            f"the tensors of the parameter {group.target!r} do not fit together ({shapes}, ...): {error}",
            kind="E-CLASS-TENSORS",
        ) from error


def _place(known: NameMap, group: Group, made: Mapping[str, torch.Tensor], params: Mapping[str, Any]) -> None:
    group.params = [name for name in made if name in params]
    for name in group.names:
        known.by_file[name] = group
    for name in group.params:
        known.by_param[name] = group
        found, wanted = list(made[name].shape), list(params[name].shape)
        if found != wanted:
            known.wrong_shapes[name] = f"{group.names[0]!r} gives {name!r} the shape {found}, the config says {wanted}"
