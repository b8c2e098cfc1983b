"""Written checkpoints from Python.

import quarkcli
found = quarkcli.compare("demo", "out")
worst = found["tensors"][0]["sqnr_db"]
quarkcli.convert("out", "quark", "out-quark")
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from quarkcli.disk import compare as comparing
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.events import Listener, silent
from quarkcli.job import convert as converting
from quarkcli.job import run as job


def compare(a: str | PathLike[str], b: str | PathLike[str], listener: Listener = silent) -> dict[str, Any]:
    """Compares two checkpoints tensor by tensor and returns what `quark compare --json` shows, worst first.

    a, b      directory, hub id, or "demo" for the embedded model; quantized in any dialect that is read, or not
    listener  called with every event

    Raises QuarkError for what is no checkpoint, or quantized in a way that is not read.
    """
    first, second = (Checkpoint(Source.open(job.located(str(name)))) for name in (a, b))
    return comparing.compare(first, second, listener).as_dict()


def convert(
    directory: str | PathLike[str],
    to: str,
    output: str | PathLike[str],
    *,
    overwrite: bool = False,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Writes a quantized checkpoint in another dialect and returns what `quark convert --json` shows.

    to         a dialect's name
    output     directory; one that exists is an error unless `overwrite`
    listener   called with every event

    Codes and scales stay as they are. Raises ModelError, with the tensor, where the dialect cannot hold them.
    """
    source = Source.open(str(directory))
    return converting.convert(source, to, Path(output), overwrite=overwrite, tell=listener)
