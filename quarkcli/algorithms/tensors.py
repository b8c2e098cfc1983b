"""Holds the tensors of one part for a transform: by role, in float32, with the rewrites that keep the function.

A transform changes weights, norms and biases here and nowhere else, so that every changed tensor has a name in plan,
report and files. Values are rounded back to the source's dtype once, when a transform is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from quarkcli.errors import ModelError
from quarkcli.family import Channels, Pair, Residual, Values, expert_bias
from quarkcli.numerics.online import turned
from quarkcli.plan.model import Part, Plan, Target


class PartTensors:
    """Any weight, norm or bias of a part, by name.

    mine               weights that the transform was given; None: all
    tensors            the part's tensors in source form; `commit` puts changed ones in their place
    elsewhere          reads a tensor of another part as the transforms before this one leave it
    added              tensors that the source lacks, made by this transform or one before
    scaled             activation and expert -> factor of its channels, where pairs were scaled
    scaled_outputs     linears among them: their outputs, and attention's operands, are others now
    changed_otherwise  something was changed that statistics cannot follow
    notes              what was decided, for the report
    """

    def __init__(
        self,
        plan: Plan,
        part: Part,
        tensors: dict[str, Tensor],
        mine: frozenset[str] | None = None,
        elsewhere: Callable[[str], Tensor] | None = None,
        added: dict[str, Tensor] | None = None,
    ) -> None:
        self.part = part
        self.mine = mine
        self.targets: dict[str, Target] = {t.name: t for t in plan.targets.values() if t.part == part.index}
        self.added: dict[str, Tensor] = {} if added is None else added
        self._plan = plan
        self._elsewhere = elsewhere
        self._tensors = tensors
        self._changing: dict[str, Tensor] = {}
        self._dtypes = {name: tensor.dtype for name, tensor in self.added.items()}
        self.scaled: dict[tuple[str, int | None], Tensor] = {}
        self.scaled_outputs = False
        self.changed_otherwise = False
        self.notes: list[dict[str, Any]] = []

    # -- what there is --------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @property
    def device(self) -> torch.device:
        return next(iter(self._tensors.values())).device if self._tensors else torch.device("cpu")

    @property
    def width(self) -> int:
        """Returns the number of channels of the residual stream."""
        assert self._plan.rewrites.width is not None
        return self._plan.rewrites.width

    @property
    def pairs(self) -> list[Pair]:
        """Returns the channels that can be scaled; none outside the blocks and where the family file names none."""
        if self.part.block is None:
            return []
        vectors = {name for name, tensor in self._tensors.items() if tensor.ndim == 1}
        pairs = self._plan.rewrites.pairs(self.part.name, self.targets, vectors)
        return [pair for pair in pairs if self.mine is None or self.mine.issuperset(pair.weights)]

    @property
    def residual(self) -> Residual:
        """Returns what of the part stands on the residual stream."""
        return self._plan.rewrites.residual(self.part, self.targets)

    @property
    def channels(self) -> list[Channels]:
        """Returns the channels inside a block that can change places."""
        found = self._plan.rewrites.channels(self.part.name, self.targets) if self.part.block is not None else []
        return [own for own in found if self.mine is None or self.mine.issuperset({*own.writers, *own.readers})]

    @property
    def values(self) -> Values | None:
        """Returns the values of the block's attention, where they can change places inside their heads."""
        found = self._plan.rewrites.values(self.part.name, self.targets) if self.part.block is not None else None
        return found if found and (self.mine is None or self.mine >= {found.writer, found.reader}) else None

    def read(self, name: str) -> Tensor:
        """Returns a tensor as it is now, in float32; not to be written to."""
        return self._changing[name] if name in self._changing else self._tensors[name].float()

    def elsewhere(self, name: str) -> Tensor:
        """Returns a tensor of another part, float32, as the transforms before this one leave it before observation."""
        assert self._elsewhere is not None, "only while nothing is observed"
        return self._elsewhere(name).float()

    def columns(self, module: str) -> Tensor:
        """Returns the weight [out, in] of a module as it is now, in float32; not to be written to."""
        view = self.targets[module].view
        whole = self._changing.get(view.tensor, self._tensors[view.tensor])
        found: Tensor = view.of(whole).float()
        return found

    # -- what changes ---------------------------------------------------------------------------------------------

    def weight(self, module: str) -> Tensor:
        """Returns the weight [out, in] of a module, float32, to be changed in place."""
        self.changed_otherwise = True
        return self._weight(module)

    def vector(self, name: str) -> Tensor:
        """Returns a norm, bias or any other tensor of the part by its name, float32, to be changed in place."""
        self.changed_otherwise = True
        return self._vector(name)

    def replace(self, name: str, value: Tensor) -> None:
        """Puts other values of the same shape in the place of a tensor."""
        self.vector(name).copy_(value)

    def untie(self) -> None:
        """Gives a model whose head is its embedding a head of its own, and moves the last norm into it.

        The transform has declared the new head (see `Changes.added`) and what it does to config.json.
        """
        name = f"{self._plan.tied_head}.weight"
        if self._plan.tied_head is None or name in self.added:
            return
        rewrites = self._plan.rewrites
        if self.part.kind == "embed":
            module = rewrites.tied_embedding(self.targets)
            rows, _ = rewrites.tied_shape(self.targets[module])
            head = self.columns(module)[:rows].clone()
            tail = next(part for part in self._plan.parts if part.kind == "tail")
            for norm in rewrites.residual(tail, {}).vectors:
                head.mul_(self.elsewhere(norm) + rewrites.norm_offset)
            self._dtypes[name] = self._tensors[self.targets[module].view.tensor].dtype
            self.added[name] = head
        elif self.part.kind == "tail":
            for norm in self.residual.vectors:
                self.vector(norm).fill_(1.0 - rewrites.norm_offset)

    def add(self, name: str, value: Tensor) -> None:
        """Adds a tensor that the source lacks; the transform has declared it (see `Changes.added`)."""
        self.added[name] = value

    def note(self, **facts: Any) -> None:
        """Notes a decision for the report."""
        self.notes.append(facts)

    def clamp(self, module: str, limits: Tensor) -> None:
        """Clamps the weight of a module to magnitudes, float32 [out, runs of columns], for what quantizes it next.

        Statistics stay those of the weight as it was: this is the first step of rounding, not another function.
        """
        weight = self._weight(module)
        limit = limits.repeat_interleave(weight.shape[1] // limits.shape[1], 1)
        weight.copy_(torch.minimum(torch.maximum(weight, -limit), limit))

    def _scale_input(self, modules: Iterable[str], scale: Tensor) -> None:
        """Multiplies the columns of weights by `scale`, float32 [channels], repeated over heads that share values."""
        for module in modules:
            weight = self._weight(module)
            weight.mul_(self.spread(scale, weight.shape[1]))

    def _scale_output(self, source: str, scale: Tensor) -> Tensor:
        """Multiplies the output of a linear or norm by `scale`, float32 [channels]: rows, biases, norms with offset.

        Returns the scale that a norm really has, rounded to its dtype: one factor holds for a whole channel.
        """
        if source in self.targets:
            self._weight(source).mul_(scale[:, None])
            bias = self._bias(self.targets[source])
            if bias is not None:
                bias.mul_(scale)
            return scale
        name, offset = f"{source}.weight", self._plan.rewrites.norm_offset
        norm = self._vector(name)
        before = norm + offset
        norm.copy_((before * scale - offset).to(self._tensors[name].dtype))
        real = (norm + offset) / before
        real = torch.where(torch.isfinite(real) & (real != 0), real, scale)
        if f"{source}.bias" in self._tensors:
            self._vector(f"{source}.bias").mul_(real)
        return real

    def scale(self, pair: Pair, scale: Tensor) -> None:
        """Multiplies the output of a pair's source by `scale` and divides its readers: the function stays."""
        divisor = self._scale_output(pair.source, scale).reciprocal()
        self._scale_input(pair.readers, divisor)
        self.scaled_outputs = self.scaled_outputs or not pair.norm
        for reader in map(self.targets.__getitem__, pair.readers):
            if reader.site is not None:
                factor = self.spread(divisor.reciprocal(), reader.shape[1])
                self.scaled[reader.site, reader.expert[1] if reader.expert else None] = factor

    def turn_input(self, module: str, block: int) -> None:
        """Turns the columns of a weight by a block Hadamard, for an input that is turned while the model runs."""
        self.changed_otherwise = True
        weight = self._weight(module)
        weight.copy_(turned(weight, block))

    def fold_norms(self) -> None:
        """Moves the weights of norms before readers of the residual stream into those; the norms become 1."""
        self.changed_otherwise = True
        offset = self._plan.rewrites.norm_offset
        for name, readers in self._plan.rewrites.folds(self.part, self.targets).items():
            norm = self._vector(name)
            self._scale_input(readers, norm + offset)
            norm.fill_(1.0 - offset)

    def rotate(self, turn: Callable[[Tensor], Tensor]) -> None:
        """Rotates the part for hidden states x Q. Norms are folded before.

        turn   multiplies the last axis by Q, orthogonal
        """
        self.changed_otherwise = True
        residual = self.residual
        for weight in (*map(self._weight, residual.columns), *self._own_head()):
            for run in weight.split(self.width, 1):  # a linear may read several runs of the channels
                run.copy_(turn(run))
        self._turn_rows(residual.rows, turn)

    def reorder(self, order: Tensor) -> None:
        """Puts the channels of the residual stream in another order: the new channel i is the old `order[i]`."""
        self.changed_otherwise = True
        residual = self.residual
        self._reorder_columns((*map(self._weight, residual.columns), *self._own_head()), order)
        self._turn_rows(residual.rows, taken(order))
        for name in residual.vectors:
            vector = self._vector(name)
            vector.copy_(vector[..., order])

    def reorder_channels(self, channels: Channels, order: Tensor) -> None:
        """Puts channels inside the block in another order: the new channel i is the old `order[i]`."""
        self.changed_otherwise = True
        for module in channels.writers:
            runs = len(self.columns(module)) // channels.width
            starts = torch.arange(runs, device=order.device)[:, None] * channels.width
            self._turn_rows([module], taken((starts + order).reshape(-1)))
        self._reorder_columns(map(self._weight, channels.readers), order)

    def turn_values(self, values: Values, turn: Callable[[Tensor], Tensor]) -> None:
        """Changes the values of attention inside each of their heads, for values x Q.

        turn   multiplies the last axis of [..., groups, head] by Q, orthogonal, one for each group
        """
        self.changed_otherwise = True

        def written(x: Tensor) -> Tensor:
            own = x[..., values.first :]
            made = turn(own.unflatten(-1, (values.groups, values.head))).flatten(-2)
            return torch.cat([x[..., : values.first], made], -1)

        self._turn_rows([values.writer], written)
        weight = self._weight(values.reader)
        grouped = weight.unflatten(1, (values.groups, -1, values.head)).transpose(1, 2)
        weight.copy_(turn(grouped).transpose(1, 2).flatten(1))

    def _turn_rows(self, modules: Iterable[str], turn: Callable[[Tensor], Tensor]) -> None:
        """Changes what linears return: their rows, and biases, which experts may share."""
        for module in modules:
            weight = self._weight(module)
            weight.copy_(turn(weight.T).T)
            bias = self._bias(self.targets[module])
            if bias is not None:
                bias.copy_(turn(bias))

    def _own_head(self) -> list[Tensor]:
        """Returns the head that a model got instead of its embedding, float32, in the embedding's part."""
        name = f"{self._plan.tied_head}.weight"
        if name not in self.added:
            return []
        self.added[name] = self.added[name].float()
        return [self.added[name]]

    def _reorder_columns(self, weights: Iterable[Tensor], order: Tensor) -> None:
        for weight in weights:
            for run in weight.split(len(order), 1):
                run.copy_(run[:, order])

    def commit(self) -> list[str]:
        """Rounds changed tensors back to their dtypes and puts them in place. Returns their names."""
        self.added |= {name: self.added[name].to(dtype) for name, dtype in self._dtypes.items()}
        changed = list(self._changing)
        for name in changed:
            self._tensors[name] = self._changing.pop(name).to(self._tensors[name].dtype)
        return changed

    def spread(self, scale: Tensor, width: int) -> Tensor:
        """Returns scales of value channels [key heads x head size], repeated for query heads that read the same."""
        if len(scale) == width:
            return scale
        head = next((a.head_dim for a in self._plan.attention.values() if a.part == self.part.index), None)
        if head is None or len(scale) % head or width % len(scale):
            raise ModelError(
                f"{len(scale)} channels cannot be spread over {width} columns, because the head size is unknown",
                where=self.part.name,
                kind="E-MODEL-FAMILY",
            )
        return scale.view(-1, 1, head).expand(-1, width // len(scale), -1).reshape(-1)

    def _weight(self, module: str) -> Tensor:
        view = self.targets[module].view
        found: Tensor = view.of(self._vector(view.tensor))
        return found

    def _vector(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ModelError("the layer has no such tensor", where=name, kind="E-MODEL-FAMILY")
        if name not in self._changing:
            self._changing[name] = self._tensors[name].to(torch.float32, copy=True)
        return self._changing[name]

    def _bias(self, target: Target) -> Tensor | None:
        """Returns a module's bias [out], to be changed in place; an expert's may be among those of all experts."""
        name = target.bias if target.bias is not None else expert_bias(target)
        if name is None or name not in self._tensors:
            return None
        bias = self._vector(name)
        if target.expert is None or target.bias is not None:
            return bias
        own = bias[target.expert[1]]
        found: Tensor = own if target.view.rows is None else own[slice(*target.view.rows)]
        return found


def taken(order: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns what puts the last axis in another order."""
    return lambda x: x[..., order]
