"""Multiplies float32 on a CPU through oneDNN instead of MKL, which uses half of an AMD processor's units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Terms of a sum at once, in steps of `STEP`: oneDNN divides longer ones among threads, which changes bits.
RUN, STEP = 1024, 128
TILE = 512  # rows and columns of a product made at once; oneDNN keeps half a MB for every shape that it has seen


@contextmanager
def through_onednn() -> Iterator[None]:
    """Float32 products inside run through oneDNN where that rounds nothing. It is for all threads of the process."""
    with _permitted(_keeps_float32()):
        yield


def add_product_(
    total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, sign: int = 1, fresh: bool = False
) -> None:
    """Adds left^T right to `total` [m, n], or takes it off; left [k, m] and right [k, n] are float32.

    fresh   `total` holds nothing yet, not even zeros
    dtype   what their values fit in. Of bfloat16 ones a product is exact in float32: rounding them to bfloat16 first,
            which oneDNN does where a CPU has tiles for it, changes nothing. A GPU's tensor cores take float32 as TF32,
            which holds every bfloat16 and float16 value
    """
    if total.device.type != "cpu":
        halves = total.device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        with _precision(torch.backends.cuda.matmul, "tf32" if halves else None):
            total.addmm_(left.T, right, beta=not fresh, alpha=sign)
        return
    if fresh and not len(left):
        total.zero_()
    for run in _runs(len(left)):
        usual, kept = run.stop - run.start >= STEP, bool(run.start) or not fresh
        with _permitted(usual and (dtype == torch.bfloat16 or _keeps_float32())):
            for rows in _tiles(total.shape[0]):
                for columns in _tiles(total.shape[1]):
                    own = total[rows, columns]
                    own.addmm_(left[run, rows].T, right[run, columns], beta=kept, alpha=sign)


def _runs(terms: int) -> Iterator[slice]:
    """Yields slices of `RUN`, of a few steps, and what is left over."""
    start = 0
    while start < terms:
        size = min(RUN, (terms - start) // STEP * STEP) or terms - start
        yield slice(start, start + size)
        start += size


def _tiles(size: int) -> Iterator[slice]:
    """Yields slices of `TILE`; the first is what is left over, so that those of a shrinking matrix have few sizes."""
    for stop in range(size % TILE or min(TILE, size), size + 1, TILE):
        yield slice(max(0, stop - TILE), stop)


def _permitted(rounding: bool) -> AbstractContextManager[None]:
    """Permits rounding float32 factors to bfloat16. torch hands products over to oneDNN then, and only then."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # a module that makes its attributes
    return _precision(setting, "bf16" if rounding else None)


@contextmanager
def _precision(setting: Any, precision: str | None) -> Iterator[None]:
    """Multiplies float32 matrices with this precision inside; None: as outside."""
    if precision is None:
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before


@cache
def _keeps_float32() -> bool:
    """Returns whether products are float32's although they need not be: on all x86 processors but those with tiles."""
    value = 1.0 + 2.0**-12  # rounds to 1 in bfloat16
    factor = torch.full((256, 256), value)
    with _permitted(True):
        product = factor @ torch.eye(256)
    return bool((product == value).all())
