"""Reads the next part and writes the last one while this one is worked on.

Memory holds one part all the same: the next one comes as fast as tensors of this one are let go, and no faster.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from quarkcli import memory
from quarkcli.disk.contents import slug
from quarkcli.disk.headers import read_headers, read_tensors
from quarkcli.disk.journal import Journal
from quarkcli.disk.outputs import of_folder, within
from quarkcli.disk.stream import Stream
from quarkcli.disk.weights import WeightSource
from quarkcli.disk.writer import write_part
from quarkcli.errors import Stopped
from quarkcli.events import Listener, PartDone, silent
from quarkcli.forward import handed
from quarkcli.forward.group import Group
from quarkcli.job.part import PartWorker
from quarkcli.job.result import PartResult
from quarkcli.job.served import decode
from quarkcli.job.staging import Staging
from quarkcli.numerics.quantize import dequantize
from quarkcli.plan.model import Part
from quarkcli.threads import alone


class Room:
    """Bytes of source tensors that may be in memory, for the thread that reads ahead; what somebody waits for may come.

    size   None: no bound
    """

    def __init__(self, size: int | None) -> None:
        self._left = size
        self._wanted = False
        self._changed = threading.Condition()

    def wait(self) -> None:
        """Waits until there is room, or what is being read is wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._left is None or self._left > 0 or self._wanted)

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that are in memory until nobody holds them."""
        for tensor in tensors:
            self._give(-tensor.nbytes)
            weakref.finalize(tensor, self._give, tensor.nbytes).atexit = False

    def _give(self, count: int) -> None:
        with self._changed:
            if self._left is not None:
                self._left += count
            self._changed.notify_all()

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """Lets the reading go on inside, whatever is in memory."""
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
        try:
            yield
        finally:
            self._wanted = False


class Pipeline:
    """Moves parts between files and the device. At most one part is being read and one being written.

    folders   where in the output each dialect's files go
    stream    brings weight files that are on the hub
    group     the ranks that work on the parts; those that need data are noted by the first
    room      bytes of source tensors, and of tensors that are being written, beyond which nothing is read ahead; None:
              no bound
    """

    def __init__(
        self,
        source: WeightSource,
        partial: Path,
        journal: Journal,
        device: str,
        folders: Sequence[str] = ("",),
        stream: Stream | None = None,
        room: int | None = None,
        group: Group | None = None,
        tell: Listener = silent,
    ) -> None:
        self.source = source
        self.partial = partial
        self.folders = folders
        self.journal = journal
        self.device = device
        self.stream = stream
        self.group = group or Group()
        self.tell = tell
        self.room = Room(room)
        self.staging = Staging(device)
        self.reader, self.writer = ThreadPoolExecutor(1, "reader", alone), ThreadPoolExecutor(1, "writer", alone)
        self._closing = False
        self._reading: tuple[str, Future[dict[str, Tensor]]] | None = None
        self._writing: Future[None] | None = None

    def __enter__(self) -> Pipeline:
        memory.collect()  # from here on things come and go
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        try:
            if kind is None or issubclass(kind, Stopped):
                self.drain()
        finally:
            if self.stream is not None:
                self.stream.close()  # a read that waits for a download ends
            with self.room.wanted():
                self.reader.shutdown(wait=True, cancel_futures=True)
            self.writer.shutdown(wait=True)  # what was handed over becomes durable, whatever failed since

    def read(self, part: Part, following: Part | None) -> dict[str, Tensor]:
        """Returns the part's tensors on the device; starts to read the following part."""
        if self._reading is None or self._reading[0] != part.name:
            self._reading = (part.name, self.reader.submit(self._read, part))
        with self.room.wanted():
            tensors = self._reading[1].result()
        self._reading = None
        if following is not None:
            self._reading = (following.name, self.reader.submit(self._read, following))
        if self.device == "cpu":
            return tensors
        return self.staging.up(tensors)

    def _read(self, part: Part) -> dict[str, Tensor]:
        with self.stream.reading(part.name) if self.stream is not None else nullcontext():
            found: dict[str, Tensor] = {}
            for names in [[name] for name in part.tensors] if self.source.by_offset else [part.tensors]:
                self.room.wait()
                if self._closing:
                    break
                tensors = self.source.read_many(names)
                self.room.take(tensors.values())
                found |= tensors
            return found

    def write(
        self,
        part: Part,
        result: PartResult | None,
        worker: PartWorker,
        writer: int | None = None,
        done: PartDone | None = None,
    ) -> None:
        """Makes the part durable and notes it in the journal, with the hidden states that later parts need.

        result   None on ranks that did not work on it
        writer   the rank that writes a part which ranks pass together; None: this rank has it alone
        done     what listeners hear once the part is durable, from the thread that wrote it
        """
        if self.stream is not None:
            self.stream.done(part.name)
        if writer is not None or result is None:
            self._write_together(part, result, worker, writer or 0)
            self._tell(done)
            return
        hidden, forms = self._hidden(part, worker), self._taken(result)
        batch = worker.walk.batch if worker.walk is not None and hidden is not None else None
        self._writing = self.writer.submit(self._write, part, forms, result.record(self.device), hidden, batch, done)

    def _write_together(self, part: Part, result: PartResult | None, worker: PartWorker, writer: int) -> None:
        """Does as `write`, and waits until all ranks' states are durable and the first rank has noted the part."""
        group, hidden = self.group, self._hidden(part, worker)
        record = result.record(self.device) if result is not None else None
        forms = self._taken(result) if result is not None else []
        files = self._files(part, forms) if group.rank == writer else []
        stored = self.journal.write_hidden(hidden) if hidden else None
        said = group.gather((record, files, stored))
        states = [states for _, _, states in said if states is not None]
        if group.is_main:
            if states and worker.walk is not None:
                self._note(worker.walk.batch)
            known = said[0 if worker.is_shared(part) else writer][0]
            self.journal.finish(part.name, {**known, "files": said[writer][1]}, stored=states)
        latest = group.share(self.journal.latest if group.is_main else None)
        if not group.is_main and latest is not None:
            self.journal.learn(latest)

    def _hidden(self, part: Part, worker: PartWorker) -> dict[str, Tensor] | None:
        """Returns the hidden states that later parts need, on the CPU."""
        # Before the first block there are none: tokens are embedded again.
        if worker.walk is None or not worker.walk.served or part.index >= worker.last:
            return None
        streams = worker.walk.hidden.items()
        states = {f"{stream}/{i:06d}": one.cpu() for stream, states in streams for i, one in enumerate(states)}
        return states | handed.flat(handed.collect(worker.walk.recordings))

    def _taken(self, result: PartResult) -> list[dict[str, Tensor]]:
        """Takes the tensors of a result, on the CPU, once the last part is durable."""
        forms = _on_cpu([result.tensors, *result.others], self.staging)
        for tensors in (result.tensors, *result.others):
            tensors.clear()
        self.room.take({id(tensor): tensor for tensors in forms for tensor in tensors.values()}.values())
        self.drain()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return forms

    def _write(
        self,
        part: Part,
        forms: list[dict[str, Tensor]],
        record: dict[str, Any],
        hidden: dict[str, Tensor] | None,
        batch: int | None,
        done: PartDone | None,
    ) -> None:
        if batch is not None:
            self._note(batch)
        self.journal.finish(part.name, {**record, "files": self._files(part, forms)}, hidden)
        self._tell(done)

    def _tell(self, done: PartDone | None) -> None:
        if done is not None:
            self.tell(done)

    def _note(self, batch: int) -> None:
        if batch != self.journal.notes.get("batch"):
            self.journal.note("batch", batch)

    def _files(self, part: Part, forms: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
        """Writes a part in every form. Returns what the journal says of the files."""
        return [
            {**file.record(), "file": within(folder, file.file)}
            for folder, tensors in zip(self.folders, forms, strict=True)
            for file in write_part(self.partial / folder, slug(part), tensors)
        ]

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
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _on_cpu(forms: list[dict[str, Tensor]], staging: Staging) -> list[dict[str, Tensor]]:
    """Returns the tensors on the CPU; one that stands in several forms is copied once."""
    copies: dict[int, Tensor] = {}
    for tensors in forms:
        for tensor in tensors.values():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor if tensor.device.type == "cpu" else staging.down(tensor)
    return [{name: copies[id(tensor)] for name, tensor in tensors.items()} for tensors in forms]
