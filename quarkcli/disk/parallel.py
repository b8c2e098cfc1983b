"""Checks whether servers can split a checkpoint over several devices (tensor parallel): heads, rows, and scale groups.

Servers give each device some of the outputs of q, k, v, gate, up and fused forms of them, and some of the inputs of o
and down; heads of keys and values are repeated when there are fewer than devices. No group or tile of a scale and no
word of packed codes may be cut. Weights of other roles are whole on every device, or not judged here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from quarkcli.dialects.base import StoredView
from quarkcli.errors import CheckError
from quarkcli.family import HeaderLike, Weight, heads, kv_heads
from quarkcli.spec import PerTile

USUAL = (1, 2, 4, 8)
_BY_OUTPUT = {"q", "k", "v", "q_b", "kv_b", "gate", "up", "expert_gate", "expert_up", "shared_gate", "shared_up"}
_BY_INPUT = {"o", "down", "expert_down", "shared_down"}
_KEYS = {"k", "v"}
_LARGEST = 64
_WORD = 32


class _Split(NamedTuple):
    """A way to split a weight: so many features, in pieces of which none is cut. `repeats`: heads may be repeated."""

    name: str
    side: str
    features: int
    unit: int
    why: str
    repeats: int = 0

    def fits(self, degree: int) -> bool:
        if degree == 1:
            return True  # nothing is split, so a short last group or tile is not cut either
        if self.repeats and degree > self.repeats:
            return degree % self.repeats == 0
        return self.features % degree == 0 and self.features // degree % self.unit == 0


def check(
    degrees: Sequence[int],
    weights: Mapping[str, Weight],
    view: StoredView,
    headers: Mapping[str, HeaderLike],
    config: Mapping[str, Any],
) -> list[str]:
    """Returns the check made; without degrees, a line that says which of the usual ones fit.

    Raises CheckError for degrees that cut something, with those, up to 64, that cut nothing.
    """
    splits = _alike([*_heads(config), *_of_weights(weights, view, headers, config)])
    faults = []
    for degree in degrees:
        for split, names in splits:
            if not split.fits(degree):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                what = f"{names[0]}{more}: {split.features} {split.side} {split.why}"
                faults.append(f"tensor parallel over {degree} devices: {what}")
    if faults:
        works = [degree for degree in range(1, _LARGEST + 1) if all(split.fits(degree) for split, _ in splits)]
        faults[0] += f"; these numbers fit: {', '.join(map(str, works))}"
        raise CheckError("\n".join([faults[0], *(f"also: {fault}" for fault in faults[1:])]), kind="E-CHECK-SPLIT")
    if degrees:
        return [f"tensor parallel fits over {', '.join(map(str, degrees))} devices"]
    fit = fitting(weights, view, headers, config)
    return [f"tensor parallel fits over {', '.join(map(str, fit))} devices (tried: {', '.join(map(str, USUAL))})"]


def fitting(
    weights: Mapping[str, Weight], view: StoredView, headers: Mapping[str, HeaderLike], config: Mapping[str, Any]
) -> list[int]:
    """Returns the usual degrees that fit."""
    splits = _alike([*_heads(config), *_of_weights(weights, view, headers, config)])
    return [degree for degree in USUAL if all(split.fits(degree) for split, _ in splits)]


def _alike(splits: list[_Split]) -> list[tuple[_Split, list[str]]]:
    """Returns splits that are the same but for the name, each with all names."""
    found: dict[_Split, list[str]] = {}
    for split in splits:
        found.setdefault(split._replace(name=""), []).append(split.name)
    return list(found.items())


def _heads(config: Mapping[str, Any]) -> Iterator[_Split]:
    count, kept = heads(config) or 0, kv_heads(config) or 0
    if count > 0:
        yield _Split("config.json", "attention heads", count, 1, "cannot be divided evenly")
    if kept > 0:
        yield _Split("config.json", "key and value heads", kept, 1, "cannot be divided evenly", kept)


def _of_weights(
    weights: Mapping[str, Weight], view: StoredView, headers: Mapping[str, HeaderLike], config: Mapping[str, Any]
) -> Iterator[_Split]:
    repeats = max(0, kv_heads(config) or 0)
    for name, weight in weights.items():
        by_input = weight.role in _BY_INPUT
        if not by_input and weight.role not in _BY_OUTPUT:
            continue
        axis, side = (1, "inputs") if by_input else (0, "outputs")
        unit, why = _unit(name, weight, view, headers, axis)
        yield _Split(name, side, weight.shape[axis], unit, why, repeats if weight.role in _KEYS else 0)


def _unit(name: str, weight: Weight, view: StoredView, headers: Mapping[str, HeaderLike], axis: int) -> tuple[int, str]:
    """Returns the number of features that stay together along an axis, and the end of a sentence that says why."""
    stored = view.targets.get(name)
    if stored is None:
        return 1, "cannot be divided evenly"
    units = [(1, "")]
    for stage in stored.weight.stages:
        if isinstance(stage.granularity, PerTile):
            tile = (stage.granularity.rows, stage.granularity.cols)[axis]
            units.append((tile, f"would cut tiles of {tile}"))
        elif axis == 1 and stage.group_size:
            units.append((stage.group_size, f"would cut scale groups of {stage.group_size}"))
    packed = _packed(stored.tensors, headers, weight, axis)
    if packed > 1:
        units.append((packed, f"would cut words of {packed} codes"))
    unit = math.lcm(*(size for size, _ in units))
    return unit, max(units)[1] or "cannot be divided evenly"


def _packed(tensors: Iterable[str], headers: Mapping[str, HeaderLike], weight: Weight, axis: int) -> int:
    """Returns how many codes a stored number holds along an axis: told by the sizes of the largest tensor."""
    largest = max((headers[name] for name in tensors), key=lambda header: math.prod(header.shape), default=None)
    if largest is None or len(largest.shape) != 2:
        return 1
    features, shape = weight.shape[axis], tuple(largest.shape)
    if weight.shape[1 - axis] not in shape or (features in shape and math.prod(shape) == math.prod(weight.shape)):
        return 1
    along = shape[1 - shape.index(weight.shape[1 - axis])]
    return features // along if 0 < along < features and features % along == 0 else 1
