"""Finds weights that a two-level format holds exactly: codes times powers of two, as in checkpoints of MXFP4.

With a power of two as global scale, block scales reach from 2^-9 to 2^8 of it, all powers of two. A tensor whose blocks
lie within these 18 keeps every value. The usual global scale, amax / 2688, keeps those of blocks alone whose largest
code is the largest of the format.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quarkcli.numerics.chunks import as_matrix, row_chunks
from quarkcli.numerics.grid import QParams
from quarkcli.numerics.quantize import Quantized, dequantize, encode
from quarkcli.spec import PerGroup, TensorSpec

LOWEST, HIGHEST = -9, 8  # exponents of the powers of two that an e4m3 block scale has
_GLOBAL = range(-126, 117)  # exponents of a global scale with which all values are finite


def may_hold(spec: TensorSpec) -> bool:
    """True for a format of few mantissa bits with e4m3 scales per group under a float32 one."""
    scale = spec.scale
    return (
        spec.then is None
        and scale is not None
        and scale.dtype == "e4m3"
        and scale.global_scale is not None
        and scale.global_scale.minimum is None
        and isinstance(spec.granularity, PerGroup)
        and spec.format.kind == "float"
        and spec.format.bits == 4
    )


def exponent(weight: Tensor, spec: TensorSpec) -> int | None:
    """Returns the largest exponent of the powers of two by which blocks are codes; None when one block is none.

    Most weights are told by their first row.
    """
    assert isinstance(spec.granularity, PerGroup)
    matrix, size = as_matrix(weight), spec.granularity.size
    found: list[int] = []
    if not len(matrix) or matrix.shape[1] % size or not _has_few_bits(matrix[:1], spec):
        return None
    for part in row_chunks(matrix):
        values = matrix[part]
        if not _has_few_bits(values, spec):
            return None
        blocks = values.float().view(len(values), -1, size)
        powers = _powers(blocks.abs().amax(-1), spec)
        units = blocks / torch.exp2(powers)[..., None].float()
        if bool((units * 2**spec.format.mantissa != (units * 2**spec.format.mantissa).round()).any()):
            return None
        present = powers[blocks.any(-1)]
        found += [int(present.max())] if present.numel() else []
    return max(found, default=None)


def quantize(weight: Tensor, spec: TensorSpec, largest: int) -> tuple[Quantized, int]:
    """Returns codes and scales under the global scale 2^(largest - 8), and how many blocks were rounded.

    largest   of `exponent` over all weights that share the global scale
    """
    assert isinstance(spec.granularity, PerGroup)
    matrix, size = as_matrix(weight), spec.granularity.size
    amax = matrix.float().view(len(matrix), -1, size).abs().amax(-1)
    outer = largest - HIGHEST
    powers = (_powers(amax, spec) - outer).clamp_(LOWEST, HIGHEST)
    stored = torch.where(amax == 0, 1.0, torch.exp2(powers).float()).to(torch.float8_e4m3fn)
    params = QParams(stored, torch.tensor(math.ldexp(1.0, outer), dtype=torch.float32, device=weight.device))
    quantized = Quantized(encode(weight, spec, params), params)
    wrong = as_matrix(dequantize(quantized, spec)) != matrix.float()
    return quantized, int(wrong.view(len(matrix), -1, size).any(-1).sum())


def fits(largest: int) -> bool:
    """True when such a global scale is an ordinary float32."""
    return largest - HIGHEST in _GLOBAL


def _powers(amax: Tensor, spec: TensorSpec) -> Tensor:
    """Returns exponents (float64) with which the largest value of a block lies in the highest binade of the codes."""
    return torch.frexp(amax).exponent.double() - 1 - spec.format.max_exponent


def _has_few_bits(values: Tensor, spec: TensorSpec) -> bool:
    """True when no value has more bits than the codes' mantissas."""
    mantissa = torch.frexp(values.float()).mantissa * 2 ** (spec.format.mantissa + 1)
    return bool((mantissa == mantissa.round()).all())
