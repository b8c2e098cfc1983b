"""Runs several processes for one run, as torchrun starts them: how they talk, and how they end together.

A process that torchrun did not start, or one alone, never imports torch.distributed.
"""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from quarkcli import memory
from quarkcli.errors import ExitCode, QuarkError, ResourceError, UsageError, first_line
from quarkcli.forward.group import Group

BEAT = 2.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one, after which a rank counts as dead
ARRIVAL = 300  # seconds in which all ranks must have begun
_HINT = "run the same command again to continue; finished work is kept"
_AGENT = "TORCHELASTIC_RUN_ID"  # what torchrun sets, which watches over the processes
VERDICT = 3.0  # seconds in which the first rank may say the same error itself


def world() -> tuple[int, int]:
    """Returns the rank of this process and how many there are, as torchrun says: 0 and 1 without it.

    Raises UsageError where these are no such numbers.
    """
    given = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")]
    if not all(text.isdecimal() for text in given) or not int(given[0]) < int(given[1]):
        raise UsageError(
            f"RANK={given[0]} and WORLD_SIZE={given[1]} do not give a process and a number of processes",
            hint="start the run with torchrun, or unset both for a run in one process",
            kind="E-RANKS",
        )
    return int(given[0]), int(given[1])


def refuse(command: str) -> None:
    """Raises UsageError under torchrun, for a command that would do the same work in every process."""
    _, size = world()
    if size > 1:
        hint = f"start it without torchrun: quark {command}"
        raise UsageError(f"'{command}' runs in one process, and torchrun started {size}", hint=hint, kind="E-RANKS")


class Ranks(Group):
    """The ranks that torchrun started. Values travel by gloo, tensors in them by way of the CPU.

    device   where tensors that arrive are put
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.device = "cpu"
        super().__init__()

    def work_on(self, device: str) -> None:
        """Takes one GPU of this machine for each rank on it, in turn."""
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count())

    def gather(self, value: Any) -> list[Any]:
        return [self.share(value if rank == self.rank else None, rank) for rank in range(self.size)]

    def share(self, value: Any, owner: int = 0) -> Any:
        import torch
        import torch.distributed as dist

        data = _packed(value) if self.rank == owner else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, owner)
        if self.rank == owner:
            dist.broadcast(data, owner)
            return value
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, owner)
        return _unpacked(data, self.device)

    def pass_on(self, value: Any, source: int, target: int) -> Any:
        import torch
        import torch.distributed as dist

        if self.rank == source:
            data = _packed(value)
            dist.send(torch.tensor([len(data)]), target)
            dist.send(data, target)
            return None
        length = torch.empty(1, dtype=torch.int64)
        dist.recv(length, source)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(data, source)
        return _unpacked(data, self.device)


def _packed(value: Any) -> Any:
    import torch

    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)


def _unpacked(data: Any, device: str) -> Any:
    import torch

    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location=device, weights_only=False)


@contextmanager
def together() -> Iterator[Group]:
    """Joins the processes that torchrun started, until the end of the block. One alone is a `Group`.

    Raises ResourceError when they do not find each other.
    """
    rank, size = world()
    if size == 1:
        yield Group()
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of every connection that ends
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=ARRIVAL))
        dist.barrier()
        # From here on a rank may work for hours without a word; the monitor knows whether it lives.
        _set_timeout(timedelta(days=30))
        store = _store()
    except (RuntimeError, ValueError) as error:
        what = f"the {size} processes cannot reach each other: {first_line(error)}"
        raise ResourceError(
            what, hint="set MASTER_ADDR and MASTER_PORT to the machine of the first process", kind="E-RANKS-LOST"
        ) from error
    monitor = Monitor(store, rank, size)
    ended.begun = True
    try:
        yield Ranks(rank, size)
        dist.barrier()
        monitor.stop()
        dist.barrier()  # nobody asks the store any more, which may go with the first rank
    except BaseException as error:
        monitor.fail(error)
        if isinstance(error, RuntimeError) and "gloo" in str(error):
            raise reason() or ResourceError(
                "another process of this run has ended", hint=_HINT, kind="E-RANKS-LOST"
            ) from error
        raise
    finally:
        monitor.stop()
    dist.destroy_process_group()


def reason() -> QuarkError | None:
    """Returns an error that says which other rank is why this process ends; None: none is."""
    return ResourceError(ended.why, hint=_HINT, kind="E-RANKS-LOST") if ended.why else None


def muted(code: int) -> int | None:
    """Returns the exit code of a rank that ends without a word, since another one says why; None: it says so itself."""
    try:
        rank, _ = world()
    except UsageError:
        return None  # this is the error, and nobody else says it
    if ended.why:
        return ended.code if rank or ended.said else None
    if ended.silent:
        return code
    if rank and code in (ExitCode.TERMINATED, ExitCode.INTERRUPTED):
        return code
    return code if rank and not ended.begun and _first_says_it() else None


def _first_says_it() -> bool:
    """False when the first rank lives on under torchrun, so that the error is this one's alone.

    torchrun ends all processes when one has ended: whoever went at once would take the first rank's word from it. Of
    the ranks of a machine without the first, one speaks before the others.
    """
    if _AGENT not in os.environ or ended.waited:
        return True
    ended.waited = True
    time.sleep(VERDICT if os.environ.get("LOCAL_RANK") == "0" else 2 * VERDICT)
    return False


def _code(error: BaseException) -> int:
    """Returns the exit code that an error leads to."""
    if isinstance(error, QuarkError):
        return int(error.code)
    resources = isinstance(error, OSError) or memory.ran_out(error)
    return int(ExitCode.RESOURCES if resources else ExitCode.INTERNAL)


def _set_timeout(timeout: timedelta) -> None:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timeout, dist.group.WORLD)


def _store() -> Any:
    """Returns a connection of its own to the store that torchrun keeps, so that waiting there stops nobody else."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore("quark", dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30)))


