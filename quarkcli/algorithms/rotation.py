"""Rotates the residual stream by Hadamard matrices, offline: that spreads an outlier over all channels.

R1 turns the residual stream: embedding, readers, writers, head; norms are folded into their readers before. R2 turns
the values of attention inside their heads. Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quarkcli.algorithms._stream import by_part, check_residual, copies, held_by, streams
from quarkcli.algorithms.base import Transform
from quarkcli.errors import ConfigError
from quarkcli.family import TIED, Values
from quarkcli.plan.model import Added, Changes, Part, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.algorithms.tensors import PartTensors
    from quarkcli.forward.statistics import Statistics

AUTO = "auto"
LEAST = 8  # channels: a smaller block would spread nothing
_STREAM = "the residual stream of model family '{}' cannot be rotated"


class Rotation(Transform):
    """Parameters.

    r1      the residual stream
    r2      the values of attention inside their heads; auto: where the family file says that they can be
    block   channels of the residual stream that are rotated together; null: all, or the largest power of two that
            divides their number where there is no Hadamard matrix of that size
    random  with signs drawn from the seed; false: the plain Hadamard matrix
    """

    name = "rotation"
    parameters: ClassVar[Mapping[str, Any]] = {"r1": True, "r2": AUTO, "block": None, "random": True}

    def __init__(self, r1: bool, r2: bool | Literal["auto"], block: int | None, random: bool) -> None:
        for key, value in (("r1", r1), ("random", random)):
            if not isinstance(value, bool):
                raise ConfigError(f"rotation: {key} is true or false, not {value!r}", kind="E-ALGORITHM-PARAMETER")
        if not isinstance(r2, bool) and r2 != AUTO:
            raise ConfigError(f"rotation: r2 is true, false or auto, not {r2!r}", kind="E-ALGORITHM-PARAMETER")
        if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < LEAST):
            raise ConfigError(
                f"rotation: block is a number of channels from {LEAST} on, or null, not {block!r}",
                kind="E-ALGORITHM-PARAMETER",
            )
        if not r1 and r2 is False:
            raise ConfigError(
                "rotation has nothing to do", hint="write r1: true, r2: true, or both", kind="E-ALGORITHM-IDLE"
            )
        self.r1, self.r2, self.block, self.random = r1, r2, block, random

    # -- the plan -------------------------------------------------------------------------------------------------

    def check(self, plan: Plan) -> None:
        if self.block is not None and not self.r1:
            raise ConfigError(
                "rotation: block has no effect without r1: values are rotated in whole heads",
                kind="E-ALGORITHM-PARAMETER",
            )
        if self.r1:
            if self.block is not None:
                _check_groups(plan, self.block)
            check_residual(plan)
            _check_rotatable(plan)
            assert plan.rewrites.width is not None
            size_of(plan.rewrites.width, self.block)
        values = list(self._values(plan))
        for _, found in values:
            size_of(found.head, None)
        if not values and (self.r2 is True or not self.r1):
            raise ConfigError(
                f"r2: the values of attention cannot be rotated in model family '{plan.family}'{_why_no_values(plan)}",
                hint="write r2: false, or name them with 'heads' in the family file",
                kind="E-ALGORITHM-FAMILY",
            )

    def memory(self, plan: Plan) -> int:
        return copies(plan, self.changes(plan))

    def changes(self, plan: Plan) -> Changes:
        modules = {name for _, values in self._values(plan) for name in (values.writer, values.reader)}
        tensors: set[str] = set()
        for _, residual in streams(plan) if self.r1 else ():
            modules |= {*residual.columns, *residual.rows}
            tensors |= set(residual.vectors)
        names = frozenset(tensors | held_by(plan, modules))
        if not self.r1 or plan.tied_head is None:
            return Changes(names)
        embedding = plan.targets[plan.rewrites.tied_embedding(plan.targets)]
        head = Added(f"{plan.tied_head}.weight", embedding.dtype, plan.rewrites.tied_shape(embedding), embedding.part)
        return Changes(names, (head,), config={TIED: False})

    def _values(self, plan: Plan) -> Iterator[tuple[Part, Values]]:
        """Yields the values of attention that are to be rotated."""
        heads = plan.rewrites.heads
        if self.r2 is False or heads is None or heads.no_rotation is not None:
            return
        for part, weights in by_part(plan):
            values = plan.rewrites.values(part.name, weights) if part.block is not None else None
            if values is not None:
                yield part, values

    # -- the work -------------------------------------------------------------------------------------------------

    def prepare(self, plan: Plan, seed: int, prepass: Mapping[int, Statistics]) -> Any:
        """Returns the seed of the signs, and whether values are turned."""
        return {"seed": seed, "values": any(self._values(plan))}

    def before(self, part: PartTensors, state: Any) -> None:
        if self.r1:
            self._turn_stream(part, state["seed"])
        values = part.values if state["values"] else None
        if part.part.block is not None:
            part.note(r1=self.r1, r2=values is not None)
        if values is not None:
            shape = (values.groups, values.head)
            part.turn_values(values, self._turn(shape, None, state["seed"], part.part.index))

    def _turn_stream(self, part: PartTensors, seed: int) -> None:
        turn = self._turn((part.width,), self.block, seed, -1)
        part.untie()
        part.fold_norms()
        part.rotate(turn)

    def _turn(self, shape: tuple[int, ...], block: int | None, seed: int, index: int) -> Callable[[Tensor], Tensor]:
        """Returns what multiplies the last axis by diag(signs) H / sqrt(n), with signs of the given shape.

        index   of the part, -1 for the residual stream: each has signs of its own
        """
        import torch

        from quarkcli.numerics.hadamard import turned

        size = size_of(shape[-1], block)
        signs = torch.ones(shape)
        if self.random:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + index + 1) % (1 << 63))
            signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0

        def turn(x: Tensor) -> Tensor:
            return turned(x * signs.to(x), size)

        return turn


def size_of(width: int, block: int | None) -> int:
    """Returns the channels that are rotated together, of `width`.

    Raises ConfigError where there is no Hadamard matrix for them.
    """
    from quarkcli.numerics.hadamard import base, largest_block

    if block is None:
        size = width if base(width) is not None else largest_block(width)
        if size < LEAST:
            raise ConfigError(
                f"rotation: no Hadamard matrix of size {width} is known, nor of a block that divides it",
                hint="use permutation, or write r1: false or r2: false",
                kind="E-ALGORITHM-FORMAT",
            )
        return size
    if width % block or base(block) is None:
        why = f"does not divide {width} channels" if width % block else "is not the size of a known Hadamard matrix"
        raise ConfigError(
            f"rotation: a block of {block} {why}",
            hint=f"use a power of two up to {largest_block(width)}",
            kind="E-ALGORITHM-FORMAT",
        )
    return block


def _check_groups(plan: Plan, block: int) -> None:
    """Refuses blocks inside the groups of floats under float scales, where a rotation makes outliers worse."""
    for target in plan.quantized():
        for spec in (target.weight, target.input):
            if spec is None or spec.scale is None or spec.scale.dtype == "e8m0" or spec.format.kind != "float":
                continue
            if any(block <= size for size in spec.group_sizes):
                raise ConfigError(
                    f"rotation: a block of {block} inside the groups of {spec.describe()} costs accuracy: an "
                    "outlier harms its group either way",
                    where=target.name,
                    hint="write block: null, or use smoothquant or permutation",
                    kind="E-ALGORITHM-FORMAT",
                )


def _check_rotatable(plan: Plan) -> None:
    """Raises ConfigError where something on the residual stream does not go with a rotation."""
    family = plan.rewrites.family
    assert family is not None and family.residual is not None
    refused = _STREAM.format(plan.family)
    if family.residual.no_rotation is not None:
        raise ConfigError(
            f"{refused}: {family.residual.no_rotation}",
            hint="use permutation, or write r1: false",
            kind="E-ALGORITHM-FAMILY",
        )
    for part, weights in by_part(plan):
        residual = plan.rewrites.residual(part, weights)
        folds = set(plan.rewrites.folds(part, weights))
        if part.kind == "tail" and plan.tied_head is not None:
            folds |= {name for name in residual.vectors if name.endswith(".weight")}
        left = next((name for name in residual.vectors if name not in folds), None)
        if left is not None:
            raise ConfigError(
                f"{refused}: no linear layer is known that could take over this norm or vector",
                where=left,
                hint="use permutation, write r1: false, or name the readers of the norm with 'scaling' in the "
                "family file",
                kind="E-ALGORITHM-FAMILY",
            )


def _why_no_values(plan: Plan) -> str:
    heads = plan.rewrites.heads
    return f": {heads.no_rotation}" if heads is not None and heads.no_rotation is not None else ""


ALGORITHM = Rotation
