"""Lists the rewrites of a block that do not change its function, as the family file gives them. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from quarkcli.family.schema import FamilyModel, ScalingModel

if TYPE_CHECKING:
    from quarkcli.family.layout import Weight


@dataclass(frozen=True)
class Pair:
    """Channels that can be scaled: what `source` writes is multiplied, the columns of `readers` are divided.

    source    a linear, or a norm when `norm` is true
    readers   the weights that read those channels; all of them, or the function changes
    """

    source: str
    norm: bool
    readers: tuple[str, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """Returns the weights that are changed."""
        return self.readers if self.norm else (self.source, *self.readers)


@dataclass(frozen=True)
class Residual:
    """The linears of a block that read and that write the residual stream, where it can be rotated as a whole."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Rewrites:
    """Holds the rewrites that one family file allows for its blocks.

    norm_offset  norms multiply by their weight plus this
    """

    family: FamilyModel | None = field(default=None, repr=False)

    @property
    def norm_offset(self) -> float:
        return self.family.norm_offset if self.family is not None else 0.0

    def pairs(self, block: str, weights: Mapping[str, Weight], vectors: Collection[str]) -> list[Pair]:
        """Returns the scaling pairs of a block.

        weights   of this block, by name
        vectors   names of the block's one-dimensional tensors, among which are its norms
        """
        found = []
        for rule in self.family.scaling if self.family is not None else ():
            found += _pairs(rule, block, weights, vectors)
        return found

    def residual(self, block: str, weights: Mapping[str, Weight]) -> Residual | None:
        """Returns the linears around the residual stream, or None where the family file does not allow rotating it."""
        rotation = self.family.rotation if self.family is not None else None
        if rotation is None:
            return None
        return Residual(_matching(rotation.reads, block, weights), _matching(rotation.writes, block, weights))


def _pairs(rule: ScalingModel, block: str, weights: Mapping[str, Weight], vectors: Collection[str]) -> list[Pair]:
    readers = _matching(rule.readers, block, weights)
    if f"{block}.{rule.source}.weight" in vectors:
        return [Pair(f"{block}.{rule.source}", True, readers)] if readers else []
    pairs = []
    for source in _matching([rule.source], block, weights):
        # An expert's rows are read by the same expert.
        own = tuple(reader for reader in readers if weights[reader].expert == weights[source].expert)
        pairs += [Pair(source, False, own)] if own else []
    return pairs


def _matching(patterns: Collection[str], block: str, weights: Mapping[str, Weight]) -> tuple[str, ...]:
    return tuple(name for pattern in patterns for name in weights if fnmatchcase(name, f"{block}.{pattern}"))


def expert_bias(weight: Weight) -> str | None:
    """Returns the tensor that holds the biases of all experts of a layer beside a fused weight.

    Its name is like `<experts>.down_proj_bias`.

    None for anything but an expert's weight.
    """
    if weight.expert is None:
        return None
    return re.sub(r"\.\d+\.([^.]+)$", r".\1_bias", weight.name)
