"""The tensors of one part as a transform sees them: by role, in float32, with the rewrites that keep the function.

A transform changes weights, norms and biases here and nowhere else, so that every changed tensor has a name in plan,
report and files. Values are rounded back to the source's dtype once, when a transform is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quarkcli.errors import ModelError
from quarkcli.family import Pair, Residual, expert_bias
from quarkcli.numerics.online import turned
from quarkcli.plan.model import Part, Plan, Target


class PartTensors:
    """Any weight, norm or bias of a part, by name.

    mine               weights that the transform was given; None: all
    tensors            the part's tensors in source form; `commit` puts changed ones in their place
    scaled             activation and expert -> factor of its channels, where pairs were scaled
    scaled_outputs     linears among them: their outputs, and attention's operands, are others now
    changed_otherwise  something was changed that statistics cannot follow
    notes              what was decided, for the report
    """

    def __init__(
        self, plan: Plan, part: Part, tensors: dict[str, Tensor], mine: frozenset[str] | None = None
    ) -> None:  # fmt: skip
        self.part = part
        self.mine = mine
        self.targets: dict[str, Target] = {t.name: t for t in plan.targets.values() if t.part == part.index}
        self.added: dict[str, Tensor] = {}
        self._plan = plan
        self._tensors = tensors
        self._changing: dict[str, Tensor] = {}
        self.scaled: dict[tuple[str, int | None], Tensor] = {}
        self.scaled_outputs = False
        self.changed_otherwise = False
        self.notes: list[dict[str, Any]] = []

    # -- what there is --------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @property
    def pairs(self) -> list[Pair]:
        """Returns the channels that can be scaled; none outside the blocks and where the family file names none."""
        if self.part.block is None:
            return []
        vectors = {name for name, tensor in self._tensors.items() if tensor.ndim == 1}
        pairs = self._plan.rewrites.pairs(self.part.name, self.targets, vectors)
        return [pair for pair in pairs if self.mine is None or self.mine.issuperset(pair.weights)]

    @property
    def residual(self) -> Residual | None:
        """Returns the readers and writers of the residual stream, where the family file says that it can be rotated."""
        return self._plan.rewrites.residual(self.part.name, self.targets) if self.part.block is not None else None

    def read(self, name: str) -> Tensor:
        """Returns a tensor as it is now, in float32; not to be written to."""
        return self._changing[name] if name in self._changing else self._tensors[name].float()

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

    def add(self, name: str, value: Tensor) -> None:
        """Adds a tensor that the source lacks; the transform has declared it (see `Changes.added`)."""
        self.added[name] = value

    def note(self, **facts: Any) -> None:
        """Notes a decision for the report."""
        self.notes.append(facts)

    def scale_input(self, modules: Iterable[str], scale: Tensor) -> None:
        """Multiplies the columns of weights by `scale`, float32 [channels], repeated over heads that share values."""
        self.changed_otherwise = True
        self._scale_input(modules, scale)

    def _scale_input(self, modules: Iterable[str], scale: Tensor) -> None:
        for module in modules:
            weight = self._weight(module)
            weight.mul_(self.spread(scale, weight.shape[1]))

    def scale_output(self, source: str, scale: Tensor) -> None:
        """Multiplies the output of a linear or norm by `scale`, float32 [channels]: rows, biases, norms with offset."""
        self.changed_otherwise = True
        self._scale_output(source, scale)

    def _scale_output(self, source: str, scale: Tensor) -> Tensor:
        """Returns the scale that a norm really has, rounded to its dtype: one factor holds for a whole channel."""
        if source in self.targets:
            self._weight(source).mul_(scale[:, None])
            self._scale_bias(self.targets[source], scale)
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
        """Moves the weights of norms before the residual stream's readers into those; the norms become 1."""
        self.changed_otherwise = True
        residual = self.residual
        reads = set(residual.reads) if residual is not None else set()
        for pair in self.pairs:
            if pair.norm and reads.intersection(pair.readers):
                offset = self._plan.rewrites.norm_offset
                norm = self._vector(f"{pair.source}.weight")
                self._scale_input(pair.readers, norm + offset)
                norm.fill_(1.0 - offset)

    def rotate(self, q: Tensor) -> None:
        """Rotates the block for hidden states x q: q orthogonal, float32 [hidden, hidden]; norms are folded before."""
        residual = self.residual
        if residual is None:
            raise ModelError("the family file does not say how its residual stream is rotated", where=self.part.name)
        self.changed_otherwise = True
        for module in residual.reads:
            weight = self._weight(module)
            weight.copy_(weight @ q)
        for module in residual.writes:
            weight = self._weight(module)
            weight.copy_(q.T @ weight)
        for name in {bias for module in residual.writes if (bias := self._bias(self.targets[module])) is not None}:
            vector = self._vector(name)
            vector.copy_(vector @ q)

    def commit(self) -> list[str]:
        """Rounds changed tensors back to their dtypes and puts them in place. Returns their names."""
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
                f"{len(scale)} channels cannot be spread over {width} columns: the head size is not known",
                where=self.part.name,
            )
        return scale.view(-1, 1, head).expand(-1, width // len(scale), -1).reshape(-1)

    def _weight(self, module: str) -> Tensor:
        view = self.targets[module].view
        found: Tensor = view.of(self._vector(view.tensor))
        return found

    def _vector(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ModelError("the part has no such tensor", where=name)
        if name not in self._changing:
            self._changing[name] = self._tensors[name].to(torch.float32, copy=True)
        return self._changing[name]

    def _bias(self, target: Target) -> str | None:
        """Returns the tensor that holds a module's bias, alone or with those of all experts."""
        if target.bias is not None:
            return target.bias
        fused = expert_bias(target)
        return fused if fused in self._tensors else None

    def _scale_bias(self, target: Target, scale: Tensor) -> None:
        name = self._bias(target)
        if name is None:
            return
        bias = self._vector(name)
        (bias if target.bias is not None or target.expert is None else bias[target.expert[1]]).mul_(scale)
