"""Shows a running job to the person or the log collector at the terminal: a bar, lines, JSON lines or nothing.

Nothing is silent for longer than `SILENCE`: a thread says what is still being done.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, Literal

from quarkcli.cli import output
from quarkcli.events import Event, Level, Message, PartDone, Phase, Working
from quarkcli.report import log

Mode = Literal["auto", "bar", "lines", "none"]
SILENCE = 9.0  # seconds without a line
_RANK: dict[Level, int] = {"debug": 0, "info": 1, "warning": 2}


class Progress:
    """A listener for stderr, and a context that ends the bar.

    mode    auto: a bar on a terminal outside CI, else a line per part
    level   messages below it are not shown
    json    every event as one JSON object per line instead
    """

    def __init__(self, mode: Mode = "auto", level: Level = "info", json: bool = False) -> None:
        self.level = level
        self.json = json
        self.mode = _resolve(mode)
        self._bar: Any = None
        self._task: Any = None
        self._doing = "working"
        self._since = self._spoke = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Progress:
        self._heartbeat.start()
        if self.mode == "bar" and not self.json and not output.session.quiet:
            self._start_bar()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Message) and _RANK[event.level] < _RANK[self.level]:
            return
        with self._lock:
            self._note(event)
            if not isinstance(event, Working) or self._bar is not None:
                self._show(event)

    def _note(self, event: Event) -> None:
        """Remembers the current work, and the time of the last line."""
        now = time.monotonic()
        if isinstance(event, Working | Phase):
            what = event.what if isinstance(event, Working) else f"in phase {event.name}"
            self._since = self._since if what == self._doing else now
            self._doing = what
        if not isinstance(event, Working):
            self._spoke = now

    def _beat(self) -> None:
        """Says what is still being done whenever nothing was said for `SILENCE` seconds."""
        while not self._ended.wait(SILENCE / 9):
            with self._lock:
                now = time.monotonic()
                if now - self._spoke >= SILENCE and self._bar is None and not self._ended.is_set():
                    self._spoke = now
                    self._show(Working(f"{self._doing} ({log.duration(now - self._since)})"))

    def _show(self, event: Event) -> None:
        if isinstance(event, Message) and event.always and output.session.quiet and not self.json:
            output.raw(log.line(event))
        elif self.json:
            output.event(_KINDS[type(event)], {"time": round(time.time(), 3), **vars(event)})
        elif self._bar is not None:
            self._on_bar(event)
        elif isinstance(event, Message) or self.mode != "none":
            output.note(log.line(event))

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(
            file=sys.stderr, force_terminal=True, highlight=False, no_color=not output.has_colour("stderr")
        )
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._bar = Bar(*columns, console=console, transient=True)
        self._task = self._bar.add_task("resolve", total=None)
        self._bar.start()

    def _on_bar(self, event: Event) -> None:
        match event:
            case Message():
                self._bar.console.print(output.shown(log.line(event)), markup=False, soft_wrap=True)
            case Phase(name) | Working(name):
                self._bar.update(self._task, description=output.shown(name))
            case PartDone():
                text = log.progress_line(event).partition("] ")[2]
                self._bar.update(self._task, total=event.total, completed=event.index, description=output.shown(text))


_KINDS: dict[type, str] = {Message: "message", Phase: "phase", PartDone: "part", Working: "working"}


def _resolve(mode: Mode) -> Mode:
    if mode != "auto":
        return mode
    return "bar" if output.is_terminal("stderr") and not os.environ.get("CI") else "lines"
