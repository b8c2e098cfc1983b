"""Shows a running job at a terminal or in a log: a bar, lines, JSON lines or nothing.

Nothing is silent for longer than `SILENCE`: a thread says what is still being done.
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType
from typing import Any, Literal

from quarkcli.cli import github, output, tables
from quarkcli.events import Event, Level, Message, PartDone, Phase, Working
from quarkcli.reporting import log
from quarkcli.reporting.alike import Alike

Mode = Literal["auto", "bar", "lines", "none"]
SILENCE = 8.0  # seconds without a line


class Progress:
    """A listener for stderr, and a context that ends the bar. Format and least level are those of `output.session`.

    Of messages that may be many and are alike the first is shown; at the end, how many there were.

    mode    auto: a bar on a terminal outside CI, else a line per part
    """

    def __init__(self, mode: Mode = "auto") -> None:
        self.mode = _resolve(mode)
        self._alike = Alike()
        self._in_group = False
        self._bar: Any = None
        self._task: Any = None
        self._doing = "working"
        self._since = self._spoke = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Progress:
        self._heartbeat.start()
        if self.mode == "bar" and output.session.format == "text" and output.shows("info"):
            self._start_bar()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._end_group()
        for text in self._alike.counted():
            output.warning(text)

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._note(event)
            event = self._folded(event)
            self._show(event, _level(event))

    def _folded(self, event: Event) -> Event:
        """Returns a warning like one that was shown as a message for `--log-level debug`."""
        if not isinstance(event, Message) or not event.many or self._alike.is_new(event.text):
            return event
        return Message(event.text, "debug")

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
                    self._show(Working(f"{self._doing} ({log.duration(now - self._since)})"), "info")

    def _show(self, event: Event, level: Level) -> None:
        if self._bar is not None:
            self._on_bar(event, level)
        elif isinstance(event, Message):
            output.tell(event)
        elif self.mode == "none":
            return
        elif output.session.format == "json":
            output.event(_KINDS[type(event)], {"time": round(time.time(), 3), **vars(event)}, level)
        elif output.session.format == "github" and isinstance(event, Phase):
            self._begin_group(event.name)
        else:
            output.say(event.what if isinstance(event, Working) and level == "debug" else log.line(event), level)

    def _begin_group(self, name: str) -> None:
        self._end_group()
        if output.shows("info"):
            self._in_group = True
            output.note(github.command("group", name))

    def _end_group(self) -> None:
        if self._in_group:
            self._in_group = False
            output.note(github.command("endgroup"))

    def _start_bar(self) -> None:
        from quarkcli.cli import bar

        self._bar, self._task = bar.started(output.has_colour("stderr"))

    def _on_bar(self, event: Event, level: Level) -> None:
        match event:
            case Message():
                if event.always or output.shows(level):
                    for text in tables.wrapped(output.shown(log.line(event)), self._bar.console.width):
                        self._bar.console.print(text, markup=False, soft_wrap=True)
            case Phase(name) | Working(name):
                self._bar.update(self._task, description=output.shown(name))
            case PartDone():
                text = log.progress_line(event).partition("] ")[2].partition(" eta=")[0]
                self._bar.update(
                    self._task, total=event.total, completed=event.index, description=output.shown(text),
                    eta=log.duration(event.eta),
                )  # fmt: skip


_KINDS: dict[type, str] = {Phase: "phase", PartDone: "part", Working: "working"}


def _level(event: Event) -> Level:
    """Returns the level of an event; what is told often is for `debug`."""
    if isinstance(event, Message):
        return event.level
    return "debug" if isinstance(event, Working) else "info"


def _resolve(mode: Mode) -> Mode:
    if mode != "auto":
        return mode
    return "bar" if output.is_terminal("stderr") and not os.environ.get("CI") else "lines"
