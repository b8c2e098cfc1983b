"""The embedded model, which people call `demo`: where it lies says nothing, and is shown nowhere."""

from __future__ import annotations

from pathlib import Path

from quarkcli.disk.source import Source

DEMO = "demo"
EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "tiny-llama"


def located(model: str) -> str:
    """Returns the directory of the embedded model for `demo`, else what was given: a directory or hub id."""
    return str(EMBEDDED) if model == DEMO else model


def place(source: Source) -> str:
    """Returns what a user gives to mean this model: `demo`, a hub id or a directory."""
    return DEMO if source.folder == EMBEDDED else source.hub_id or str(source.folder)


def called(given: str) -> str:
    """Returns what a user gave for a directory or hub id: `demo` for the directory of the embedded model."""
    return DEMO if given == str(EMBEDDED) else given
