"""Finds weights that an algorithm rewrote before they were quantized: the model computes the same, they do not."""

from __future__ import annotations

import json
from collections.abc import Iterable

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.outputs import REPORT
from quarkcli.disk.source import Source


def said_changed(source: Source) -> set[str] | None:
    """Returns the source tensors that algorithms changed, as the report says; None without a report."""
    try:
        changed = json.loads((source.folder / REPORT).read_bytes())["changed"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return set(changed) if isinstance(changed, dict) else None


def homes(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the file tensor that each weight lies in; experts may share one."""
    return {f"{weight.name}.weight": weight.view.tensor for weight in checkpoint.layout.weights.values()}


def among(names: Iterable[str], a: Checkpoint, b: Checkpoint) -> list[str]:
    """Returns those of some tensors that an algorithm changed in either checkpoint."""
    changed = (said_changed(a.source) or set()) | (said_changed(b.source) or set())
    home = homes(a) | homes(b) if changed else {}
    return [name for name in names if name in changed or home.get(name) in changed]