class Monitor:
    """A thread that shows that this rank lives, and ends it soon after another one failed or fell silent.

    The rank that fails says why; the first rank says what all found wrong.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch, all is well."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(BEAT)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this rank ends, unless one of them is why. Notes where another rank says why."""
        self.stop()
        with suppress(Exception):
            user = isinstance(error, QuarkError)
            why = None if user else self._found()
            if why is not None:
                self._note(why)
                return
            said = {"rank": self._rank, "code": _code(error), "what": str(error) or type(error).__name__}
            self._store.set(f"failed/{self._rank}", json.dumps(said))
            self._store.set("failed", json.dumps(said))
            if self._rank:
                ended.silent = user and self._same(str(error))
            else:
                self._wait_until_heard()

    def _wait_until_heard(self) -> None:
        """Gives the others a moment, for the store may go with this process."""
        until = time.monotonic() + VERDICT
        others = [f"heard/{rank}" for rank in range(1, self._size)]
        while not self._store.check(others) and time.monotonic() < until:
            time.sleep(0.05)

    def _found(self) -> dict[str, Any] | None:
        """Returns the failure of another rank; a moment may pass between what this one feels of it and its words."""
        until = time.monotonic() + VERDICT
        while (found := self._failure()) is None and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def _same(self, what: str) -> bool:
        """True when the first rank says the same within a moment."""
        until = time.monotonic() + VERDICT
        while time.monotonic() < until:
            if self._store.check(["failed/0"]):
                self._store.set(f"heard/{self._rank}", "")
                return bool(json.loads(self._store.get("failed/0"))["what"] == what)
            time.sleep(0.05)
        return False

    def _watch(self) -> None:
        seen = dict.fromkeys(range(self._size), (-1, time.monotonic()))
        beat = 0
        while not self._stopped.wait(BEAT / 4):
            try:
                beat += 1
                self._store.set(f"beat/{self._rank}", str(beat))
                why = self._failure() or self._silence(seen)
            except Exception:  # the store has gone with the process that kept it
                why = {"rank": 0, "code": 1, "what": "it connects the processes, and it has ended", "said": False}
            if why is not None and not self._stopped.is_set():
                self._end(why)
                return

    def _failure(self) -> dict[str, Any] | None:
        if not self._store.check(["failed"]):
            return None
        said: dict[str, Any] = json.loads(self._store.get("failed"))
        return said if said["rank"] != self._rank else None

    def _silence(self, seen: dict[int, tuple[int, float]]) -> dict[str, Any] | None:
        now = time.monotonic()
        for rank, (last, since) in seen.items():
            count = int(self._store.get(f"beat/{rank}")) if self._store.check([f"beat/{rank}"]) else -1
            if count != last:
                seen[rank] = count, now
            elif now - since > SILENCE:
                return {"rank": rank, "code": 1, "what": f"it has not answered for {SILENCE:.0f} s", "said": False}
        return None

    def _end(self, why: dict[str, Any]) -> None:
        """Ends this process in order, as a signal would; a thread that waits for the others would never see it."""
        self._note(why)
        os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, why: dict[str, Any]) -> None:
        ended.why = f"process {why['rank']} ended: {why['what']}"
        ended.code, ended.said = why["code"], why.get("said", True)
        with suppress(Exception):
            self._store.set(f"heard/{self._rank}", "")


class Ended:
    """The reason why this process ends, where another rank is it.

    why      empty: none is
    code     exit code of the rank that failed
    said     that rank says why itself
    silent   the first rank says the same error
    begun    the ranks have found each other
    waited   this one has waited for the first rank to speak
    """

    def __init__(self) -> None:
        self.why, self.code, self.said, self.silent, self.begun, self.waited = "", 1, True, False, False, False


ended = Ended()
