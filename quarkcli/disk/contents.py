"""Says which tensors each part of the output has, for forecast, worker, verification and report. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from quarkcli.dialects.base import TensorInfo, Writer
from quarkcli.family import HeaderLike, WeightView
from quarkcli.plan.model import Part, Plan, QuantizedTarget, Target, is_quantized

if TYPE_CHECKING:
    from torch import Tensor


class Copied(NamedTuple):
    """A tensor that is written in the source's form: kept or changed, or one expert cut out of a fused tensor.

    tensor  the source tensor that holds it
    target  the expert's weight; None for the whole tensor
    """

    info: TensorInfo
    tensor: str
    target: Target | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns its values, from tensors of the source."""
        tensor = tensors[self.tensor]
        return tensor if self.target is None else self.target.view.of(tensor).contiguous()


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
    targets = (target for name in part.tensors for target in owners.get(name, ()))
    infos += packed_infos(dialect, filter(is_quantized, targets))
    infos += [TensorInfo(added.name, added.dtype, added.shape) for added in plan.added if added.part == part.index]
    for attention in plan.attention.values():
        if attention.part == part.index:
            infos += dialect.attention_infos(attention)
    return infos + dialect.online_infos(plan, part.index)


def packed_infos(dialect: Writer, targets: Iterable[QuantizedTarget]) -> list[TensorInfo]:
    """Returns the tensors of quantized weights; in place of pieces of a larger tensor, that tensor."""
    found: dict[str, TensorInfo] = {}
    for target in targets:
        places = dialect.places(target)
        for info in dialect.infos(target):
            place = places.get(info.name)
            if place is None:
                found[info.name] = info
            else:
                found[place.tensor] = _joined(found.get(place.tensor), info, place)
    return list(found.values())


def _joined(whole: TensorInfo | None, piece: TensorInfo, place: WeightView) -> TensorInfo:
    """Returns the tensor [experts, out, ...] that holds what `whole` holds, and one more piece."""
    rows = place.rows[1] if place.rows is not None else piece.shape[0]
    experts = max(whole.shape[0] if whole is not None else 0, (place.expert or 0) + 1)
    return TensorInfo(place.tensor, piece.dtype, (experts, rows, *piece.shape[1:]))


class Packed:
    """The packed tensors of some weights, by file name; pieces of a larger tensor are put together."""

    def __init__(self, dialect: Writer, targets: Iterable[QuantizedTarget]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._dialect = dialect
        self._shapes = {info.name: info.shape for info in packed_infos(dialect, targets)}

    def put(self, target: QuantizedTarget, made: Mapping[str, Tensor]) -> None:
        """Puts the tensors of one of the weights, as its dialect packed them, into their places."""
        import torch

        places = self._dialect.places(target)
        for name, tensor in made.items():
            place = places.get(name)
            if place is None:
                self.tensors[name] = tensor
                continue
            if place.tensor not in self.tensors:
                shape = self._shapes[place.tensor]
                self.tensors[place.tensor] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            place.of(self.tensors[place.tensor]).copy_(tensor)
