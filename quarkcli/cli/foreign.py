"""Catches what libraries print where a program reads stderr, and makes events of level debug of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from quarkcli.cli import output

_PATIENCE = 0.5  # seconds for the last lines, which a process of a library may hold back


@contextmanager
def apart() -> Iterator[None]:
    """Collects what is written to descriptor 2, by Python or any library; our own lines go where it led before.

    A child that outlives the block writes into a pipe that nobody reads.
    """
    own = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    heard, told = os.pipe()
    os.dup2(told, 2)
    os.close(told)
    output.session.stderr = own
    reader = threading.Thread(target=_read, args=(heard,), name="foreign lines", daemon=True)
    reader.start()
    try:
        yield
    finally:
        os.dup2(own.fileno(), 2)  # the pipe's last end closes
        reader.join(_PATIENCE)
        output.session.stderr = None


def _read(heard: int) -> None:
    with os.fdopen(heard, encoding="utf-8", errors="backslashreplace") as lines:
        for line in lines:
            if text := line.strip():
                output.event("library", {"text": text}, "debug")
