"""Checks that the files hold the model that config.json and the family describe.

It needs names and shapes alone. Torch-free.

Blocks are compared with each other, experts with the experts of their layer, widths and counts with config.json.
Where config.json does not tell a width, blocks are compared only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quarkcli.errors import ModelError
from quarkcli.family.config import expert_count, text_config, zero_experts
from quarkcli.family.facts import Fact, explained, facts
from quarkcli.family.layout import Layout, Part
from quarkcli.family.leftovers import NO_ROLES, check_leftovers
from quarkcli.family.schema import FamilyModel, HeaderLike
from quarkcli.family.widths import misfits

Shape = tuple[int, ...]
_SHOWN = 6
_EXPERTS = ".experts."
_DTYPE = re.compile(r"auto|b?float16|float32|float64|half|float|double|float[48]_e\w+|u?int(8|16|32|64)")
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
# Keys of config.json that count extra prediction layers, and what such layers have that others have not.
_PREDICTS = re.compile(r"nextn|mtp")
_OF_PREDICTION = re.compile(r"(^|\.)(eh_proj|[eh]norm|shared_head|embed_tokens|fc|\w*mtp\w*)(\.|$)")


def check(family: FamilyModel, layout: Layout, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> None:
    """Raises ModelError that names tensors which are missing, empty, of a wrong shape, or of no model at all."""
    check_leftovers(headers)
    _check_dtype(config)
    _check_sizes(config)
    faults: dict[str, str] = {}
    for text in problems(family, layout, config, headers):
        faults.setdefault(text.partition(" ")[0], text)  # one for each tensor
    if faults:
        shown = "; ".join(list(faults.values())[:_SHOWN]) + ("; ..." if len(faults) > _SHOWN else "")
        raise ModelError(
            f"{len(faults)} tensor{'s do' if len(faults) > 1 else ' does'} not fit config.json or the other blocks: "
            f"{shown}",
            hint="compare the files with the original: they are damaged or incomplete, or config.json is of "
            "another model",
            kind="E-MODEL-MISFIT",
        )


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Raises ModelError for a size that is no whole number: no server reads it."""
    text = text_config(config)
    for key in _SIZES:
        value = text.get(key)
        if isinstance(value, str) or (isinstance(value, float) and not value.is_integer()):
            raise ModelError(
                f"{key} in config.json is {str(value)[:40]!r}, not a whole number", where="config.json",
                hint="correct it, or take the config.json of the original", kind="E-MODEL-MISFIT",
            )  # fmt: skip


def _check_dtype(config: Mapping[str, Any]) -> None:
    """Raises ModelError for a dtype that is none: the model's class could not be built."""
    for own in (config, text_config(config)):
        for key in ("dtype", "torch_dtype"):
            value = own.get(key)
            name = str(value).removeprefix("torch.")
            if isinstance(value, str) and not _DTYPE.fullmatch(name):
                raise ModelError(
                    f"{key} in config.json is {str(value)[:40]!r}, which is no dtype", where="config.json",
                    hint="write bfloat16, float16 or float32", kind="E-MODEL-DTYPE",
                )  # fmt: skip


def problems(
    family: FamilyModel, layout: Layout, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]
) -> Iterator[str]:
    """Yields one text per problem. Each begins with the tensor's name."""
    parts = [part for part in layout.parts if part.kind == "block"]
    blocks = [_block(part, headers) for part in parts]
    known = facts(text_config(config), len(parts))
    yield from _holes(blocks, known, layout)
    for block in blocks:
        yield from _experts(block, expert_count(config), zero_experts(config))
    wrong = list(misfits(family, layout, config, headers))
    yield from wrong
    yield from _shapes(blocks, known, {text.partition(" ")[0] for text in wrong})
    yield from _surplus(layout, blocks, config)


@dataclass
class _Block:
    """Names and shapes below one block; those of numbered experts are one entry (`mlp.experts.*.up_proj.weight`).

    experts   entry -> expert's number -> shape
    """

    name: str
    shapes: dict[str, Shape] = field(default_factory=dict)
    experts: dict[str, dict[int, Shape]] = field(default_factory=dict)

    def tensor(self, entry: str, expert: int = 0) -> str:
        """Returns the full name of the tensor that an entry stands for; of several experts that of one."""
        return f"{self.name}.{entry.replace('*', str(expert), 1)}"


def _block(part: Part, headers: Mapping[str, HeaderLike]) -> _Block:
    block, start = _Block(part.name), len(part.name) + 1
    for tensor in part.tensors:
        name, shape = tensor[start:], tuple(headers[tensor].shape)
        path, found, rest = name.partition(_EXPERTS)
        number, _, leaf = rest.partition(".")
        if found and leaf and number.isdecimal():
            block.experts.setdefault(f"{path}{_EXPERTS}*.{leaf}", {})[int(number)] = shape
        else:
            block.shapes[name] = shape
    for entry, shapes in block.experts.items():
        block.shapes[entry] = Counter(shapes.values()).most_common(1)[0][0]
    return block


def _experts(block: _Block, said: int | None, zero: int) -> Iterator[str]:
    """Yields experts that a layer lacks or has too many of, and those of another shape than most.

    zero   behind the others there may be so many that compute nothing; files may have a part of their weights
    """
    paths: dict[str, set[int]] = {}
    for entry, shapes in block.experts.items():
        paths.setdefault(entry.partition("*")[0], set()).update(shapes)
    for entry, shapes in block.experts.items():
        path = entry.partition("*")[0]
        wanted = set(range(said if said is not None else max(paths[path]) + 1))
        for number in sorted(wanted - set(shapes)):
            yield f"{block.tensor(entry, number)} is missing"
        for number in sorted(set(shapes) - wanted):
            if said is not None and number < said + zero:
                continue
            yield f"{block.tensor(entry, number)} is one too many: config.json has {said} experts"
        usual = block.shapes[entry]
        for number, shape in shapes.items():
            if shape != usual:
                name = block.tensor(entry, number)
                yield f"{name} is {list(shape)}, but those of the other experts are {list(usual)}"


