"""Checks the scales of a written checkpoint: present, finite, positive, of a plausible size, equal where servers fuse.

Scales are told by the names of their tensors, which every dialect gives them, and read without torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from quarkcli.dialects.base import Reader, StoredTarget
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.values import Values, has_floats, is_finite, values
from quarkcli.errors import CheckError, some
from quarkcli.events import Listener, Message, silent
from quarkcli.family import Weight
from quarkcli.plan.fused import matrix

# What unequal scales of one level cost where servers fuse.
_COST = "servers keep all of them, or round all codes again with the largest, which costs some accuracy"
# Slots by the words that names of their scales begin with; all others are the weight's.
_SLOTS = {"input": "input", "activation": "input", "output": "output", "bias": "bias"}
# The largest usual scale over the scales of blocks: weights reach 2,688 times as far. The inverse of a real one is far
# above it. Whoever writes inverses by mistake does so everywhere; a few larger ones are weights with an outlier.
_LARGEST = {"weight": 4.0, "input": 40.0}


@dataclass
class _Found:
    """The faults, and the per-tensor scales by the groups that share them.

    groups, inputs  group -> member -> its scales of the whole tensor
    layers          layer of experts -> scales of their inputs
    large           slot -> scales over the scales of blocks that are larger than usual; `counted`: how many there are
    """

    bad: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    inputs: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    layers: dict[str, set[tuple[float, ...]]] = field(default_factory=dict)
    large: dict[str, list[str]] = field(default_factory=dict)
    counted: Counter[str] = field(default_factory=Counter)


def check(
    checkpoint: Checkpoint,
    weights: Mapping[str, Weight],
    group_of: Mapping[str, str],
    tell: Listener = silent,
    served: bool = True,
) -> list[str]:
    """Checks every scale. Returns the checks made; raises CheckError.

    Scales of weight-only integers may be negative. Scales of one level that differ within what servers fuse are a
    warning: servers keep one per member, or take the largest and round the codes of the others again.

    weights   every weight by its module's name
    group_of  weight -> the group that shares its per-tensor scales
    served    False: no server is to load it, so that scales over block scales may differ as well
    """
    found, view = _Found(), checkpoint.view
    numbers = {name: list(_numbers(checkpoint, stored)) for name, stored in view.targets.items()}
    caches = [tensor for attention in view.attention.values() for tensor in attention.scales.values()]
    known = values(checkpoint.source, chain(*numbers.values(), caches))
    for name, stored in view.targets.items():
        own = {tensor: known[tensor] for tensor in numbers[name]}
        found.bad += _faults(stored, own)
        found.bad += [f"{name} (no {kind} scale)" for kind in _absent(stored, own)]
        assert checkpoint.reader is not None
        _look_at_size(found, stored, own, checkpoint.reader)
        static = _of_tensor(own, "input")
        if static and name in weights and weights[name].expert is not None:
            found.layers.setdefault(matrix(weights[name]), set()).add(static)
        if stored.weight.has_tensor_scale:
            found.groups.setdefault(group_of.get(name, name), {})[name] = _of_tensor(own, "weight")
        if stored.weight.has_tensor_scale or static:
            group = weights[name].group if name in weights else name
            found.inputs.setdefault(group, {})[name] = static
    found.bad += [f"{tensor} (absent)" for tensor in view.absent]
    found.bad += [f"{tensor} ({fault})" for tensor in caches if (fault := known[tensor].fault())]
    for slot, large in found.large.items():
        if 2 * len(large) > max(2, found.counted[slot]):
            found.bad += large
        else:
            tell(Message(f"{len(large)} scales are larger than usual: {some(large)}", "warning"))
    if found.bad:
        what = "modules have a scale that is zero, negative, infinite, NaN or missing"
        raise CheckError(f"{len(found.bad)} {what}: {some(found.bad)}", kind="E-CHECK-SCALES")
    return _compared(checkpoint, found, tell, served)


def codes(checkpoint: Checkpoint, everything: bool | None, limit: int) -> list[str]:
    """Returns the check made of codes that are floats, none where there are no such codes.

    Raises CheckError for NaN and infinity among them.

    everything   read them all; None: when they are `limit` bytes at most
    """
    headers = checkpoint.source.headers
    names = list(dict.fromkeys(tensor for stored in checkpoint.view.targets.values() for tensor in stored.tensors))
    names = [name for name in names if not is_scale(name) and has_floats(headers[name])]
    size = sum(headers[name].nbytes for name in names)
    if everything is False or (everything is None and size > limit):
        return (
            [f"codes of {len(names)} weights were not read ({size / 1e9:.0f} GB); --hashes reads them"] if names else []
        )
    bad = [name for name in names if not is_finite(checkpoint.source, name)]
    if bad:
        raise CheckError(f"{len(bad)} weights have codes that are NaN or infinite: {some(bad)}", kind="E-CHECK-SCALES")
    return [f"the codes of {len(names)} weights are floats and all finite"] if names else []


def _compared(checkpoint: Checkpoint, found: _Found, tell: Listener, served: bool) -> list[str]:
    """Compares the scales within groups. Returns the checks made; raises CheckError."""
    targets = checkpoint.view.targets
    both = (*found.groups.items(), *found.inputs.items())
    unequal = {group: list(members) for group, members in both if len(set(members.values())) > 1}
    two_level = sorted(
        g for g, members in unequal.items() if any(targets[name].weight.has_global_scale for name in members)
    )
    if two_level and served:
        raise CheckError(
            f"{len(two_level)} scale groups do not share their per-tensor scales: {some(two_level)}",
            kind="E-CHECK-SCALES",
        )
    if unequal:
        what = f"{len(unequal)} scale groups do not share their per-tensor scales"
        tell(Message(f"{what}: {_COST} ({some(sorted(unequal))})", "warning"))
    own = sorted(layer for layer, scales in found.layers.items() if len(scales) > 1)
    if own:
        what = f"the experts of {len(own)} layers have different input scales"
        tell(Message(f"{what}; servers use the largest for all experts of a layer ({some(own)})", "warning"))
    caches = len(checkpoint.view.attention)
    shared = sum(len(members) > 1 and name not in unequal for name, members in found.groups.items())
    attention = f" and {caches} attentions" if caches else ""
    checks = [f"scales of {len(targets)} weights{attention} are finite and positive"]
    return checks + ([f"{shared} scale groups share their per-tensor scales"] if shared else [])


def _numbers(checkpoint: Checkpoint, stored: StoredTarget) -> Iterator[str]:
    """Yields the tensors of a weight that are scales, or other numbers beside its codes."""
    for tensor in stored.tensors:
        header = checkpoint.source.headers[tensor]
        of_byte = is_scale(tensor) and header.dtype == "U8"
        if of_byte or (has_floats(header) and (is_scale(tensor) or _leaf(tensor) not in ("weight", "bias"))):
            yield tensor


def is_scale(tensor: str) -> bool:
    """True for the name of a scale: every dialect's has the word in its last step."""
    return "scale" in _leaf(tensor)


