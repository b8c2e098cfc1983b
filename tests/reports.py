"""Reports of runs that should have found the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What another run on another machine, or in several processes, has otherwise.
OF_THE_PROCESS = {
    "seconds", "rss_bytes", "peak_rss_bytes", "peak_gpu_bytes", "phases", "started", "ended", "command", "threads",
    "host",
}  # fmt: skip


def lasting(output: Path) -> Any:
    """The report of an output without times, memory and machine."""
    return _without(json.loads((output / "quark" / "report.json").read_text(encoding="utf-8")))


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in OF_THE_PROCESS}
    return [_without(item) for item in value] if isinstance(value, list) else value
