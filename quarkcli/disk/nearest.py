"""Compares codes and scales with those of rounding to nearest: damage that is lost in the noise of a whole weight.

An algorithm moves many codes by a little, and takes scales near those of rounding to nearest. Damage moves a few codes
far while all others are nearest, or leaves scales that do not fit the weight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.dialects.base import StoredTarget
    from quarkcli.numerics.quantize import Quantized
    from quarkcli.spec import TensorSpec

_SCALES = 4.0  # dB that codes gain under other scales than those they were chosen for: else they lose
_OWN = 5.0  # dB that codes of a solver lose beside the nearest ones
_MORE, _SHARE = 1.5, 0.4  # of the noise under its own scale has more than so many groups
_FAR = 2  # codes from the nearest one: rounding up for down is one
_FEW = 8  # codes of a word; a solver moves whole columns
_BETWEEN = 2  # times as many codes that are a little off as are far: errors that a solver spreads have a tail
_A_LITTLE = 0.2  # of the way to the nearest value: less is a tie


def damage(stored: StoredTarget, quantized: Quantized, weight: Tensor) -> str:
    """Returns the damage to codes or scales of a weight that the source has as `weight`; empty: none that shows."""
    spec, codes = stored.weight, quantized.codes
    known = spec.then is None and spec.format.kind in ("integer", "float") and quantized.params.scale is not None
    if not known or stored.columns is not None or codes.shape != weight.shape or not bool(weight.isfinite().all()):
        return ""
    values = weight.float() if quantized.order is None else weight.float()[:, quantized.order]
    gain = _gain(values, spec, quantized)
    if gain > _SCALES:
        return f"its scales are not its own, under which its codes lose {gain:.1f} dB less"
    far = _far(values, spec, quantized)
    return f"{far} code{'s are' if far > 1 else ' is'} far from the nearest, and all others are near" if far else ""


def _gain(values: Tensor, spec: TensorSpec, quantized: Quantized) -> float:
    """Returns how many dB less the codes lose under the weight's own scales; 0 where that does not say damage.

    Few groups may gain much: those of a column that a solver moved far.
    """
    from quarkcli.numerics import quantize as numerics

    params = numerics.make_qparams(values, spec)
    size = spec.group_size or values.shape[1]
    noises = [
        (found - values).square_().view(-1, size).sum(1)
        for found in (numerics.decode(quantized.codes, spec, params), quantized.values(spec, values.dtype))
    ]
    own, noise = (float(each.sum()) for each in noises)
    if not own or float((noises[1] > _MORE * noises[0]).float().mean()) <= _SHARE:
        return 0.0
    nearest = numerics.decode(numerics.encode(values, spec, params), spec, params)
    least = float((values - nearest).square().sum())
    return 10 * math.log10(noise / own) if own <= least * 10 ** (_OWN / 10) else 0.0


def _far(values: Tensor, spec: TensorSpec, quantized: Quantized) -> int:
    """Returns the number of codes that are far from the nearest, where they are few and few others are off at all."""
    import torch

    from quarkcli.numerics import quantize as numerics

    codes = numerics.encode(values, spec, quantized.params)
    moved = codes.view(torch.uint8) != quantized.codes.view(torch.uint8)
    if not bool(moved.any()):
        return 0
    steps = (_ranks(quantized.codes[moved], spec) - _ranks(codes[moved], spec)).abs()
    nearest = numerics.decode(codes, spec, quantized.params)[moved]
    found = quantized.values(spec, values.dtype)[moved]
    more = (values[moved] - found).abs() - (values[moved] - nearest).abs()
    off = more > _A_LITTLE * (found - nearest).abs()
    far = int((off & (steps >= _FAR)).sum())
    return far if far <= _FEW and int(off.sum()) <= _BETWEEN * far else 0


def _ranks(codes: Tensor, spec: TensorSpec) -> Tensor:
    """Returns the places of codes in the order of their values."""
    import torch

    if spec.format.kind == "integer":
        return codes.int()
    bits = codes.view(torch.uint8).int()
    sign = 1 << (spec.format.bits - 1)
    return torch.where(bits & sign > 0, -(bits & (sign - 1)), bits & (sign - 1))
