"""Quantizes small weights of one shape together, as one tall matrix: the bits are those of each alone.

A torch call costs as much as rounding some ten thousand values, and a weight takes dozens of calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quarkcli.numerics import kernels, packed
from quarkcli.numerics.grid import QParams
from quarkcli.numerics.packed import Packed, Streamed
from quarkcli.numerics.packing import pack_bits
from quarkcli.numerics.quantize import Quantized, dequantize, tensor_amax
from quarkcli.numerics.ranges import known_range, needs_ends
from quarkcli.spec import TensorSpec

VALUES = 1 << 21  # of a stack: larger weights gain nothing


def at_once(shape: tuple[int, int]) -> int:
    """Returns how many weights of a shape make a stack."""
    size = shape[0] * shape[1]
    return max(1, VALUES // size) if size else 1


def takes(spec: TensorSpec, device: torch.device) -> bool:
    """True where every row has scales of its own, so that rows of several weights may stand above each other.

    A kernel has one global scale for all of its rows.
    """
    shared = spec.is_two_level and kernels.find(spec, device) is not None
    return spec.has_own_scales and not spec.searches and not shared


def has_ranges(spec: TensorSpec, device: torch.device) -> bool:
    """True where `known_ranges` finds any."""
    return takes(spec, device) and not needs_ends(spec)


def known_ranges(weights: Sequence[Tensor], spec: TensorSpec) -> list[Tensor]:
    """Returns `ranges.known_range` of weights of one shape. Its DataError does not say in which of them."""
    tall = known_range(torch.cat(list(weights)), spec)
    assert tall is not None
    return list(tall.split(len(weights[0])))


def quantize(
    weights: Sequence[Tensor], spec: TensorSpec, amax: Sequence[Tensor | None], known: Sequence[Tensor | None]
) -> list[Quantized]:
    """Returns codes and scales of weights [out, in] of one shape and dtype, for a spec that `takes` accepts.

    Arguments per weight as in `quantize.quantize`. Codes below 8 bits come packed where rows end with a byte.
    """
    rows, cols = weights[0].shape
    outer = None
    if spec.is_two_level:
        own = [tensor_amax(w) if given is None else given for w, given in zip(weights, amax, strict=True)]
        outer = _per_row(own, rows)
    ranges = [each for each in known if each is not None]
    whole = torch.cat(ranges) if len(ranges) == len(weights) else None
    tall = packed.quantize(torch.cat(list(weights)), spec, amax=outer, known=whole)
    bits = spec.format.bits
    if not isinstance(tall, Streamed) and bits < 8 and cols * bits % 8 == 0:
        tall = Streamed(Packed(pack_bits(tall.codes, bits), tall.params), spec, cols)
    parts = [tall.some(slice(start, start + rows)) for start in range(0, rows * len(weights), rows)]
    for part in parts:
        if part.params.global_scale is not None:
            part.params.global_scale = part.params.global_scale[0, 0].clone()
    return parts


def dequantized(parts: Sequence[Quantized], spec: TensorSpec) -> Tensor:
    """Returns real values of quantized matrices of one shape above each other, float32, computed together."""
    each = [part.params for part in parts]
    rows = parts[0].params.scale
    assert rows is not None
    outer = [params.global_scale for params in each if params.global_scale is not None]
    zero = [params.zero_point for params in each if params.zero_point is not None]
    whole = QParams(
        torch.cat([params.scale for params in each if params.scale is not None]),
        _per_row(outer, len(rows)) if outer else None,
        torch.cat(zero) if zero else None,
    )
    packs = [part.packed.data for part in parts if isinstance(part, Streamed)]
    if len(packs) == len(parts):
        first = parts[0]
        assert isinstance(first, Streamed)
        return dequantize(Streamed(Packed(torch.cat(packs), whole), spec, first.cols), spec)
    return dequantize(Quantized(torch.cat([part.codes for part in parts]), whole), spec)


def _per_row(values: Sequence[Tensor], rows: int) -> Tensor:
    """Returns what each of some matrices of `rows` rows has one of, for all rows: [rows in all, 1]."""
    return torch.stack([value.float() for value in values]).repeat_interleave(rows)[:, None]
