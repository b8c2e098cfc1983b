"""Applies block Hadamards to inputs, as servers of linears with one do."""

from __future__ import annotations

import torch
from torch import Tensor

from quarkcli.numerics import hadamard


def turned(x: Tensor, block: int) -> Tensor:
    """Returns `x` with every run of `block` values along the last axis multiplied by Sylvester's matrix / sqrt(block).

    `block` is a power of two; 1 leaves `x` as it is. Arithmetic is float32, the result has the dtype of `x`. The matrix
    is symmetric and its own inverse.
    """
    if block == 1:
        return x
    return hadamard.turned(x.to(torch.float32), block).to(x.dtype)
