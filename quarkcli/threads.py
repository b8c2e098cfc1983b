"""Says how many threads this process may use, and gives workers that do one piece of work each.

torch itself divides every single operation among its threads, which then wait for each other: a matrix costs hundreds
of such meetings, and beside other work each of them lasts as long as the slowest thread is kept from the processor.
Workers meet once a part.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from quarkcli.memory import without_collection

_PATIENCE = ("GOMP_SPINCOUNT", "20000")  # a fraction of a millisecond; with 1,000 gptq takes a tenth longer alone
_ASKED = "OMP_NUM_THREADS"  # what torchrun and schedulers set
_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_AHEAD = 2  # pieces handed out beyond those being worked on

One = TypeVar("One")
Other = TypeVar("Other")


def default() -> int:
    """Returns OMP_NUM_THREADS where it is a number, else the cores that this process may use."""
    asked = os.environ.get(_ASKED, "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) else available()


def available() -> int:
    """Returns the cores that affinity and the control group leave to this process, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas()]))


def _quotas() -> Iterator[int]:
    """Yields the limits of the control groups that this process is in, in whole cores, rounded up."""
    try:
        own = [line.rpartition(":")[2].strip("/") for line in _OWN.read_text().splitlines() if line.startswith("0::")]
    except OSError:
        return
    inner = [_GROUPS / name for name in own if name and ".." not in name.split("/")]
    folders = {_GROUPS, *inner, *(parent for path in inner for parent in path.parents if _GROUPS in parent.parents)}
    for folder in folders:
        yield from _quota(folder, ["cpu.max"])
    yield from _quota(_GROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"])  # the first version


def _quota(folder: Path, names: list[str]) -> Iterator[int]:
    try:
        fields = [field for name in names for field in (folder / name).read_text().split()]
    except OSError:
        return
    if len(fields) == 2 and all(field.isdecimal() for field in fields) and int(fields[1]):
        yield math.ceil(int(fields[0]) / int(fields[1]))


def wait_asleep() -> None:
    """Has threads that wait for each other leave the processor soon; before torch is imported.

    OpenMP's own choice is to wait awake for milliseconds. Where other work has the other core, the thread that is
    waited for does not run meanwhile, and a run beside it takes ten times its time.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*_PATIENCE)


@contextmanager
def limited(count: int) -> Iterator[None]:
    """Runs torch's own operations of this thread on `count` threads."""
    with without_collection():  # all that importing torch makes stays
        import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SMALL = 1 << 20  # values of a weight: below, one thread is as fast as two


class Workers:
    """Some threads that each do one piece of work at a time, with torch's own operations on that thread alone.

    One worker is the calling thread itself.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "worker", initializer=alone) if count > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def on(self, values: float) -> Workers:
        """Returns who works on weights of so many values each: where these are few, the calling thread alone.

        Short torch calls of several threads spend their time waiting for Python's lock.
        """
        return self if values >= SMALL else Workers()

    def map(self, call: Callable[[One], Other], items: Iterable[One]) -> Iterator[Other]:
        """Yields `call` of every item, in their order; an error is that of the first item that has one.

        Items are taken a few at a time, as the results are.
        """
        if self._pool is None:
            yield from map(call, items)
            return
        running: deque[Future[Other]] = deque()
        try:
            for item in items:
                running.append(self._pool.submit(call, item))
                del item  # held by its work alone
                if len(running) >= self.count + _AHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            _end(running)


def _end(running: Iterable[Future[Other]]) -> None:
    """Waits until no work goes on; what has not begun is not done."""
    begun = [future for future in running if not future.cancel()]
    for future in begun:
        future.exception()


def alone() -> None:
    """Has torch's own operations of this thread done by it alone."""
    import torch

    torch.set_num_threads(1)
