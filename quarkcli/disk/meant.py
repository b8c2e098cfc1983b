"""Says what may have been meant by a folder that holds no config.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quarkcli.disk import outputs
from quarkcli.errors import some

_ADAPTER = "adapter_config.json"  # of peft


def hint(folder: Path) -> str:
    """Returns what to give in the place of a folder: a model below it, or a merged one; "" if unknown."""
    if found := outputs.hint(folder):
        return found
    if (folder / _ADAPTER).is_file():
        return "merge the adapter first (merge_and_unload of peft, then save_pretrained) and give the result"
    below = sorted(_models(folder))
    return f"give the folder of the model: {some(below, 3)}" if below else ""


def _models(folder: Path) -> Iterator[Path]:
    """Yields folders below one that hold a config.json: of a training run, an archive, the cache of the hub."""
    for pattern in ("*/config.json", "snapshots/*/config.json"):
        yield from (path.parent for path in folder.glob(pattern))
