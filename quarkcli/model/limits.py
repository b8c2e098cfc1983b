"""Runs foreign code that is only text, such as a chat template, in a child process with limits of time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# A template takes a millisecond; this is for a machine that is busy with other things.
SECONDS = 5.0
MEMORY = 2**30  # bytes beyond what the process has


class OutOfBounds(Exception):
    """The call took too long, or too much memory."""


class Bounded:
    """A function whose calls run in a forked child, one after the other; the first call starts it.

    A child that was not heard to the end is left: what it still says answers no later call. A process that was forked
    from the owner's starts a child of its own.

    Raises OutOfBounds, and what the function itself raised as a RuntimeError with the same text.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._pipe: Connection | None = None
        self._owner = os.getpid()
        self._leave: Callable[[], object] = lambda: None

    def __call__(self, *arguments: Any) -> Any:
        if self._pipe is None or self._owner != os.getpid():
            self._start()
        pipe, self._pipe = self._pipe, None
        assert pipe is not None
        try:
            pipe.send(arguments)
            if not pipe.poll(SECONDS):
                raise OutOfBounds(f"it takes more than {SECONDS:g} s")
            good, answer = pipe.recv()
        except (EOFError, OSError) as error:  # the child was killed: by the system, for want of memory
            raise OutOfBounds("it takes too much memory") from error
        except BaseException:
            self._leave()
            raise
        self._pipe = pipe
        if good is None:
            raise OutOfBounds(answer)
        if not good:
            raise RuntimeError(answer)
        return answer

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        child = context.Process(target=_serve, args=(self._function, theirs, self._pipe), daemon=True)
        child.start()
        theirs.close()
        self._owner = os.getpid()
        self._leave = weakref.finalize(self, _end, child, self._owner)


def _end(child: Any, owner: int) -> None:
    """Kills a child of this process."""
    if owner == os.getpid():
        child.kill()
        child.join()


def _serve(function: Callable[..., Any], pipe: Connection, other: Connection) -> None:
    """Answers until the other end is closed: (True, answer), (False, error), (None, what was too much)."""
    other.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    _limit_memory()
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[bool | None, Any] = (True, function(*arguments))
        except MemoryError:
            answer = (None, f"it takes more than {MEMORY >> 20} MiB")
        except Exception as error:
            answer = (False, str(error))
        pipe.send(answer)


def _limit_memory() -> None:
    with open("/proc/self/statm", "rb") as stream:  # noqa: PTH123 - no path object in a child
        used = int(stream.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