def _leaf(tensor: str) -> str:
    return tensor.rpartition(".")[2]


def _slot(tensor: str) -> str:
    return _SLOTS.get(_leaf(tensor).partition("_")[0], "weight")


def _faults(stored: StoredTarget, own: Mapping[str, Values]) -> Iterator[str]:
    from quarkcli.numerics.signs import may_be_negative

    for tensor, summary in own.items():
        if not is_scale(tensor):
            if summary.nonfinite:
                yield f"{tensor} (NaN or infinite)"
            continue
        signed = _slot(tensor) == "weight" and stored.input is None and may_be_negative(stored.weight)
        fault = summary.fault(signed)
        if fault is not None:
            yield f"{tensor} ({fault})"


def _absent(stored: StoredTarget, own: Mapping[str, Values]) -> Iterator[str]:
    """Yields kinds of activations whose static scale is not in the files."""
    there = {_slot(tensor) for tensor in own}
    for kind, spec in (("input", stored.input), ("output", stored.output)):
        if spec is not None and spec.needs_amax and kind not in there:
            yield kind


def _look_at_size(found: _Found, stored: StoredTarget, own: Mapping[str, Values], reader: Reader) -> None:
    """Notes scales over the scales of blocks, and those that make values of an unusual size, as inverted ones do."""
    for tensor, summary in own.items():
        slot = _slot(tensor)
        spec = {"weight": stored.weight, "input": stored.input}.get(slot)
        number = summary.only
        if spec is None or not spec.has_global_scale or not number or summary.fault() or not is_scale(tensor):
            continue
        found.counted[slot] += 1
        multiplier = 1 / number if _leaf(tensor) in reader.divisors else number
        if multiplier > _LARGEST[slot]:
            text = f"{tensor} (it makes values of {multiplier * 2688:,.0f}: is it the inverse?)"
            found.large.setdefault(slot, []).append(text)


def _of_tensor(own: Mapping[str, Values], slot: str) -> tuple[float, ...]:
    """Returns the scales of the whole tensor that a slot has, in the order of their names."""
    mine = (name for name in sorted(own) if _slot(name) == slot and is_scale(name))
    return tuple(number for name in mine if (number := own[name].only) is not None)
