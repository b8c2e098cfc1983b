"""Keeps the hidden states before every block in files, so that memory holds those of one block."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from quarkcli.disk.place import acquire
from quarkcli.disk.writer import remove
from quarkcli.errors import ResourceError

_PREFIX = ".quark-search-"


@contextmanager
def place(parent: Path) -> Iterator[Path]:
    """Gives a hidden folder that is removed at the end; those of searches that were killed are removed at the start."""
    for left in (file.parent for file in parent.glob(f"{_PREFIX}*/lock")):
        with suppress(ResourceError):  # another search is at work there
            os.close(acquire(left / "lock"))
            remove(left)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        folder = Path(name)
        lock = acquire(folder / "lock")
        try:
            yield folder
        finally:
            os.close(lock)


class States:
    """The input of every block, for all batches, below a folder.

    They are rounded to bfloat16: losses are differences at these points, and both sides of a difference start there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, block: int, states: list[Tensor]) -> None:
        torch.save([hidden.to("cpu", torch.bfloat16) for hidden in states], self._file(block))

    def take(self, block: int, dtype: torch.dtype) -> list[Tensor]:
        """Returns the input of a block in a dtype, and removes its file."""
        states: list[Tensor] = torch.load(self._file(block), weights_only=True)
        self._file(block).unlink()
        return [hidden.to(dtype) for hidden in states]

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.pt"
