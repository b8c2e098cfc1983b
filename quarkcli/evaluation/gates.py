"""Compares a measured checkpoint with its limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quarkcli.errors import CheckError, UsageError

_SAID: dict[str, Callable[[float, float], str]] = {
    "max_kl": lambda value, limit: f"KL {value:.5f} is above {limit:g}",
    "max_ppl_increase": lambda value, limit: f"perplexity rose by {value:.2%}, more than {limit:.2%}",
}


def check_asked(baseline: object, max_kl: float | None, max_ppl_increase: float | None) -> None:
    """Raises UsageError for a limit without a baseline, which it compares with."""
    if baseline is None and (max_kl is not None or max_ppl_increase is not None):
        raise UsageError(
            "--max-kl and --max-ppl-increase compare with a baseline",
            hint="add --baseline DIR_OR_ID",
            kind="E-FLAG-CONFLICT",
        )


def limits(result: Mapping[str, Any], max_kl: float | None, max_ppl_increase: float | None) -> list[dict[str, Any]]:
    """Returns a row for each limit that was asked for. `max_ppl_increase` is a fraction: 0.03 for 3 %."""
    asked = (("max_kl", "kl", max_kl), ("max_ppl_increase", "perplexity_increase", max_ppl_increase))
    return [
        {"name": name, "limit": limit, "value": result[key], "passed": result[key] is not None and result[key] <= limit}
        for name, key, limit in asked
        if limit is not None
    ]


def judged(result: dict[str, Any], max_kl: float | None, max_ppl_increase: float | None) -> dict[str, Any]:
    """Returns a result with the limits that were asked for, and `ok`: all of them are kept.

    Raises CheckError (exit 8) where one is not; the error has the result.
    """
    rows = limits(result, max_kl, max_ppl_increase)
    failed = [_SAID[row["name"]](row["value"], row["limit"]) for row in rows if not row["passed"]]
    found = {**result, "ok": not failed, "limits": rows}
    if failed:
        error = CheckError("; ".join(failed), where=result["directory"], kind="E-GATE")
        error.result = found
        raise error
    return found
