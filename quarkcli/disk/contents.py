"""The tensors of each part of the output: said once, for forecast, worker, verification and report. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from quarkcli.dialects.base import TensorInfo, Writer
from quarkcli.family import HeaderLike
from quarkcli.plan.model import Part, Plan, Target, is_quantized


class Copied(NamedTuple):
    """A tensor that is written in the source's form: kept or changed, or one expert cut out of a fused tensor.

    tensor  the source tensor that holds it
    target  the expert's weight; None for the whole tensor
    """

    info: TensorInfo
    tensor: str
    target: Target | None = None


def slug(part: Part) -> str:
    """Returns the text that stands for a part in its shard's file name: `embed`, `block-00003`, `tail`, `rest`."""
    return part.kind if part.block is None else f"block-{part.block:05d}"


def part_targets(plan: Plan) -> dict[str, list[Target]]:
    """Returns the targets by the file tensor they lie in."""
    owners: dict[str, list[Target]] = {}
    for target in plan.targets.values():
        owners.setdefault(target.view.tensor, []).append(target)
    return owners


def copied(
    plan: Plan, part: Part, headers: Mapping[str, HeaderLike], owners: Mapping[str, list[Target]]
) -> Iterator[Copied]:
    """Yields the tensors of a part that are written in the source's form. `owners`: see `part_targets`."""
    dropped = plan.dropped
    for name in part.tensors:
        if name in dropped:
            continue
        if name in plan.kept:
            yield Copied(TensorInfo(name, headers[name].dtype, tuple(headers[name].shape)), name)
            continue
        for target in owners.get(name, ()):  # none: a quantized bias, which is its target's
            if target.weight is None:
                yield Copied(TensorInfo(f"{target.name}.weight", target.dtype, target.shape), name, target)


def part_infos(
    plan: Plan, dialect: Writer, part: Part, headers: Mapping[str, HeaderLike], owners: Mapping[str, list[Target]]
) -> list[TensorInfo]:
    """Returns every tensor that the part's files will hold. `owners`: see `part_targets`."""
    infos = [row.info for row in copied(plan, part, headers, owners)]
    for name in part.tensors:
        for target in owners.get(name, ()):
            if is_quantized(target):
                infos += dialect.infos(target)
    infos += [TensorInfo(added.name, added.dtype, added.shape) for added in plan.added if added.part == part.index]
    for attention in plan.attention.values():
        if attention.part == part.index:
            infos += dialect.attention_infos(attention)
    return infos + dialect.online_infos(plan, part.index)
