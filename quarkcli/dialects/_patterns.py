"""Names of many experts as few `re:` patterns, each checked to match exactly them and nothing else of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from quarkcli.plan.model import Target

_MARK = "re:"


def matches_name(name: str, patterns: Iterable[str]) -> bool:
    """True when a full name is equal or a `re:` pattern matches from the start, as compressed-tensors does it."""
    return any(
        re.match(pattern.removeprefix(_MARK), name) is not None if pattern.startswith(_MARK) else pattern == name
        for pattern in patterns
    )


def exact_patterns(targets: Iterable[Target], universe: Iterable[str]) -> list[str]:
    """Full names of `targets`; routed experts as patterns where a pattern matches exactly them in `universe`."""
    dense: list[Target] = []
    routed: list[Target] = []
    for target in targets:
        (routed if target.expert is not None else dense).append(target)
    names = [target.name for target in dense]
    if not routed:
        return names
    known = list(universe)
    for group in _alike(routed).values():
        names += _expert_patterns(group, known)
    return names


def _alike(targets: list[Target]) -> dict[tuple[str, frozenset[str]], dict[str, list[Target]]]:
    """(prefix with numbers marked, projections) -> layer prefix -> its targets."""
    layers: dict[str, list[Target]] = {}
    for target in targets:
        assert target.expert is not None
        layers.setdefault(target.expert[0], []).append(target)
    found: dict[tuple[str, frozenset[str]], dict[str, list[Target]]] = {}
    for prefix, members in layers.items():
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "#", prefix), frozenset(_projection(member) for member in members))
        found.setdefault(key, {})[prefix] = members
    return found


def _projection(target: Target) -> str:
    """`gate_proj` of `<prefix>.7.gate_proj`."""
    assert target.expert is not None
    prefix, index = target.expert
    return target.name.removeprefix(f"{prefix}.{index}.")


def _expert_patterns(layers: dict[str, list[Target]], universe: list[str]) -> list[str]:
    names = [target.name for members in layers.values() for target in members]
    wanted = set(names)
    for pattern in _candidates(layers):
        matcher = re.compile(pattern)
        if {name for name in universe if matcher.match(name)} == wanted:
            return [_MARK + pattern]
    return names


def _candidates(layers: dict[str, list[Target]]) -> Iterator[str]:
    """Patterns from short to long: any layer, these layers, and the same from the very start of the name.

    The short ones begin at the layer list, because servers put other prefixes in front of it.
    """
    prefixes = list(layers)
    projections = sorted({_projection(target) for members in layers.values() for target in members})
    tail = rf"\.\d+\.({'|'.join(map(re.escape, projections))})$"
    for short in (True, False):
        heads = [_from_layers(prefix) if short else prefix for prefix in prefixes]
        start = r"(.*\.)?" if short else ""
        for numbers in (_any_number, _these_numbers):
            yield f"{start}{numbers(heads)}{tail}"


def _from_layers(prefix: str) -> str:
    """`layers.3.mlp.experts` of `model.layers.3.mlp.experts`; the whole prefix when it has no number."""
    parts = prefix.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[max(first - 1, 0) :])


def _any_number(heads: list[str]) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in heads[0].split("."))


def _these_numbers(heads: list[str]) -> str:
    columns = zip(*(head.split(".") for head in heads), strict=True)
    return r"\.".join(_alternatives(list(dict.fromkeys(column))) for column in columns)


def _alternatives(parts: list[str]) -> str:
    return re.escape(parts[0]) if len(parts) == 1 else f"({'|'.join(map(re.escape, parts))})"
