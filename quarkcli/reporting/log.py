"""Writes the log file: each event is a line. It keeps events until the output exists."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from quarkcli.disk.writer import disk_errors
from quarkcli.errors import QuarkError, ResourceError
from quarkcli.events import Event, Measure, Message, PartDone, Phase, Working

_MEASURES: dict[Measure, str] = {"output": "output-error", "weight": "weight-error", "drift": "drift"}


def progress_line(event: PartDone) -> str:
    """Returns `[12/80] layers.11 nvfp4+awq 38.2s output-error=3.1e-03 rss=9.8G gpu=14.2G eta=46m`."""
    error = f" {_MEASURES[event.measure]}={event.error:.1e}" if event.error is not None else ""
    gpu = f" gpu={event.gpu / 1e9:.1f}G" if event.gpu else ""
    return (
        f"[{event.index}/{event.total}] {event.name} {event.label} {event.seconds:.1f}s{error} "
        f"rss={event.rss / 1e9:.1f}G{gpu} eta={duration(event.eta)}"
    )


def duration(seconds: float) -> str:
    """Returns `46m`, `12s`, `1h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def line(event: Event) -> str:
    """Returns one event as text."""
    match event:
        case Message(text, level):
            return f"{level}: {text}" if level != "info" else text
        case Phase(name):
            return f"phase: {name}"
        case PartDone():
            return progress_line(event)
        case Working(what):
            return f"still {what}"


class LogFile:
    """A listener that writes `quark.log`."""

    def __init__(self) -> None:
        self._early: list[str] = []
        self._streams: list[tuple[Path, TextIO]] = []
        self._forgiving = False

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Working):
            self._write(line(event))

    @contextmanager
    def last_words(self) -> Iterator[None]:
        """Notes the error that ended a run."""
        try:
            yield
        except BaseException as error:
            self._error(error)
            raise

    def _error(self, error: BaseException) -> None:
        """Writes one line, and a traceback for an error that is not the user's.

        The disk may be full: the error itself counts.
        """
        self.forgive()
        self._write(f"error: {error}" if str(error) else f"ended by {type(error).__name__}")
        if not isinstance(error, QuarkError | KeyboardInterrupt):
            self._write("".join(traceback.format_exception(error)).rstrip())

    def _write(self, text: str) -> None:
        stamped = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}"
        if not self._streams:
            self._early.append(stamped)
        for path, stream in self._streams:
            try:
                with disk_errors(path, len(stamped)):
                    stream.write(stamped + "\n")
                    stream.flush()
            except ResourceError:
                if not self._forgiving:
                    raise

    def forgive(self) -> None:
        """Lets the run go on from here when the log cannot be written."""
        self._forgiving = True

    @contextmanager
    def attach(self, *paths: Path) -> Iterator[None]:
        """Writes to all of `paths`, appending to what an interrupted run left."""
        early, self._early = self._early, []
        try:
            for path in paths:
                with disk_errors(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    stream: TextIO = path.open("a", encoding="utf-8", errors="backslashreplace")
                    self._streams.append((path, stream))
                    stream.writelines(text + "\n" for text in early)
                    stream.flush()
            yield
        finally:
            streams, self._streams = self._streams, []
            for _, stream in streams:
                with suppress(OSError):  # what is still in its buffer could not be written before
                    stream.close()
