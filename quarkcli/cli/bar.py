"""Draws the bar of a running job: one line for any terminal, count and time before names. Needs Rich."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from quarkcli.cli import tables
from quarkcli.reporting import log

if TYPE_CHECKING:
    from rich.progress import Progress, Task

_BAR, _LEAST = 24, 6  # columns of the bar, and those below which it is left out


def started(colour: bool) -> tuple[Progress, Any]:
    """Returns a bar on stderr, begun, and its only task."""
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn
    from rich.text import Text

    console = Console(file=sys.stderr, force_terminal=True, highlight=False, no_color=not colour)
    marks = ("━", "─") if console.encoding.startswith("utf") else ("#", "-")

    class Line(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(line(task, console.width, marks), no_wrap=True, overflow="ignore")

    bar = Progress(Line(), console=console, transient=True)
    task = bar.add_task("resolve", total=None, eta="")
    bar.start()
    return bar, task


def line(task: Task, width: int, marks: tuple[str, str]) -> str:
    """Returns count, time, what is left, a bar, and as many words of the description as fit."""
    count = f"{task.completed:.0f}/{task.total:.0f} " if task.total else ""
    head = f"{count}{log.duration(task.elapsed or 0)}"
    head += f" eta {task.fields['eta']}" if task.fields["eta"] else ""
    words = task.description.split()
    room = min(_BAR, (width - len(head)) // 3)
    bar = _filled(task, room, marks) if task.total and room >= _LEAST else ""
    lead = "  ".join(filter(None, (head, bar)))
    rest = width - len(lead) - 2
    shown = tables.fold(" ".join(words), rest)[0] if words and rest >= len(words[0]) else ""
    return "  ".join(filter(None, (lead, shown)))


def _filled(task: Task, room: int, marks: tuple[str, str]) -> str:
    done = round(room * task.completed / (task.total or 1))
    return marks[0] * done + marks[1] * (room - done)
