"""Compares decoded weights with those of the source: signal to noise, worst first. Reads both with torch."""

from __future__ import annotations

from collections.abc import Sequence

from quarkcli.disk import exchanged
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.compare import Row, compare, decibels
from quarkcli.disk.outputs import MANIFEST, REPORT
from quarkcli.disk.rewritten import homes, said_changed
from quarkcli.errors import CheckError, some
from quarkcli.events import Listener, silent

_SHOWN = 5
# Below it, noise is as large as the signal: codes or scales are read wrong, or are another weight's.
BROKEN = 1.0
_UNSAID = f"and there is no {REPORT} that tells the work of an algorithm from damage"


def check(
    checkpoint: Checkpoint, original: Checkpoint, least: float | None = None, tell: Listener = silent
) -> list[str]:
    """Returns lines about kept tensors, and about the worst weights. Raises CheckError.

    Without `least` and without a manifest, whose hashes tell damage, weights are also looked at closely
    (`disk.nearest`).

    Kept tensors are those of the source, byte for byte, unless an algorithm changed them. Weights must reach `least`
    dB; by default 1, and then those that an algorithm rewrote are left out.
    """
    quantized = {f"{name}.weight" for name in checkpoint.view.targets}
    quantized |= {f"{name}.bias" for name, stored in checkpoint.view.targets.items() if stored.bias is not None}
    hashed = (checkpoint.source.folder / MANIFEST).is_file()
    found = compare(checkpoint, original, tell, closely=least is None and not hashed)
    said = said_changed(checkpoint.source)
    other = [row.name for row in found.rows if row.name not in quantized and not row.identical]
    home = homes(original) if said else {}
    if said is not None and (wrong := [name for name in other if name not in said and home.get(name) not in said]):
        raise CheckError(
            f"{len(wrong)} kept tensors have other values than in the original model: {some(wrong)}",
            kind="E-CHECK-VALUES",
        )
    if other and said is None:
        exchanged.check(checkpoint, original, other)
    lines = ["kept tensors have the values of the original model"]
    if other:
        why = "because an algorithm rewrote them" if said is not None else _UNSAID
        lines = [f"{len(other)} kept tensors have other values, {why}: {some(other)}"]
    rows = [row for row in found.rows if row.name in quantized]
    if least is None and other and said is None:
        return [
            *lines,
            "weights were not compared: an algorithm seems to have rewritten them; --min-sqnr compares them anyway",
        ]
    left = said if said is not None and least is None else set()
    compared = [row for row in rows if row.name not in left and home.get(row.name) not in left]
    return lines + _ranked(compared, least, len(rows))


def _ranked(rows: Sequence[Row], least: float | None, count: int) -> list[str]:
    """Returns a line about the worst of `count` weights, those first. Raises CheckError for those below the limit."""
    more = f"; {count - len(rows)} rewritten ones not compared" if count > len(rows) else ""
    if not rows:
        return [f"signal-to-noise ratio compared for no weight{more}"]
    limit = BROKEN if least is None else least
    bad = [f"{row.name} ({decibels(row.sqnr)})" for row in rows if row.sqnr < limit]
    if bad:
        hint = "check that codes and scales are right and belong to these weights" if least is None else ""
        what = f"{len(bad)} weights have less than {limit:g} dB signal-to-noise ratio against the original model"
        raise CheckError(f"{what}: {some(bad)}", hint=hint, kind="E-CHECK-VALUES")
    damaged = [f"{row.name}: {row.damage}" for row in rows if row.damage]
    if damaged:
        hint = f"write the checkpoint again; use --min-sqnr {BROKEN:g} where an algorithm rewrote these weights alone"
        what = f"{len(damaged)} weights have damaged codes or scales: {some(damaged)}"
        raise CheckError(what, hint=hint, kind="E-CHECK-VALUES")
    shown = ", ".join(f"{row.name} {decibels(row.sqnr)}" for row in rows[:_SHOWN])
    middle = decibels(rows[len(rows) // 2].sqnr)
    return [f"signal-to-noise ratio of {len(rows)} weights: median {middle}; worst: {shown}{more}"]
