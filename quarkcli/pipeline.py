"""Reading ahead and writing behind: with a GPU the next part is read and the last one written while this one is
worked on. On a CPU both happen in turn, so that memory holds one part.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from quarkcli.errors import Stopped
from quarkcli.forecast import slug
from quarkcli.journal import Journal
from quarkcli.numerics.quantize import dequantize
from quarkcli.part import PartResult, PartWorker, decode
from quarkcli.plan.model import Part, Target
from quarkcli.source import Source, read_headers, read_tensors
from quarkcli.writer import write_part


class Pipeline:
    """Moves parts between files and the device. At most one part is being read and one being written."""

    def __init__(self, source: Source, partial: Path, journal: Journal, device: str) -> None:
        self.source = source
        self.partial = partial
        self.journal = journal
        self.device = device
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
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def read(self, part: Part, following: Part | None) -> dict[str, Tensor]:
        """The part's tensors on the device; starts to read the following part."""
        if self._reading is not None and self._reading[0] == part.name:
            tensors = self._reading[1].result()
        else:
            tensors = self.source.read_many(part.tensors)
        if self.pool is not None and following is not None:
            self._reading = (following.name, self.pool.submit(self.source.read_many, following.tensors))
        if self.device == "cpu":
            return tensors
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def write(self, part: Part, result: PartResult, worker: PartWorker) -> None:
        """Make the part durable and note it in the journal, with the carry when later parts need it."""
        carry = batch = None
        # Before the first block there is no carry: tokens are embedded again.
        if worker.walk is not None and worker.walk.carry and part.index < worker.last:
            carry = {f"{index:06d}": hidden.cpu() for index, hidden in enumerate(worker.walk.carry)}
            batch = worker.walk.batch
        tensors = {name: tensor.cpu() for name, tensor in result.tensors.items()}
        result.tensors.clear()
        self._in_background(lambda: self._write(part, tensors, result.record(), carry, batch))

    def _write(
        self,
        part: Part,
        tensors: dict[str, Tensor],
        record: dict[str, Any],
        carry: dict[str, Tensor] | None,
        batch: int | None,
    ) -> None:
        if batch is not None and batch != self.journal.notes.get("batch"):
            self.journal.note("batch", batch)
        files = write_part(self.partial, slug(part), tensors)
        self.journal.finish(part.name, {**record, "files": [file.record() for file in files]}, carry)

    def _in_background(self, job: Callable[[], None]) -> None:
        if self.pool is None:
            job()
            return
        self.drain()
        torch.cuda.synchronize()
        self._writing = self.pool.submit(job)

    def outside(self, names: list[str], worker: PartWorker) -> dict[str, Tensor]:
        """Tensors outside the blocks as they are served: quantized embeddings decoded from the files written."""
        targets = [t for t in worker.plan.quantized() if t.is_embedding and t.view.tensor in names]
        kept = self.source.read_many([name for name in names if name not in {t.view.tensor for t in targets}])
        return kept | {target.view.tensor: self._served(target, worker) for target in targets}

    def _served(self, target: Target, worker: PartWorker) -> Tensor:
        assert target.weight is not None
        self.drain()
        record = self.journal.finished[worker.plan.parts[target.part].name]
        packed: dict[str, Tensor] = {}
        for file in record["files"]:
            path = self.partial / file["file"]
            packed |= read_tensors(path, read_headers(path, path.name))
        return dequantize(decode(worker.dialect, target, packed).weight, target.weight)

    def drain(self) -> None:
        """Wait until everything handed over is durable; raises what went wrong."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
