"""What a plan will cost before any weight is read: exact file sizes, and estimates of memory and disk. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from quarkcli.dialects.base import Dialect, TensorInfo
from quarkcli.family import HeaderLike
from quarkcli.memory import without_collection
from quarkcli.plan.model import Part, Plan, Target
from quarkcli.writer import plan_files, tensor_bytes

# What the process itself takes before any tensor: interpreter and torch, and transformers when a model runs.
RUNTIME_BYTES = {False: 250_000_000, True: 550_000_000}


@dataclass(frozen=True)
class Forecast:
    """Bytes. `output_bytes` is exact: the sum of the safetensors files; memory is an estimate."""

    source_bytes: int
    output_bytes: int
    largest_part: int
    carry_bytes: int
    memory_bytes: int
    disk_bytes: int
    effective_bits: float
    calibrated: bool
    dtypes: dict[str, int]


def slug(part: Part) -> str:
    """Part of the shard's file name: `embed`, `block-00003`, `tail`, `rest`."""
    return part.kind if part.block is None else f"block-{part.block:05d}"


def part_targets(plan: Plan) -> dict[str, list[Target]]:
    """Targets by the file tensor they lie in."""
    owners: dict[str, list[Target]] = {}
    for target in plan.targets.values():
        owners.setdefault(target.view.tensor, []).append(target)
    return owners


def part_infos(
    plan: Plan, dialect: Dialect, part: Part, headers: Mapping[str, HeaderLike], owners: Mapping[str, list[Target]]
) -> list[TensorInfo]:
    """Every tensor that the part's files will hold."""
    infos: list[TensorInfo] = []
    for name in part.tensors:
        if name in plan.kept:
            infos.append(TensorInfo(name, headers[name].dtype, tuple(headers[name].shape)))
            continue
        for target in owners.get(name, ()):  # none: a quantized bias, which is its target's
            if target.weight is not None:
                infos += dialect.infos(target)
            else:
                infos.append(TensorInfo(f"{target.name}.weight", target.dtype, target.shape))
    for attention in plan.attention.values():
        if attention.part == part.index:
            infos += dialect.attention_infos(attention)
    return infos


class _PartSize(NamedTuple):
    """Bytes of a part: of its tensors in the source, of the files it becomes, and of their tensors by dtype."""

    source: int
    files: int
    dtypes: Mapping[str, int]


def _part_sizes(plan: Plan, dialect: Dialect, headers: Mapping[str, HeaderLike]) -> list[_PartSize]:
    """Sizes of every part. Blocks whose tensors differ in the block's number alone, of as many digits, are one."""
    owners = part_targets(plan)
    kinds = {name: number for number, run in enumerate(plan.alike()) for name in (t.name for t in run)}
    specs = {module.part: tuple(module.specs.items()) for module in plan.attention.values()}
    known: dict[object, _PartSize] = {}
    sizes = []
    for part in plan.parts:
        key: object = part.index
        if part.block is not None:
            start = len(part.name)
            rows = tuple(_row(name, start, plan, headers, owners, kinds) for name in part.tensors)
            key = start, rows, specs.get(part.index)
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
    """What a block's tensor becomes, without the block's name, of `start` characters."""
    if name in plan.kept:
        return name[start:], headers[name].dtype, headers[name].shape
    own = owners.get(name, ())
    if len(own) == 1:
        return name[start:], own[0].name[start:], kinds[own[0].name]
    return name[start:], tuple((target.name[start:], kinds[target.name]) for target in own)


def _part_size(part: Part, infos: list[TensorInfo], headers: Mapping[str, HeaderLike]) -> _PartSize:
    dtypes: dict[str, int] = {}
    for info in infos:
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + tensor_bytes(info.dtype, info.shape)
    source = sum(tensor_bytes(headers[name].dtype, headers[name].shape) for name in part.tensors)
    return _PartSize(source, sum(file.size for file in plan_files(slug(part), infos)), dtypes)


@without_collection()
def forecast(
    plan: Plan,
    dialect: Dialect,
    headers: Mapping[str, HeaderLike],
    *,
    source_bytes: int,
    calibrated: bool,
    tokens: int,
    hidden: int,
    grams: bool,
) -> Forecast:
    """Sizes of a plan in one dialect. `tokens` and `hidden` size the carry; `grams`: a solver keeps second moments."""
    sizes = _part_sizes(plan, dialect, headers)
    output = sum(size.files for size in sizes)
    dtypes: dict[str, int] = {}
    for size in sizes:
        for dtype, count in size.dtypes.items():
            dtypes[dtype] = dtypes.get(dtype, 0) + count
    largest = max(size.source for size in sizes)
    carry = tokens * hidden * 2 if calibrated else 0
    widest = max((run[0].shape[1] for run in plan.quantized_alike()), default=0)
    moments = 4 * widest * widest * 4 if grams else 0
    memory = RUNTIME_BYTES[calibrated] + int(largest * (2.5 if calibrated else 1.6)) + 2 * carry + moments
    return Forecast(
        source_bytes=source_bytes,
        output_bytes=output,
        largest_part=largest,
        carry_bytes=carry,
        memory_bytes=memory,
        disk_bytes=output + 2 * carry,
        effective_bits=effective_bits(plan),
        calibrated=calibrated,
        dtypes=dict(sorted(dtypes.items())),
    )


def effective_bits(plan: Plan) -> float:
    """Stored bits per quantized weight, scales included."""
    bits = weights = 0.0
    for run in plan.quantized_alike():
        target = run[0]
        assert target.weight is not None
        bits += target.weight.bits_per_value(*target.shape) * target.numel * len(run)
        weights += target.numel * len(run)
    return bits / weights if weights else 0.0


def expert_share(plan: Plan) -> tuple[int, int]:
    """(quantized, all) parameters of routed experts."""
    experts = [target for target in plan.targets.values() if target.expert is not None]
    return sum(t.numel for t in experts if t.weight is not None), sum(t.numel for t in experts)


def as_json(forecast: Forecast) -> dict[str, Any]:
    return dict(vars(forecast))
