"""Divides a checkpoint into parts: embedding, decoder blocks, tail, and what text does not run. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quarkcli.errors import ModelError
from quarkcli.family.config import block_count
from quarkcli.family.lists import found_lists
from quarkcli.family.schema import FamilyModel, HeaderLike


@dataclass(frozen=True)
class Part:
    """A unit of work: `embed`, `block`, `tail` or `rest`; `block` is the block's index. `tensors` in file order."""

    index: int
    name: str
    kind: str
    block: int | None
    tensors: tuple[str, ...]


def parts_of(family: FamilyModel, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> list[Part]:
    """Returns parts that hold every tensor. Raises ModelError when a block that the config counts is not there."""
    block_of = re.compile(re.escape(family.blocks) + r"\.(\d+)\.")
    present = {int(found[1]) for name in headers if (found := block_of.match(name))}
    declared = block_count(config)
    count = declared if declared is not None else max(present, default=-1) + 1
    absent = sorted(set(range(count)) - present)
    if absent or not count:
        raise ModelError(
            f"decoder block {absent[0] if absent else 0} of {count} has no tensors",
            where=f"{family.blocks}.*",
            hint="check the family file and config.json, which do not fit this checkpoint; " + found_lists(headers),
            kind="E-MODEL-FAMILY",
        )
    members: dict[str, list[str]] = {"embed": [], "tail": [], "rest": []}
    blocks: dict[int, list[str]] = {index: [] for index in range(count)}
    for name in headers:
        found = block_of.match(name)
        if found and int(found[1]) < count:
            blocks[int(found[1])].append(name)
        elif any(name == module or name.startswith(f"{module}.") for module in family.embed):
            members["embed"].append(name)
        elif any(name == module or name.startswith(f"{module}.") for module in family.tail):
            members["tail"].append(name)
        else:
            members["rest"].append(name)
    parts = [Part(0, "embed", "embed", None, tuple(members["embed"]))]
    parts += [Part(1 + i, f"{family.blocks}.{i}", "block", i, tuple(names)) for i, names in blocks.items()]
    parts.append(Part(len(parts), "tail", "tail", None, tuple(members["tail"])))
    if members["rest"]:
        parts.append(Part(len(parts), "rest", "rest", None, tuple(members["rest"])))
    return parts
