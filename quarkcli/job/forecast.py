"""Forecasts the cost of a plan from headers: exact file sizes, estimates of memory and disk. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from quarkcli.dialects.base import TensorInfo, Writer
from quarkcli.disk.contents import part_infos, part_targets, slug
from quarkcli.disk.writer import plan_files, tensor_bytes
from quarkcli.family import HeaderLike
from quarkcli.memory import without_collection
from quarkcli.plan.model import Part, Plan, Target
from quarkcli.plan.sizes import effective_bits

# What the process itself takes before any tensor: interpreter and torch, and transformers when a model runs.
RUNTIME_BYTES = {False: 290_000_000, True: 550_000_000}
# Memory per byte of the largest part, without and with a model that runs: its tensors and those of the next, what is
# made of them, and the last one's on its way to the disk.
PART_SHARE = {False: 2.0, True: 2.5}


@dataclass(frozen=True)
class Forecast:
    """Sizes in bytes. `output_bytes` is exact: the sum of the safetensors files; memory is an estimate.

    hidden_bytes  of the hidden states of all streams
    solving       what a solver needs beside the part's own tensors
    whole_bytes   what the whole model takes at once, where it writes its own calibration rows; else 0
    """

    source_bytes: int
    output_bytes: int
    largest_part: int
    hidden_bytes: int
    memory_bytes: int
    disk_bytes: int
    effective_bits: float
    calibrated: bool
    dtypes: dict[str, int]
    solving: int = 0
    whole_bytes: int = 0


class PartSize(NamedTuple):
    """Sizes of a part in bytes: its tensors in the source, its files, and their tensors by dtype."""

    source: int
    files: int
    dtypes: Mapping[str, int]


def part_sizes(plan: Plan, dialect: Writer, headers: Mapping[str, HeaderLike]) -> list[PartSize]:
    """Returns the sizes of every part.

    Blocks whose tensors differ in the block's number alone, of as many digits, are one.
    """
    return plan.once(f"sizes in {dialect.name}", lambda: _part_sizes(plan, dialect, headers))


def _part_sizes(plan: Plan, dialect: Writer, headers: Mapping[str, HeaderLike]) -> list[PartSize]:
    owners = part_targets(plan)
    kinds = {name: number for number, run in enumerate(plan.alike()) for name in (t.name for t in run)}
    specs = {module.part: tuple(module.specs.items()) for module in plan.attention.values()}
    known: dict[object, PartSize] = {}
    sizes = []
    for part in plan.parts:
        key: object = part.index
        if part.block is not None:
            start = len(part.name)
            rows = tuple(_row(name, start, plan, headers, owners, kinds) for name in part.tensors)
            key = start, rows, specs.get(part.index), tuple(dialect.online_infos(plan, part.index))
        if key not in known:
            known[key] = _part_size(part, part_infos(plan, dialect, part, headers, owners), headers)
        sizes.append(known[key])
    return sizes


def _row(
    name: str,
    start: int,
    plan: Plan,
    headers: Mapping[str, HeaderLike],
    owners: Mapping[str, list[Target]],
    kinds: Mapping[str, int],
) -> object:
    """Returns the result of a block's tensor, to be compared. It lacks the block's name, of `start` characters."""
    if name in plan.dropped:
        return name[start:], None
    if name in plan.kept:
        return name[start:], headers[name].dtype, headers[name].shape
    own = owners.get(name, ())
    if len(own) == 1:
        return name[start:], own[0].name[start:], kinds[own[0].name]
    return name[start:], tuple((target.name[start:], kinds[target.name]) for target in own)


def _part_size(part: Part, infos: list[TensorInfo], headers: Mapping[str, HeaderLike]) -> PartSize:
    dtypes: dict[str, int] = {}
    for info in infos:
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + tensor_bytes(info.dtype, info.shape)
    source = sum(tensor_bytes(headers[name].dtype, headers[name].shape) for name in part.tensors)
    return PartSize(source, sum(file.size for file in plan_files(slug(part), infos)), dtypes)


def device_floor(size: Forecast) -> int:
    """Returns the bytes of a device below which a block cannot be worked on, however small a forward is."""
    return int(size.largest_part * (2 if size.calibrated else 1.5)) + size.solving


@without_collection()
def forecast(
    plan: Plan,
    dialect: Writer,
    headers: Mapping[str, HeaderLike],
    *,
    source_bytes: int,
    calibrated: bool,
    tokens: int,
    hidden: int,
    solving: int,
) -> Forecast:
    """Returns the sizes of a plan in one dialect.

    tokens   of all streams together; each has a hidden state of `hidden` 16-bit values
    solving  bytes that a solver needs beside the part's own tensors
    """
    sizes = part_sizes(plan, dialect, headers)
    output = sum(size.files for size in sizes)
    dtypes: dict[str, int] = {}
    for size in sizes:
        for dtype, count in size.dtypes.items():
            dtypes[dtype] = dtypes.get(dtype, 0) + count
    largest = max(size.source for size in sizes)
    states = tokens * hidden * 2 if calibrated else 0
    memory = RUNTIME_BYTES[calibrated] + int(largest * PART_SHARE[calibrated]) + 2 * states + solving
    return Forecast(
        source_bytes=source_bytes,
        output_bytes=output,
        largest_part=largest,
        hidden_bytes=states,
        memory_bytes=memory,
        disk_bytes=output + 2 * states,
        effective_bits=effective_bits(plan),
        calibrated=calibrated,
        dtypes=dict(sorted(dtypes.items())),
        solving=solving,
    )
