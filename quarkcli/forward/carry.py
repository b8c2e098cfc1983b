"""Keeps hidden states between two blocks: on the device, in the host's memory, or in files.

When the device's memory runs out with one row in a forward, streams give way one after the other: the served one goes
to the host first, then the source model's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from quarkcli.forward.defaults import Offload

SHARE = 4  # hidden states stay on the device while they take less than one part in this of its free memory


class Carry:
    """Parks the hidden states of all streams.

    offload  auto: on the device while they are small there, and until its memory runs out; none: on the device,
             whatever happens; cpu: in the host's memory; disk: in files that the system may drop from memory
    folder   where files go; None: to the system's place for temporary files
    """

    def __init__(self, device: torch.device, offload: Offload = "auto", folder: Path | None = None) -> None:
        self.device, self.offload = device, offload
        self._folder = folder
        self._hosted: set[str] = set()  # streams that gave way

    def park(self, stream: str, hidden: Tensor, batches: int) -> Tensor:
        """Returns a batch of hidden states where they are to wait. `batches`: of all streams."""
        if self.offload == "disk":
            return self._in_file(hidden)
        if self.device.type == "cpu" or self.offload == "none":
            return hidden
        if self.offload == "cpu" or stream in self._hosted:
            return hidden.cpu()
        return hidden if hidden.nbytes * batches * SHARE < free(self.device) else hidden.cpu()

    def give_way(self, streams: dict[str, list[Tensor]]) -> str | None:
        """Moves one more stream to the host, and returns what to say of it; None when all are there."""
        if self.device.type == "cpu" or self.offload != "auto":
            return None
        left = [name for name in streams if name not in self._hosted]
        if not left:
            return None
        self._hosted.add(left[0])
        streams[left[0]] = [hidden.cpu() for hidden in streams[left[0]]]
        return f"hidden states of {_whose(left[0])} model move to RAM"

    def tried(self) -> str:
        """Returns what gave way, for an error; empty: nothing."""
        if not self._hosted:
            return ""
        models = " and ".join(map(_whose, sorted(self._hosted)))
        return f"; hidden states of {models} model are in RAM already"

    def _in_file(self, hidden: Tensor) -> Tensor:
        """Returns the same values, mapped from a file: what memory holds of them can be dropped at any time."""
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="hidden-") as file:
            mapped = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype)
        # The mapping keeps the file, which has no name any more: the system frees it with the tensor.
        return mapped.view(hidden.shape).copy_(hidden)


def free(device: torch.device) -> int:
    """Returns the bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0]


def _whose(stream: str) -> str:
    """Returns the model that a stream of hidden states belongs to, in words."""
    return "the original" if stream == "source" else "the quantized"
