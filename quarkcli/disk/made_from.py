"""Opens the model that a checkpoint was made from. A branch of the hub moves on, so its commit decides."""

from __future__ import annotations

import os
from pathlib import Path

from quarkcli.disk import manifest
from quarkcli.disk.source import Source
from quarkcli.events import Listener, Message, silent


def open_original(
    model: str, checkpoint: str | Path, *, offline: bool = False, allow_pickle: bool = False, tell: Listener = silent
) -> Source:
    """Opens a directory or hub id; a hub id at the commit that the checkpoint's manifest names for it, else at main.

    Raises as `Source.open` does.
    """
    commit = _commit(model, Path(os.path.expanduser(checkpoint)))  # noqa: PTH111 - never raises
    if commit is None or os.path.isdir(model):  # noqa: PTH112 - never raises
        return Source.open(model, offline=offline, allow_pickle=allow_pickle)
    tell(Message(f"{model}: taking commit {commit[:12]}, from which {checkpoint} was made"))
    return Source.open(model, revision=commit, offline=offline, allow_pickle=allow_pickle)


def _commit(model: str, checkpoint: Path) -> str | None:
    """Returns the commit of a hub model from which a checkpoint was made; None where its manifest does not say it."""
    made_from = manifest.made_from(checkpoint)
    commit = made_from.get("commit") if made_from.get("hub_id") == model else None
    return commit if isinstance(commit, str) and commit else None
