"""What a plan will cost before any weight is read: exact file sizes, and estimates of memory and disk. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quarkcli.dialects.base import Dialect, TensorInfo
from quarkcli.family import HeaderLike
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
    owners = part_targets(plan)
    output = 0
    dtypes: dict[str, int] = {}
    for part in plan.parts:
        infos = part_infos(plan, dialect, part, headers, owners)
        output += sum(file.size for file in plan_files(slug(part), infos))
        for info in infos:
            dtypes[info.dtype] = dtypes.get(info.dtype, 0) + tensor_bytes(info.dtype, info.shape)
    part_bytes = [sum(tensor_bytes(headers[n].dtype, headers[n].shape) for n in part.tensors) for part in plan.parts]
    largest = max(part_bytes)
    carry = tokens * hidden * 2 if calibrated else 0
    widest = max((target.shape[1] for target in plan.quantized()), default=0)
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
    for target in plan.quantized():
        assert target.weight is not None
        bits += target.weight.bits_per_value(*target.shape) * target.numel
        weights += target.numel
    return bits / weights if weights else 0.0


def expert_share(plan: Plan) -> tuple[int, int]:
    """(quantized, all) parameters of routed experts."""
    experts = [target for target in plan.targets.values() if target.expert is not None]
    return sum(t.numel for t in experts if t.weight is not None), sum(t.numel for t in experts)


def as_json(forecast: Forecast) -> dict[str, Any]:
    return dict(vars(forecast))
