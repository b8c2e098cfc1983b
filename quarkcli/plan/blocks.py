"""Finds the last blocks of a model that a recipe does not reach, because it was made for a model with fewer."""

from __future__ import annotations

from collections.abc import Mapping

from quarkcli.plan.model import Plan, Target

_ALL = {"", "weight_quantizer"}  # what is left of a pattern for everything


def warn(plan: Plan) -> None:
    """Warns of blocks behind the last quantized one whose weights no entry names, but the same weights before them."""
    blocks = {part.index: part.block for part in plan.parts if part.block is not None}
    reached = {blocks[target.part] for target in plan.targets.values() if target.weight and target.part in blocks}
    last = max(reached, default=None)
    if last is None or max(blocks.values()) <= last:
        return
    within = [target for target in plan.targets.values() if target.part in blocks]
    known = {_alike(target, blocks) for target in within if target.weight}
    late = {
        blocks[target.part]
        for target in within
        if blocks[target.part] > last and _is_unnamed(plan, target) and _alike(target, blocks) in known
    }
    if late:
        first, end = min(late), max(late)
        which = f"block {first} is" if first == end else f"blocks {first} to {end} are"
        plan.warnings.append(
            f"{which} not quantized: the recipe names the same modules of earlier blocks, and none there; "
            "add entries for them, with enable: false if they shall stay"
        )


def _alike(target: Target, blocks: Mapping[int, int]) -> str:
    """Returns a name without the number of its block."""
    return target.name.replace(f".{blocks[target.part]}.", ".#.", 1)


def _is_unnamed(plan: Plan, target: Target) -> bool:
    """True where nothing spoke of a weight, or only an entry for all."""
    entry = target.slots["weight"].entry
    return entry is None or plan.entries[entry].quantizer_path.strip("*.") in _ALL
