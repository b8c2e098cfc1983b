"""Counts the share of the model that a plan quantizes: of language, of towers, of the rest.

It also counts the matrices that stay as they are although nobody asked for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from quarkcli.family import PROTECTED, HeaderLike, Layout, Part, block_lists, tower
from quarkcli.plan.model import Plan

GROUPS = ("language", "vision", "rest")
LEAST = 0.5  # share of the block linears below which a plan that nobody restricted is doubtful
_NO_LINEAR = {"norm", "conv", "embedding"}


@dataclass(frozen=True)
class Coverage:
    """Numbers of parameters.

    total, quantized  by group: language (embedding, blocks, head), vision (towers, audio too), rest
    linears           of matrices in the language model's blocks, lists of blocks that the family leaves out included
    covered           of these, quantized
    explained         of these, left out by an entry, a flag or a described family's exclusion
    """

    total: Mapping[str, int]
    quantized: Mapping[str, int]
    linears: int
    covered: int
    explained: int

    def text(self) -> str:
        """Returns one line with the share of each group that there is."""
        shares = (
            f"{group} {self.quantized[group] / self.total[group]:.0%} of {self.total[group]:,}"
            for group in GROUPS
            if self.total[group]
        )
        return "; ".join(shares)

    def warning(self) -> str | None:
        """Returns a doubt that the language model was guessed right; None for a plan that gives no reason for one."""
        open_ones = self.linears - self.explained
        if not open_ones or self.covered / open_ones >= LEAST:
            return None
        return (
            f"only {self.covered / open_ones:.0%} of the weights in the decoder blocks are quantized, and no rule "
            "leaves the others out; check with 'quark plan --modules' that the model family fits"
        )

    def facts(self) -> dict[str, object]:
        """Returns the JSON form."""
        groups = {group: {"parameters": self.total[group], "quantized": self.quantized[group]} for group in GROUPS}
        linears = {"parameters": self.linears, "quantized": self.covered, "explained": self.explained}
        return {**groups, "block_linears": linears}


def coverage(plan: Plan, layout: Layout, headers: Mapping[str, HeaderLike]) -> Coverage:
    """Counts the parameters of a plan."""
    total: Counter[str] = Counter()
    quantized: Counter[str] = Counter()
    linears = covered = explained = 0
    done: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for target in plan.targets.values():
        if target.weight is not None:
            done[target.view.tensor] += target.numel
        elif not layout.inferred or target.role not in PROTECTED or _by_user(plan, target.slots["weight"].entry):
            asked[target.view.tensor] += target.numel
    left_out = _left_out(layout, headers)
    for part in layout.parts:
        for tensor in part.tensors:
            shape, role = headers[tensor].shape, layout.tensor_roles.get(tensor, "other")
            size, group = math.prod(shape), _group(tensor, role, part, left_out)
            total[group] += size
            quantized[group] += done[tensor]
            in_blocks = part.block is not None or tensor.startswith(left_out)
            if group == "language" and in_blocks and len(shape) > 1 and role not in _NO_LINEAR:
                linears += size
                covered += done[tensor]
                explained += asked[tensor]
    return Coverage(total, quantized, linears, covered, explained)


def _by_user(plan: Plan, entry: int | None) -> bool:
    """True when an entry of the user or the recipe decided, and not a default exclusion."""
    return entry is None or plan.entries[entry].user or entry < plan.exclusions_start


def _left_out(layout: Layout, headers: Mapping[str, HeaderLike]) -> tuple[str, ...]:
    """Returns starts of names in lists of blocks that the family knows nothing of and that are no tower's."""
    rest = {
        name: headers[name]
        for part in layout.parts
        if part.kind == "rest"
        for name in part.tensors
        if layout.tensor_roles.get(name) == "other"
    }
    return tuple(f"{own.path}." for own in block_lists(rest) if own.matrices > 1 and tower(own.path) is None)


def _group(tensor: str, role: str, part: Part, left_out: tuple[str, ...]) -> str:
    if role in {"vision", "audio"}:
        return "vision"
    if part.kind != "rest" or tensor.startswith(left_out):
        return "language"
    return "vision" if role == "other" and tower(tensor) else "rest"
