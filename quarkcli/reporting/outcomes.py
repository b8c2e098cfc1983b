"""Sums up what solvers reached: loss against rounding to nearest, their choices, and where they fell back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def outcomes(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a summary by solver, and the outcome of every weight.

    share       objective of the result over that of rounding to nearest with the same scales, geometric mean over
                weights, on the tokens that were fitted to; `held_out_share`: on those held out, None without any
    damp        how many weights took which damping; `strength` likewise
    nearest     weights that were rounded to nearest, since that loses less on held-out tokens
    """
    weights: dict[str, dict[str, Any]] = {k: v for record in records for k, v in record["outcomes"].items()}
    solvers: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, found in weights.items():
        solvers.setdefault(found["solver"], []).append((name, found))
    return {"solvers": {name: _summary(rows) for name, rows in sorted(solvers.items())}, "weights": weights}


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Returns a sentence per solver for the terminal."""
    lines = []
    for name, row in found["solvers"].items():
        line = (
            f"{name}: {row['share']:.3f} of the loss of rounding to nearest with the same scales, on calibration tokens"
        )
        if row["held_out_share"] is not None:
            line += f", {row['held_out_share']:.3f} on other tokens"
        line += f"; damping {_counted(row['damp'])}"
        if set(row["strength"]) != {"0"}:
            line += f"; strength {_counted(row['strength'])}"
        if row["nearest"]:
            line += f"; {len(row['nearest'])} weights rounded to nearest ({', '.join(row['nearest'][:3])})"
        lines.append(line)
    return lines


def _summary(rows: list[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    found = [row for _, row in rows]
    held = [row for row in found if row["held_before"] is not None]
    return {
        "weights": len(rows),
        "share": _share((row["before"], row["after"]) for row in found),
        "held_out_share": _share((row["held_before"], row["held_after"]) for row in held) if held else None,
        "damp": _counts(row["damp"] for row in found),
        "strength": _counts(row["strength"] for row in found),
        "nearest": [name for name, row in rows if row["nearest"]],
    }


def _share(pairs: Iterable[tuple[float, float]]) -> float:
    """Returns the geometric mean of after / before; weights that lose nothing either way are left out."""
    logs = [math.log(after / before) for before, after in pairs if before > 0 and after > 0]
    return math.exp(math.fsum(logs) / len(logs)) if logs else 1.0  # the same in any order, so for any number of ranks


def _counts(values: Iterable[float]) -> dict[str, int]:
    return {f"{value:g}": count for value, count in sorted(Counter(values).items())}


def _counted(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} weights)" for value, count in counts.items())
