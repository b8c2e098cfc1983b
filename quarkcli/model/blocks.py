"""Loads and unloads the weights of a skeleton, outside tensors and decoder blocks, one set at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quarkcli.errors import ModelError
from quarkcli.model.buffers import rebuild_buffers
from quarkcli.model.failures import DATA_FREE_HINT
from quarkcli.model.library import PreTrainedModel
from quarkcli.model.names import Group, NameMap, build_map, materialize, rearranged
from quarkcli.model.skeleton import HeaderLike, Skeleton, text_modules

Convert = Callable[[Any, Group, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


class Weights:
    """Tracks the parameters of each block and of the outside, and loads and unloads them.

    by_block  parameter names of each decoder block
    outside   parameter names that text needs outside the blocks: embedding, final norm, head, ...
    unused    file tensors of submodels that text never runs (vision, audio)
    """

    def __init__(
        self,
        skeleton: Skeleton,
        headers: Mapping[str, HeaderLike],
        device: torch.device,
        transposed_experts: Collection[str] = (),
    ) -> None:
        self.skeleton = skeleton
        self.device = device
        with skeleton.code.running("does not say which parameters it has"):
            self.map: NameMap = build_map(skeleton.model, headers)
            self._transposed = {name for name in transposed_experts if self.map.by_file[name].tells_by_shape}
            self._dtypes = _dtype_plan(skeleton)
            self._sort_parameters()
        self._aliases = self._tie()
        self._check()
        self._order = {name: position for position, name in enumerate(headers)}

    def files(self, params: Iterable[str]) -> list[str]:
        """Returns file tensors that these parameters need, in file order; a tied parameter needs the other one's."""
        names = self.map.files_of(self._aliases.get(param, param) for param in params)
        return sorted(names, key=self._order.__getitem__)

    def load(self, params: list[str], buffers: list[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts parameters on the device, cast to their dtypes, and rebuilds non-persistent buffers.

        Groups with no tensor in `tensors` keep what is loaded already; a group that has some must have all.

        raises  ModelError when a group is incomplete or a parameter is left without values
        """
        made: dict[str, nn.Parameter] = {}
        for param in params:
            source = self._aliases.get(param, param)
            if source not in made and self._complete(source, tensors):
                made.update(self._materialize(source, tensors))
            if source in made:
                self._put(param, made[source])
        self._rebuild(buffers)
        self._check_loaded(params)

    def made(self, params: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns parameters made of file tensors, on the device and in their dtypes, by name; gradients flow."""
        found: dict[str, torch.Tensor] = {}
        for param in params:
            source = self._aliases.get(param, param)
            if source not in found and self._complete(source, tensors):
                found |= self._converted(source, tensors, rearranged)
        return {param: found[source] for param in params if (source := self._aliases.get(param, param)) in found}

    def unload(self, params: Iterable[str], buffers: Iterable[str]) -> None:
        """Drops the storage of these parameters and buffers."""
        for name in (*params, *buffers):
            module, leaf = self._owner(name)
            empty = torch.empty_like(_held(module, leaf), device="meta")
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
            else:
                module._buffers[leaf] = empty

    def owners(self, file: str) -> list[tuple[str, nn.Module]]:
        """Returns (parameter name, owning module) of what a file tensor fills and of parameters tied to it."""
        group = self.map.by_file.get(file)
        if group is None:
            raise KeyError(f"{file!r} is no tensor that the model loads")
        tied = [param for param, source in self.shared().items() if source in group.params]
        return [(param, self._owner(param)[0]) for param in (*group.params, *tied)]

    def shared(self) -> dict[str, str]:
        """Returns a mapping from each tied parameter of a decoder block to its source in another block."""
        return {
            param: source
            for param, source in self._aliases.items()
            if None not in (self.block_of(param), self.block_of(source))
            and self.block_of(param) != self.block_of(source)
        }

    def block_of(self, param: str) -> int | None:
        """Returns the index of the decoder block that a parameter or buffer lies in, or None."""
        match = re.match(re.escape(self.skeleton.blocks_path) + r"\.(\d+)\.", param)
        return int(match[1]) if match else None

    def _sort_parameters(self) -> None:
        model = self.skeleton.model
        scopes = [name for name, _ in text_modules(model)]
        others = _other_models(model, scopes)
        blocks = range(len(self.skeleton.blocks))
        self.by_block: list[list[str]] = [[] for _ in blocks]
        self.block_buffers: list[list[str]] = [[] for _ in blocks]
        self.outside: list[str] = []
        self.outside_buffers: list[str] = []
        unused = set()
        persistent = model.state_dict()
        for name in (*persistent, *(name for name, _ in model.named_non_persistent_buffers())):
            index = self.block_of(name)
            if any(name.startswith(other + ".") for other in others):
                unused.add(name)
            elif index is not None:
                (self.by_block if name in persistent else self.block_buffers)[index].append(name)
            else:
                (self.outside if name in persistent else self.outside_buffers).append(name)
        self.unused = [file for file, group in self.map.by_file.items() if unused.issuperset(group.params)]

    def _tie(self) -> dict[str, str]:
        """Returns a mapping from parameters without file tensors to the tied ones that have some."""
        missing, ties = set(self.map.missing), getattr(self.skeleton.model, "all_tied_weights_keys", {})
        aliases = {}
        for source in dict.fromkeys(ties.values()):
            names = [source, *(target for target, other in ties.items() if other == source)]
            present = next((name for name in names if name not in missing), None)
            if present is not None:
                aliases.update({name: present for name in names if name in missing})
        return aliases

    def _check(self) -> None:
        needed = [*self.outside, *(name for block in self.by_block for name in block)]
        missing = set(self.map.missing) - self._aliases.keys()
        lost = [name for name in needed if name in missing]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise ModelError(
                f"no tensor in the files fills the parameters {', '.join(lost[:3])}{more}",
                hint="check that all weight files are there and that config.json belongs to them; " + DATA_FREE_HINT,
                kind="E-CLASS-TENSORS",
            )
        wrong = [self.map.wrong_shapes[name] for name in needed if name in self.map.wrong_shapes]
        if wrong:
            raise ModelError(wrong[0], hint="use the config.json that belongs to these files", kind="E-CLASS-TENSORS")

    def _complete(self, param: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        names = self.map.by_param[param].names
        absent = [name for name in names if name not in tensors]
        if absent and len(absent) < len(names):
            raise ModelError(f"the parameter {param!r} needs the tensor {absent[0]!r} too", kind="E-CLASS-TENSORS")
        return not absent

    def _materialize(self, param: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
        made = self._converted(param, tensors)
        return {name: nn.Parameter(made.pop(name), requires_grad=False) for name in list(made)}

    def _converted(
        self, param: str, tensors: Mapping[str, torch.Tensor], convert: Convert = materialize
    ) -> dict[str, torch.Tensor]:
        """Returns the values of a parameter, and of those made with it, on the device and in their dtypes."""
        group = self.map.by_param[param]
        transposed = {name: tensors[name].transpose(-1, -2) for name in self._transposed.intersection(group.names)}
        made = convert(self.skeleton.model, group, {**tensors, **transposed} if transposed else tensors)
        return {name: self._own(name, made.pop(name)) for name in group.params}

    def _own(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        module, leaf = self._owner(name)
        own = _held(module, leaf).dtype
        dtype = next((dtype for pattern, dtype in self._dtypes if pattern.search(name)), own)
        return tensor.to(device=self.device, dtype=dtype)

    def _put(self, name: str, value: nn.Parameter) -> None:
        module, leaf = self._owner(name)
        if leaf in module._parameters:
            module._parameters[leaf] = value
        else:
            module._buffers[leaf] = value.data

    def _rebuild(self, buffers: Iterable[str]) -> None:
        known = self.skeleton.buffers
        for name in known.keys() & set(buffers):
            module, leaf = self._owner(name)
            # A copy: a forward may write into it.
            module._buffers[leaf] = known[name].to(self.device, copy=True)
        empty = [name for name in buffers if self._is_meta(name)]
        if empty:
            with self.skeleton.code.running("fails when its buffers are filled"):
                rebuild_buffers(self.skeleton.model, empty, self.device)

    def _check_loaded(self, params: Iterable[str]) -> None:
        empty = [name for name in params if self._is_meta(name)]
        if empty:
            raise ModelError(
                f"the parameter {empty[0]!r} was given no values ({self.files(empty[:1])[0]!r} is absent)",
                kind="E-CLASS-TENSORS",
            )

    def _is_meta(self, name: str) -> bool:
        return _held(*self._owner(name)).is_meta

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.skeleton.model.get_submodule(path), leaf


def _held(module: nn.Module, leaf: str) -> torch.Tensor:
    tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    assert tensor is not None  # neither state_dict nor named_buffers lists a None
    return tensor


def _dtype_plan(skeleton: Skeleton) -> list[tuple[re.Pattern[str], torch.dtype]]:
    """Returns patterns, searched in parameter names, of what stays in another dtype (float32)."""
    plan = skeleton.model._get_dtype_plan(skeleton.dtype)
    return [(re.compile(pattern.replace("*", ".*")), dtype) for pattern, dtype in plan.items()]


def _other_models(model: torch.nn.Module, scopes: Iterable[str]) -> list[str]:
    """Returns paths of the submodels that text does not need: transformers models outside `scopes`."""
    needed = set(scopes)
    return [name for name, part in model.named_modules() if isinstance(part, PreTrainedModel) and name not in needed]
