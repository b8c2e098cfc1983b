"""Records the circumstances of a run: command line, versions, host, start and end, phases."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from quarkcli import __version__
from quarkcli.events import Event, Phase
from quarkcli.versions import installed

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "triton")


class Clock:
    """A listener that notes when a run began and how long its phases took.

    ranks   processes that work together
    """

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks
        self.began = time.monotonic()
        self._wall = datetime.now().astimezone()
        self._phases: list[tuple[str, float]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Phase):
            self._phases.append((event.name, time.monotonic()))

    def seconds(self) -> float:
        """Returns the seconds since the run began."""
        return time.monotonic() - self.began

    def facts(self, command: Sequence[str]) -> dict[str, Any]:
        """Returns the JSON form by now. `command`: the command line, empty where there was none."""
        now = time.monotonic()
        ends = [start for _, start in self._phases[1:]] + [now]
        pairs = zip(self._phases, ends, strict=True) if self._phases else ()
        return {
            "command": list(command) or None,
            "started": _stamp(self._wall),
            "ended": _stamp(datetime.now().astimezone()),
            "phases": [{"name": name, "seconds": round(end - start, 3)} for (name, start), end in pairs],
            "versions": versions(),
            "host": host() | {"ranks": self.ranks},
        }


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Returns the versions of quark, Python and what numbers depend on."""
    found = {name: version for name in PACKAGES if (version := installed(name)) is not None}
    return {"quark": __version__, "python": platform.python_version(), **found}


def host() -> dict[str, Any]:
    """Returns what the machine is."""
    try:
        memory: int | None = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = None
    system = f"{platform.system()} {platform.release()}"
    return {"name": platform.node(), "system": system, "cores": os.cpu_count(), "memory_bytes": memory}
