"""Lists what blocks hand to later ones beside hidden states: entries of a mapping that all of them get (the keys and
values of Gemma 3n and 4), and further outputs."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """Stands in recorded arguments for a mapping that blocks may write to: each stream has its own."""

    number: int


def place(given: list[MutableMapping[Any, Any]], mapping: MutableMapping[Any, Any]) -> Place:
    """Returns the place of a mapping among those that a recording was given, where it is put if it is new."""
    number = next((number for number, one in enumerate(given) if one is mapping), len(given))
    if number == len(given):
        given.append(mapping)
    return Place(number)


def own(places: Sequence[MutableMapping[Any, Any]]) -> list[MutableMapping[Any, Any]]:
    """Returns copies of mappings, with the same values in them."""
    return [copy.copy(place) for place in places]


def copied(value: Any, device: torch.device | None) -> Any:
    """Returns arguments of a block for it to write into: copies of tensors, lists, tuples and mappings.

    device   of tensors without values, in place of copies; None: copies
    """
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device=device) if device else value.clone()
    if isinstance(value, MutableMapping):
        own = copy.copy(value)
        own.update({key: copied(item, device) for key, item in value.items()})
        return own
    if isinstance(value, (list, tuple)):
        items = [copied(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def written(
    given: Sequence[Mapping[Any, Any]], places: Sequence[Mapping[Any, Any]], extras: Mapping[tuple[int, int], Any]
) -> dict[str, torch.Tensor]:
    """Returns by name the tensors that blocks have written since the recording, which `fill` takes."""
    found: dict[str, torch.Tensor] = {}
    for number, (before, now) in enumerate(zip(given, places, strict=True)):
        for key, value in now.items():
            if before.get(key) is not value:
                found |= _named([number, key], value)
    for (block, position), value in extras.items():
        found |= _named([block, position, "output"], value)
    return found


def fill(
    named: Mapping[str, torch.Tensor],
    places: Sequence[MutableMapping[Any, Any]],
    extras: MutableMapping[tuple[int, int], Any],
) -> None:
    """Writes what `written` returned of another recording of the same rows."""
    tuples: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in named.items():
        place, _, index = name.rpartition("/")
        tuples.setdefault(place, {})[int(index)] = tensor
    for place, members in tuples.items():
        found = json.loads(place)
        value = members[-1] if -1 in members else tuple(members[index] for index in sorted(members))
        if len(found) == 2:
            places[found[0]][found[1]] = value
        else:
            extras[found[0], found[1]] = value


def _named(place: list[Any], value: Any) -> dict[str, torch.Tensor]:
    """Returns a tensor as number -1, and those of a tuple as they are counted."""
    members = {-1: value} if isinstance(value, torch.Tensor) else {}
    if isinstance(value, (tuple, list)) and all(isinstance(one, torch.Tensor) for one in value):
        members = dict(enumerate(value))
    return {f"{json.dumps(place)}/{index}": tensor for index, tensor in members.items()}
