"""Reading ahead and writing behind.

With a GPU the next part is read and the last one written while this one is worked on. On a CPU both
happen in turn, so that memory holds one part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from quarkcli.disk.contents import slug
from quarkcli.disk.headers import read_headers, read_tensors
from quarkcli.disk.journal import Journal
from quarkcli.disk.outputs import of_folder, within
from quarkcli.disk.stream import Stream
from quarkcli.disk.weights import WeightSource
from quarkcli.disk.writer import write_part
from quarkcli.errors import Stopped
from quarkcli.job.part import PartResult, PartWorker
from quarkcli.job.served import decode
from quarkcli.numerics.quantize import dequantize
from quarkcli.plan.model import Part


class Pipeline:
    """Moves parts between files and the device. At most one part is being read and one being written.

    folders   where in the output each dialect's files go
    stream    brings weight files that are on the hub
    """

    def __init__(
        self,
        source: WeightSource,
        partial: Path,
        journal: Journal,
        device: str,
        folders: Sequence[str] = ("",),
        stream: Stream | None = None,
    ) -> None:
        self.source = source
        self.partial = partial
        self.folders = folders
        self.journal = journal
        self.device = device
        self.stream = stream
        self.pool = ThreadPoolExecutor(2) if device != "cpu" else None
        self._reading: tuple[str, Future[dict[str, Tensor]]] | None = None
        self._writing: Future[None] | None = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Stopped):
            self.drain()
        if self.stream is not None:
            self.stream.close()  # a read that waits for a download ends
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def read(self, part: Part, following: Part | None) -> dict[str, Tensor]:
        """Returns the part's tensors on the device; starts to read the following part."""
        if self._reading is not None and self._reading[0] == part.name:
            tensors = self._reading[1].result()
        else:
            tensors = self._read(part)
        if self.pool is not None and following is not None:
            self._reading = (following.name, self.pool.submit(self._read, following))
        if self.device == "cpu":
            return tensors
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _read(self, part: Part) -> dict[str, Tensor]:
        if self.stream is None:
            return self.source.read_many(part.tensors)
        with self.stream.reading(part.name):
            return self.source.read_many(part.tensors)

    def write(self, part: Part, result: PartResult, worker: PartWorker) -> None:
        """Makes the part durable and notes it in the journal, with the hidden states that later parts need."""
        if self.stream is not None:
            self.stream.done(part.name)
        hidden = batch = None
        # Before the first block there are none: tokens are embedded again.
        if worker.walk is not None and worker.walk.served and part.index < worker.last:
            streams = worker.walk.hidden.items()
            hidden = {f"{stream}/{i:06d}": one.cpu() for stream, states in streams for i, one in enumerate(states)}
            batch = worker.walk.batch
        forms = _on_cpu([result.tensors, *result.others])
        for tensors in (result.tensors, *result.others):
            tensors.clear()
        self._in_background(lambda: self._write(part, forms, result.record(), hidden, batch))

    def _write(
        self,
        part: Part,
        forms: list[dict[str, Tensor]],
        record: dict[str, Any],
        hidden: dict[str, Tensor] | None,
        batch: int | None,
    ) -> None:
        if batch is not None and batch != self.journal.notes.get("batch"):
            self.journal.note("batch", batch)
        files = [
            {**file.record(), "file": within(folder, file.file)}
            for folder, tensors in zip(self.folders, forms, strict=True)
            for file in write_part(self.partial / folder, slug(part), tensors)
        ]
        self.journal.finish(part.name, {**record, "files": files}, hidden)

    def _in_background(self, job: Callable[[], None]) -> None:
        if self.pool is None:
            job()
            return
        self.drain()
        torch.cuda.synchronize()
        self._writing = self.pool.submit(job)

    def outside(self, names: list[str], worker: PartWorker) -> dict[str, Tensor]:
        """Returns tensors outside the blocks as they are served.

        Those of finished parts that are quantized or changed come from the files written, quantized ones decoded.
        """
        self.drain()
        plan, done = worker.plan, self.journal.finished
        found: dict[str, Tensor] = {}
        for part in plan.parts:
            if part.block is None and part.name in done:
                found |= self._served(part, [name for name in part.tensors if name in names], worker)
        rest = self.source.read_many([name for name in names if name not in found])
        return {name: found[name] if name in found else rest[name] for name in names}

    def _served(self, part: Part, names: list[str], worker: PartWorker) -> dict[str, Tensor]:
        """Returns those of `names` that the finished part holds in another form than the source."""
        plan = worker.plan
        targets = {t.view.tensor: t for t in plan.quantized(part.index) if t.view.tensor in names}
        changed = [name for name in names if name in plan.changed and name not in targets]
        if not targets and not changed:
            return {}
        written: dict[str, Tensor] = {}
        folder = self.partial / self.folders[0]
        for file in of_folder(self.journal.finished, self.folders[0])[part.name]["files"]:
            path = folder / file["file"]
            written |= read_tensors(path, read_headers(path, path.name))
        served = {name: written[name] for name in changed}
        for name, target in targets.items():
            served[name] = dequantize(decode(worker.dialect, target, written).weight, target.weight)
        return served

    def drain(self) -> None:
        """Waits until everything handed over is durable; raises the error of a failed write."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def _on_cpu(forms: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Returns the tensors on the CPU; one that stands in several forms is copied once."""
    copies: dict[int, Tensor] = {}
    for tensors in forms:
        for tensor in tensors.values():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.cpu()
    return [{name: copies[id(tensor)] for name, tensor in tensors.items()} for tensors in forms]
