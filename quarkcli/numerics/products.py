"""Products of 16-bit values with float32 sums, on what a processor has for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RUN = 1024  # rows that are multiplied at once: oneDNN divides longer sums among threads, which changes bits


def add_product_(
    total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, keep: float = 1.0, weight: float = 1.0
) -> None:
    """Makes of `total` [m, n] keep * total + weight * left^T right; left [k, m] and right [k, n] are float32, with
    values of `dtype`.

    Products of two bfloat16 values are exact in float32, so that rounding both to bfloat16 first, which is all that a
    CPU's bfloat16 units need, changes nothing but the order of the sums. Twice as fast where it has such units.
    """
    if total.device.type != "cpu" or dtype != torch.bfloat16:
        total.addmm_(left.T, right, beta=keep, alpha=weight)
        return
    with _bfloat16_units():
        for start in range(0, len(left), RUN):
            run = slice(start, start + RUN)
            total.addmm_(left[run].T, right[run], beta=1.0 if start else keep, alpha=weight)


@contextmanager
def _bfloat16_units() -> Iterator[None]:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # a module that makes its attributes
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
