"""Inspects models, and checks, compares, converts and reports checkpoints, from Python.

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

from quarkcli.api.apart import apart
from quarkcli.api.checked import checked
from quarkcli.api.results import Report
from quarkcli.disk import compare as comparing
from quarkcli.disk import pickles
from quarkcli.disk import verify as checks
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import located
from quarkcli.disk.made_from import open_original
from quarkcli.disk.nonfinite import OnNonfinite
from quarkcli.disk.source import Source
from quarkcli.disk.writer import output_state
from quarkcli.errors import CheckError
from quarkcli.events import Listener, Message, silent
from quarkcli.job import convert as converting
from quarkcli.job import idle, inspecting
from quarkcli.plan.fused import Servers
from quarkcli.reporting import reading

VERIFIED, CONVERTED = "quark/verify/1", "quark/convert/1"


@checked
def compare(
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    min_sqnr: float | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Compares two checkpoints tensor by tensor and returns what `quark compare --json` shows, worst first.

    a, b      directory, hub id, or "demo" for the embedded model; quantized in a dialect that quark reads, or not
    min_sqnr  least ratio of signal to noise of each tensor, in dB
    listener  called with each event

    Raises CheckError if a tensor is below `min_sqnr`; its `result` has the comparison. Raises QuarkError if a directory
    holds no checkpoint, or one that quark cannot read.
    """
    with apart():
        found = compared(a, b, offline=offline, allow_pickle=allow_pickle, listener=listener)
    return comparing.check(found, min_sqnr)


def compared(
    a: str | PathLike[str], b: str | PathLike[str], *, offline: bool, allow_pickle: bool, listener: Listener
) -> comparing.Comparison:
    """Returns what `compare` and the command of that name show, not yet judged."""
    names = located(str(a)), located(str(b))
    sources = [
        open_original(name, other, offline=offline, allow_pickle=allow_pickle, tell=listener)
        for name, other in (names, names[::-1])
    ]
    _tell_unused_pickle(sources, allow_pickle, listener)
    first, second = map(Checkpoint, sources)
    found = comparing.compare(first, second, listener)
    found.a, found.b = str(a), str(b)
    return found


def _tell_unused_pickle(sources: Sequence[Source], allowed: bool, listener: Listener) -> None:
    if allowed and not any(source.pickled for source in sources):
        listener(Message(pickles.UNUSED, "warning"))


@checked
def convert(
    directory: str | PathLike[str],
    to: str,
    output: str | PathLike[str],
    *,
    overwrite: bool = False,
    threads: int | None = None,
    allow_pickle: bool = False,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Writes a quantized checkpoint in another dialect and returns what `quark convert --json` shows.

    to         name of the new dialect
    output     directory, which must not exist unless `overwrite` is true
    threads    number of weights that are packed at once; None: one for each core
    listener   called with each event

    Codes and scales stay as they are; a scale of a whole tensor may differ in its last bit, where one of the dialects
    stores the inverse. Raises ModelError, with the tensor, if the dialect cannot hold them.
    """
    if overwrite and output_state(Path(output)) in ("absent", "empty"):
        listener(Message(f"--overwrite is not used: there is nothing in {output}", "warning"))
    source = Source.open(str(directory), allow_pickle=allow_pickle, local=True)
    _tell_unused_pickle([source], allow_pickle, listener)
    with apart():
        found = converting.convert(source, to, Path(output), overwrite=overwrite, tell=listener, threads=threads)
    return {"schema": CONVERTED, **found}


@checked
def inspect(
    model: str | PathLike[str],
    *,
    revision: str = "main",
    offline: bool = False,
    allow_pickle: bool = False,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Returns what `quark inspect --json` shows: architecture, parts, roles, dtypes, experts, quantization.

    model      directory, hub id, or "demo"; only config and headers are read
    listener   called with each event

    Raises QuarkError if there is no model.
    """
    source = Source.open(
        located(str(model)), revision=revision, offline=offline, bare=True, allow_pickle=allow_pickle, tell=listener
    )
    for line in idle.of_model(source, revision=revision, allow_pickle=allow_pickle):
        listener(Message(line, "warning"))
    found = inspecting.facts(source)
    if found["quantization"] is None and (codes := inspecting.codes(source)):
        listener(Message(codes, "warning"))
    return found


@checked
def verify(
    directory: str | PathLike[str],
    *,
    source: str | PathLike[str] | None = None,
    target: Servers = "auto",
    tp: Sequence[int] = (),
    min_sqnr: float | None = None,
    on_nonfinite: OnNonfinite = "stop",
    hashes: bool | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Checks a written checkpoint and returns what `quark verify --json` shows.

    source     model that the checkpoint was made from; None: nothing is compared with a source
    target     server that must load it
    tp         numbers of devices over which servers must be able to split it
    min_sqnr   least ratio of signal to noise of a decoded weight, in dB; needs a source
    hashes     whether the hashes of all files are compared; None: of up to 20 GB

    Raises one CheckError for all that is wrong; its `result` has the checks that passed and the problems.
    """
    origin = None if source is None else located(str(source))
    asked = checks.Asked(origin, target, on_nonfinite, hashes, tuple(tp), min_sqnr, allow_pickle, offline)
    said = None if source is None else str(source)
    about = {"schema": VERIFIED, "ok": True, "directory": str(directory), "source": said}
    try:
        with apart():
            found = checks.check(str(directory), asked, listener)
    except CheckError as error:
        error.result = {**about, "ok": False, **(error.result or {})}
        raise
    return {**about, "checks": found, "problems": []}


@checked
def report(directory: str | PathLike[str]) -> Report:
    """Returns the report of a finished run, as `quark report DIR --json` shows it.

    Raises AccessError if there is no directory, ModelError if it has no report.
    """
    return Report(reading.read(Path(directory)))
