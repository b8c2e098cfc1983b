"""Packs a part for each dialect: its quantized weights, caches and online operations.

The first dialect is the one whose weights, as they decode, later parts are calibrated with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from quarkcli.dialects.base import Writer
from quarkcli.disk.compare import same_params
from quarkcli.disk.contents import Packed
from quarkcli.job.served import decode, own_scales
from quarkcli.numerics.quantize import Quantized
from quarkcli.plan.model import Part, Plan, QuantizedTarget


class Packing:
    """The tensors of one part, by file name, in each of some dialects."""

    def __init__(self, plan: Plan, writers: Sequence[Writer], part: Part, scales: Mapping[str, Tensor]) -> None:
        self._plan, self._writers, self._part, self._scales = plan, writers, part, scales
        self._packed = [Packed(writer, plan.quantized(part.index)) for writer in writers]

    def pack(self, target: QuantizedTarget, quantized: Quantized, bias: Quantized | None) -> list[dict[str, Tensor]]:
        """Returns the tensors of a weight, and of its bias where that is quantized, in each dialect."""
        static = own_scales(target, self._scales)
        return [writer.tensors(target, quantized, static, bias) for writer in self._writers]

    def put(self, target: QuantizedTarget, made: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes what `pack` gave."""
        for packed, tensors in zip(self._packed, made, strict=True):
            packed.put(target, tensors)

    def tensors(self, kept: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Returns all tensors of the part in each dialect.

        kept    tensors in the source's form
        added   tensors of transforms
        """
        return [
            {**kept, **packed.tensors, **self._attention(writer), **added}
            | writer.online_tensors(self._plan, self._part.index)
            for writer, packed in zip(self._writers, self._packed, strict=True)
        ]

    def _attention(self, writer: Writer) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for module in self._plan.attention.values():
            keys = {kind: f"{module.name}.{kind}" for kind in module.specs}
            own = {kind: self._scales[key] for kind, key in keys.items() if key in self._scales}
            if module.part == self._part.index and own:
                out |= writer.attention_tensors(module, own)
        return out

    def apart(self) -> dict[str, int]:
        """Returns the dialects of which some weights decode to other scales than those of the first -> their number.

        They are a unit in the last place off where one stores a scale's inverse.
        """
        counts = {writer.name: 0 for writer in self._writers[1:]}
        for target in self._plan.quantized(self._part.index) if counts else ():
            first, *others = [
                decode(writer, target, packed.tensors).weight.params
                for writer, packed in zip(self._writers, self._packed, strict=True)
            ]
            for name, params in zip(counts, others, strict=True):
                counts[name] += not same_params(first, params, values=True)
        return {name: count for name, count in counts.items() if count}
