"""Says what may have been meant by a folder that holds no config.json, or that is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from quarkcli.disk import outputs
from quarkcli.disk.writer import STATE
from quarkcli.errors import some

_UNFINISHED = "run the same command again to finish the run"
_ADAPTER = "adapter_config.json"  # of peft


def hint(folder: Path) -> str:
    """Returns what to give in the place of a folder: a model below it, or a merged one; "" if unknown."""
    if found := outputs.hint(folder):
        return found
    if (folder / STATE).is_dir():
        return f"{_UNFINISHED} in this folder"
    if (folder / _ADAPTER).is_file():
        return "merge the adapter first (merge_and_unload of peft, then save_pretrained) and give the result"
    below = sorted(_models(folder))
    return f"give the folder of the model: {some(below, 3)}" if below else ""


def missing(folder: Path) -> str:
    """Returns what to do about a folder that is not there; "" unless a run that was stopped would have made it."""
    partial = outputs.beside(folder)
    begun = os.path.isdir(f"{partial}/{STATE}")  # noqa: PTH112 - does not raise for a name that is too long
    return f"{_UNFINISHED} in {partial}" if begun else ""


def _models(folder: Path) -> Iterator[Path]:
    """Yields folders below one that hold a config.json: of a training run, an archive, the cache of the hub."""
    for pattern in ("*/config.json", "snapshots/*/config.json"):
        yield from (path.parent for path in folder.glob(pattern))
