"""Products of 16-bit values with float32 sums, on what a processor has for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    A GPU's tensor cores take float32 values as TF32, which holds every bfloat16 and float16 value.
    """
    if total.device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        with _precision(torch.backends.cuda.matmul, "tf32"):
            total.addmm_(left.T, right, beta=keep, alpha=weight)
        return
    if total.device.type != "cpu" or dtype != torch.bfloat16:
        total.addmm_(left.T, right, beta=keep, alpha=weight)
        return
    with _precision(torch.backends.mkldnn.matmul, "bf16"):  # type: ignore[attr-defined]  # it makes its attributes
        for start in range(0, len(left), RUN):
            run = slice(start, start + RUN)
            total.addmm_(left[run].T, right[run], beta=1.0 if start else keep, alpha=weight)


@contextmanager
def _precision(setting: Any, precision: str) -> Iterator[None]:
    """Multiplies float32 matrices with this precision inside."""
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before
