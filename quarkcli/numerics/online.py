"""Block Hadamards, as linears that are served with one apply them to their inputs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def turned(x: Tensor, block: int) -> Tensor:
    """Returns `x` with every run of `block` values along the last axis multiplied by Sylvester's matrix / sqrt(block).

    Arithmetic is float32, the result has the dtype of `x`. The matrix is symmetric and its own inverse.
    """
    values = x.to(torch.float32).unflatten(-1, (-1, block))
    return (values @ _matrix(block, x.device)).flatten(-2).to(x.dtype)


@lru_cache(maxsize=8)
def _matrix(block: int, device: torch.device) -> Tensor:
    return sylvester(block).to(device=device, dtype=torch.float32) / block**0.5


def sylvester(size: int) -> Tensor:
    """Returns Sylvester's Hadamard matrix, int8; `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
