"""Checks that weights which servers fuse have one scheme: q with k and v, gate with up, the experts of a layer.

A server keeps one matrix, and one way to read it, for all of them: it refuses two, or takes one for the other. That
holds for a member that is kept beside quantized ones, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from quarkcli.family import Weight
from quarkcli.spec import TensorSpec

# What a checkpoint is for: a server by name, `auto` for any, or `none`: nothing in particular.
Servers = str
# (weight, input); None: the weight is kept.
Scheme = tuple[TensorSpec | None, TensorSpec | None]


def matrix(weight: Weight) -> str:
    """Returns the name of what servers make of a weight and others: of its group, or of all experts of its layer."""
    if weight.expert is None:
        return weight.group
    return f"{weight.expert[0]}.{'down' if weight.role == 'expert_down' else 'gate+up'}"


def splits(schemes: Iterable[tuple[Weight, Scheme]]) -> list[dict[Scheme, list[str]]]:
    """Returns the fused groups that have more than one scheme, each as the names that have it."""
    groups: dict[str, dict[Scheme, list[str]]] = {}
    for weight, scheme in schemes:
        groups.setdefault(matrix(weight), {}).setdefault(scheme, []).append(weight.name)
    return [group for group in groups.values() if len(group) > 1]


def sentence(found: Sequence[Mapping[Scheme, Sequence[str]]]) -> str:
    """Returns one sentence for all of them: how many, and what the first one's members have."""
    many = len(found) > 1
    shown = ", but ".join(f"{_short(names)} ({_says(scheme)})" for scheme, names in found[0].items())
    return (
        f"{len(found)} group{'s' if many else ''} of weights that servers multiply together "
        f"{'have' if many else 'has'} more than one scheme; servers refuse them or read them wrong: {shown}"
        + ("; ..." if many else "")
    )


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _says(scheme: Scheme) -> str:
    weight, source = scheme
    if weight is None:
        return "kept"
    return weight.describe() + (f" with input {source.describe()}" if source is not None else "")
