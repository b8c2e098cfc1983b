"""Shows the progress of a run in a notebook, in one place that changes."""

from __future__ import annotations

import importlib
import time
from html import escape
from typing import Any

from quarkcli.errors import UsageError
from quarkcli.events import Event, Message, PartDone, Phase, Working
from quarkcli.reporting import log

_OFTEN = 0.2  # seconds between two pictures
_LATEST = 5  # messages that stay in sight


class NotebookProgress:
    """A listener for Jupyter: `quarkcli.quantize(..., listener=quarkcli.NotebookProgress())`.

    It shows what is done, what is being done, the time left, and the last warnings. Raises UsageError without
    IPython.
    """

    def __init__(self) -> None:
        try:
            shown: Any = importlib.import_module("IPython.display")
        except ImportError:
            hint = "use listener=print, which prints a line for every event"
            raise UsageError(
                "this listener works only in notebooks, and IPython is not installed", hint=hint, kind="E-PYTHON-CALL"
            ) from None
        self._html = shown.HTML
        self._place = shown.display(self._html("starting"), display_id=True)
        self._done, self._total = 0, 0
        self._doing, self._last = "starting", ""
        self._messages: list[str] = []
        self._drawn = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case Message(text, level):
                if level == "warning":
                    self._messages = [*self._messages, text][-_LATEST:]
            case PartDone():
                self._done, self._total, self._last = event.index, event.total, log.progress_line(event)
            case Phase(name):
                self._doing = name
            case Working(what):
                self._doing = what
        if isinstance(event, PartDone | Phase | Message) or time.monotonic() - self._drawn > _OFTEN:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if self._place is None:  # IPython without a front end
            return
        bar = f"<progress value='{self._done}' max='{self._total or 1}'></progress> {self._done}/{self._total or '?'}"
        lines = [f"{bar} {escape(self._doing)}", escape(self._last), *(f"&#9888; {escape(m)}" for m in self._messages)]
        self._place.update(self._html("<br>".join(filter(None, lines))))
