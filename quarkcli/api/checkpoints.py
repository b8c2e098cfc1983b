"""Models and written checkpoints from Python.

import quarkcli
found = quarkcli.compare("demo", "out")
worst = found["tensors"][0]["sqnr_db"]
quarkcli.convert("out", "quark", "out-quark")
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from quarkcli.api.results import Report
from quarkcli.disk import compare as comparing
from quarkcli.disk import verify as checks
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.nonfinite import OnNonfinite
from quarkcli.disk.source import Source
from quarkcli.events import Listener, silent
from quarkcli.job import convert as converting
from quarkcli.job import inspecting
from quarkcli.job import run as job
from quarkcli.plan.fused import Servers
from quarkcli.reporting import reading

VERIFIED = "quark/verify/1"


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


def inspect(
    model: str | PathLike[str],
    *,
    revision: str = "main",
    offline: bool = False,
    allow_pickle: bool = False,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Returns what `quark inspect --json` shows: architecture, parts, roles, dtypes, experts, quantization.

    model      directory, hub id, or "demo"; config and headers are read, no weights
    listener   called with every event

    Raises QuarkError for what is no model.
    """
    source = Source.open(
        job.located(str(model)), revision=revision, offline=offline, bare=True, allow_pickle=allow_pickle, tell=listener
    )
    return inspecting.facts(source)


def verify(
    directory: str | PathLike[str],
    *,
    source: str | PathLike[str] | None = None,
    target: Servers = "auto",
    tp: Sequence[int] = (),
    min_sqnr: float | None = None,
    on_nonfinite: OnNonfinite = "stop",
    hashes: bool | None = None,
    allow_pickle: bool = False,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Checks a written checkpoint and returns what `quark verify --json` shows.

    source     the model it was made from; None: the checkpoint is checked alone
    target     a server that must load it
    tp         numbers of devices by which servers must be able to split it
    min_sqnr   least ratio of signal to noise of a decoded weight, in dB; with a source
    hashes     whether all files are read to compare their hashes; None: up to 20 GB

    Raises CheckError for everything that is wrong, at once.
    """
    origin = None if source is None else job.located(str(source))
    asked = checks.Asked(origin, target, on_nonfinite, hashes, tuple(tp), min_sqnr, allow_pickle)
    found = checks.check(str(directory), asked, listener)
    said = None if source is None else str(source)
    return {"schema": VERIFIED, "directory": str(directory), "source": said, "ok": True, "checks": found}


def report(directory: str | PathLike[str]) -> Report:
    """Returns the report of a finished run, as `quark report DIR --json` shows it.

    Raises AccessError where there is no directory, ModelError where it has no report.
    """
    return Report(reading.read(Path(directory)))
