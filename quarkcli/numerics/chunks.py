"""Walks a matrix in chunks of rows that fit the processor's cache, and finds the largest magnitude of every group."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from quarkcli.errors import DataError, ModelError

# Elements per chunk. On a CPU three float32 buffers of a chunk stay in the level-2 caches; elsewhere a chunk only
# bounds the temporary memory.
CPU_CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 27
_HALVES = (torch.bfloat16, torch.float16)


def row_chunks(x: Tensor) -> Iterator[slice]:
    """Yields slices over the rows of the matrix `x`, each about one chunk."""
    rows = x.shape[0]
    step = _chunk_rows(x)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def work_chunks(x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields `row_chunks` with a float32 buffer [n, cols] and int32 scratch [2, n, cols], used again and again."""
    rows = min(_chunk_rows(x), x.shape[0])
    with _space(3 * rows * x.shape[1], x.device) as flat:
        space = flat.view(3, rows, x.shape[1])
        for part in row_chunks(x):
            count = part.stop - part.start
            yield part, space[0, :count], space[1:, :count].view(torch.int32)


@contextmanager
def _space(count: int, device: torch.device) -> Iterator[Tensor]:
    """Lends `count` float32 values of memory. On a CPU each thread keeps what it was lent last.

    Fresh memory would be returned to the system and faulted in again each time.
    """
    kept = _kept.spaces if device.type == "cpu" else []
    space = kept.pop() if kept else torch.empty(0)
    if space.numel() < count:
        space = torch.empty(count, dtype=torch.float32, device=device)
    try:
        yield space[:count]
    finally:
        if device.type == "cpu" and space.numel() <= 4 * CPU_CHUNK and not kept:
            kept.append(space)


class _Kept(threading.local):
    """The memory of a thread that nothing uses just now."""

    def __init__(self) -> None:
        self.spaces: list[Tensor] = []


_kept = _Kept()


def _chunk_rows(x: Tensor) -> int:
    limit = CPU_CHUNK if x.device.type == "cpu" else DEVICE_CHUNK
    return max(1, limit // max(1, x.shape[1]))


def as_matrix(x: Tensor) -> Tensor:
    """Returns `x` [..., features] as [rows, features]; a scalar or empty last axis is allowed."""
    if x.dim() == 2:
        return x
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


def require_divisible(cols: int, size: int) -> None:
    """Raises ModelError unless the last dimension holds whole groups."""
    if cols % size:
        raise ModelError(
            f"the last dimension {cols} is not divisible by the group size {size}",
            hint="exclude this layer, or choose a group size that divides its width",
            kind="E-GROUP-SIZE",
        )


def by_group(y: Tensor, scale: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns views of `y` [n, cols] and `scale` [n, groups] that broadcast against each other.

    The last group may be short.
    """
    rows, cols = y.shape
    groups = scale.shape[1]
    if groups * size == cols:
        return y.view(rows, groups, size), scale.unsqueeze(-1)
    return y, scale.repeat_interleave(size, 1)[:, :cols]


def group_amax(x: Tensor, size: int) -> Tensor:
    """Returns the largest magnitude of every run of `size` values in each row of `x` [rows, cols].

    The result is float32 [rows, ceil(cols/size)].

    NaN if the run holds one. The last run may be shorter.
    """
    rows, cols = x.shape
    groups = -(-cols // size)
    out = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    # The bits of positive 16-bit floats are in the order of their values, NaN last; integers are compared faster.
    halves = x.dtype in _HALVES
    rows = min(_chunk_rows(x), rows)
    with _space(rows * cols, x.device) as space:
        for part in row_chunks(x):
            values = x[part]
            magnitude = space.view(x.dtype if halves else torch.float32)[: values.numel()].view(values.shape)
            torch.abs(values, out=magnitude) if halves or x.dtype == torch.float32 else magnitude.copy_(values).abs_()
            if halves:
                magnitude = magnitude.view(torch.int16)
            if groups * size != cols:
                magnitude = functional.pad(magnitude, (0, groups * size - cols))
            runs = magnitude.view(-1, groups, size)
            # torch has no fast path for the shortest reductions.
            largest = torch.maximum(runs[..., 0], runs[..., 1]) if size == 2 else runs.amax(-1)
            out[part] = largest.view(x.dtype) if halves else largest
    return out


def group_ends(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns both ends of every run of `size` values in each row of `x` [rows, cols], shaped as `group_amax`.

    NaN if the run holds one. The last run may be shorter.
    """
    rows, cols = x.shape
    groups = -(-cols // size)
    low, high = torch.empty(2, rows, groups, dtype=torch.float32, device=x.device)
    for part in row_chunks(x):
        values = x[part].float().contiguous()
        if groups * size != cols:
            values = functional.pad(values, (0, groups * size - cols), mode="replicate")
        runs = values.view(-1, groups, size)
        torch.amin(runs, -1, out=low[part])
        torch.amax(runs, -1, out=high[part])
    return low, high


def require_finite(amax: Tensor, x: Tensor) -> None:
    """Raises DataError naming the first non-finite position of `x` [rows, cols], given per-row(-group) amax of it."""
    if bool(torch.isfinite(amax).all()):
        return
    row = int((~torch.isfinite(amax)).any(-1).nonzero()[0])
    col = int((~torch.isfinite(x[row].float())).nonzero()[0])
    raise DataError(
        f"value {x[row, col].item()} at [{row}, {col}] is not finite",
        hint="exclude this tensor, or repair the model: its weights are damaged or overflowed",
        kind="E-NONFINITE-WEIGHT",
    )