def _holes(blocks: list[_Block], known: list[Fact], layout: Layout) -> Iterator[str]:
    """Yields modules, and tensors of a module, that a block lacks and similar blocks have."""
    names = [_units(block.shapes) for block in blocks]
    children = {index: frozenset(units) for index, units in enumerate(names)}
    for index, unit, holder in _lacking(children, known, lambda i, unit: _has_role(layout, blocks[i], names[i][unit])):
        for leaf in sorted(names[holder][unit]):
            yield f"{blocks[index].name}.{leaf} is missing"
    for unit in dict.fromkeys(unit for units in names for unit in units):
        leaves = {index: frozenset(units[unit]) for index, units in enumerate(names) if unit in units}
        for index, leaf, _ in _lacking(leaves, known, lambda i, leaf: _has_role(layout, blocks[i], [leaf])):
            yield f"{blocks[index].name}.{leaf} is missing"


def _units(shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """Returns names by their first step."""
    units: dict[str, list[str]] = {}
    for name in shapes:
        units.setdefault(name.partition(".")[0], []).append(name)
    return units


def _has_role(layout: Layout, block: _Block, leaves: list[str] | set[str]) -> bool:
    """True when the family knows what one of these is."""
    names = (block.tensor(leaf) for leaf in leaves)
    return not layout.inferred and any(layout.tensor_roles.get(name, "parameter") not in NO_ROLES for name in names)


def _lacking(sets: Mapping[int, frozenset[str]], known: list[Fact], has_role: Any) -> Iterator[tuple[int, str, int]]:
    """Yields (block, name, a block that has it) for names that most blocks with all of its other names have.

    Blocks that each have something the other lacks are of different kinds. As many with as without it is a hole only
    where the family knows the name.
    """
    kinds: dict[frozenset[str], list[int]] = {}
    for index, own in sets.items():
        kinds.setdefault(own, []).append(index)
    for own, lackers in kinds.items():
        larger = [kind for kind in kinds if own < kind]
        if not larger:
            continue
        usual = max(reversed(larger), key=lambda kind: len(kinds[kind]))
        having = [index for kind in larger for index in kinds[kind]]
        holder = kinds[usual][0]
        for name in sorted(usual - own):
            if explained(known, name, lackers, having):
                continue
            if len(having) > len(lackers) or (len(having) == len(lackers) and has_role(holder, name)):
                yield from ((index, name, holder) for index in lackers)


def _shapes(blocks: list[_Block], known: list[Fact], wrong: set[str]) -> Iterator[str]:
    """Yields tensors whose shape differs from those of the same name in most other blocks.

    wrong   tensors that do not fit config.json: most blocks may have the wrong shape
    """
    seen: dict[str, dict[Shape, list[int]]] = {}
    for index, block in enumerate(blocks):
        for name, shape in block.shapes.items():
            seen.setdefault(name, {}).setdefault(shape, []).append(index)
    for name, shapes in seen.items():
        if len(shapes) < 2 or any(f"{block.name}.{name}" in wrong for block in blocks):
            continue
        usual = max(shapes, key=lambda shape: len(shapes[shape]))
        for shape, indices in shapes.items():
            alike = shape != usual and _is_alike(blocks[indices[0]], blocks[shapes[usual][0]], name)
            if shape != usual and not explained(known, name, indices, shapes[usual], alike=alike):
                for index in indices:
                    yield (
                        f"{blocks[index].name}.{name} is {list(shape)}, but that of "
                        f"{blocks[shapes[usual][0]].name} is {list(usual)}"
                    )


def _is_alike(block: _Block, other: _Block, name: str) -> bool:
    """True when several tensors of the module of `name` have other numbers of rows there, all in one proportion."""
    unit = name.partition(".")[0] + "."
    pairs = [(shape, other.shapes.get(leaf, shape)) for leaf, shape in block.shapes.items() if leaf.startswith(unit)]
    changed = [(one, two) for one, two in pairs if one != two]
    rows = [(one[0], two[0]) for one, two in changed if one[1:] == two[1:]]
    return len(rows) == len(changed) > 1 and all(one * rows[0][1] == two * rows[0][0] for one, two in rows)


def _surplus(layout: Layout, blocks: list[_Block], config: Mapping[str, Any]) -> Iterator[str]:
    """Yields blocks beyond the number that config.json gives, unless they predict further tokens."""
    stem = blocks[0].name.rpartition(".")[0] + "."
    rest: dict[str, list[str]] = {}
    for part in layout.parts:
        for tensor in part.tensors if part.kind == "rest" else ():
            number, _, leaf = tensor.removeprefix(stem).partition(".")
            if tensor.startswith(stem) and number.isdecimal():
                rest.setdefault(number, []).append(leaf)
    said = sum(value for key, value in text_config(config).items() if _PREDICTS.search(key) and type(value) is int)
    if len(rest) > said:
        for number, leaves in rest.items():
            if not any(_OF_PREDICTION.search(leaf) for leaf in leaves):
                yield f"{stem}{number} is one block too many: config.json has {len(blocks)}"
