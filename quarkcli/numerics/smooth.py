"""Factors for channels that move the size of activations into weights, and what quantization then costs."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_WEIGHT = 1e-5  # below, a column counts as this large: what nobody reads must not blow a channel up


def smooth_factors(seen: Tensor, columns: Tensor, alpha: float, clamp_min: float = 1e-3) -> Tensor:
    """Returns SmoothQuant's factors, float32 [channels]: seen^alpha / columns^(1 - alpha).

    seen       largest magnitude of every channel; 1 for a channel that was always zero
    columns    largest magnitude of the weights that read it
    clamp_min  the smallest factor
    """
    factors = seen.double().pow(alpha) / columns.double().clamp_min(_LEAST_WEIGHT).pow(1.0 - alpha)
    return torch.where(seen > 0, factors.clamp_min(clamp_min), 1.0).float()
