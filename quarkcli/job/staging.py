"""Moves tensors to a device and back through two pinned buffers: one is filled while the other is sent.

Pageable memory goes to a device at a quarter of the link's speed or less, and pinning whole parts would lock them in
memory; two small buffers do neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

SIZE = 64 * 2**20  # bytes of a buffer


class Staging:
    """Two buffers beside a device; elsewhere than on `cuda` nothing is pinned, and copies are plain.

    size  of a buffer, bytes
    """

    def __init__(self, device: str, size: int = SIZE) -> None:
        self.device, self.size = device, size
        self._pinned = device.startswith("cuda")
        self._buffers: list[Tensor] = []
        self._sent: list[Any] = []
        self._stream = torch.cuda.Stream(device) if self._pinned else None

    def up(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors on the device."""
        found = {}
        for name, tensor in tensors.items():
            made = torch.empty_like(tensor, device=self.device, memory_format=torch.contiguous_format)
            self._after_the_work()  # what was freed for it may still be read
            for number, (source, into) in enumerate(self._pieces(tensor.contiguous(), made)):
                buffer = self._free(number)[: source.numel()]
                buffer.copy_(source)
                with self._sending():
                    into.copy_(buffer, non_blocking=True)
                self._note(number)
            found[name] = made
        self._wait()
        return found

    def down(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of the device in the host's memory."""
        made = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        self._after_the_work()
        waiting: tuple[int, Tensor, Tensor] | None = None
        for number, (source, into) in enumerate(self._pieces(tensor.contiguous(), made)):
            buffer = self._free(number)[: source.numel()]
            with self._sending():
                buffer.copy_(source, non_blocking=True)
            self._note(number)
            if waiting is not None:
                self._land(*waiting)
            waiting = number, buffer, into
        if waiting is not None:
            self._land(*waiting)
        return made

    def _pieces(self, source: Tensor, into: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields both as bytes, so many at a time as a buffer holds."""
        yield from zip(_bytes(source).split(self.size), _bytes(into).split(self.size), strict=True)

    def _free(self, number: int) -> Tensor:
        """Returns the buffer for a piece, when what was in it has been sent."""
        if not self._buffers:
            self._buffers = [torch.empty(self.size, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(2)]
            self._sent = [torch.cuda.Event() if self._pinned else None for _ in range(2)]
        if self._pinned:
            self._sent[number % 2].synchronize()
        return self._buffers[number % 2]

    def _land(self, number: int, buffer: Tensor, into: Tensor) -> None:
        """Takes a piece out of its buffer, when it has come."""
        if self._pinned:
            self._sent[number % 2].synchronize()
        into.copy_(buffer)

    def _sending(self) -> Any:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def _note(self, number: int) -> None:
        if self._stream is not None:
            self._sent[number % 2].record(self._stream)

    def _after_the_work(self) -> None:
        """Lets copies begin when all that the device was asked for until now is done."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self.device))

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
