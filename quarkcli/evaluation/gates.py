"""The limits that a measured checkpoint must keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quarkcli.errors import CheckError, UsageError


def limits(result: Mapping[str, Any], max_kl: float | None, max_ppl_increase: float | None) -> list[dict[str, Any]]:
    """Returns a row for each limit that was asked for. `max_ppl_increase` is a fraction: 0.03 for 3 %."""
    asked = (("max_kl", "kl", max_kl), ("max_ppl_increase", "perplexity_increase", max_ppl_increase))
    return [
        {"name": name, "limit": limit, "value": result[key], "passed": result[key] is not None and result[key] <= limit}
        for name, key, limit in asked
        if limit is not None
    ]


def judged(result: dict[str, Any], max_kl: float | None, max_ppl_increase: float | None) -> dict[str, Any]:
    """Returns a result with the limits that were asked for, and `ok`: whether all of them are kept."""
    rows = limits(result, max_kl, max_ppl_increase)
    return {**result, "ok": all(row["passed"] for row in rows), "limits": rows}


def check_gates(result: dict[str, Any], max_kl: float | None, max_ppl_increase: float | None) -> None:
    """Raises CheckError (exit 8) when a gate fails; see `limits`."""
    if result["kl"] is None and (max_kl is not None or max_ppl_increase is not None):
        raise UsageError("a gate needs a baseline to compare with", hint="--baseline SRC", kind="E-FLAG-CONFLICT")
    say = {
        "max_kl": lambda value, limit: f"KL {value:.5f} is above {limit:g}",
        "max_ppl_increase": lambda value, limit: f"perplexity rose by {value:.2%}, more than {limit:.2%}",
    }
    rows = limits(result, max_kl, max_ppl_increase)
    failed = [say[row["name"]](row["value"], row["limit"]) for row in rows if not row["passed"]]
    if failed:
        raise CheckError("; ".join(failed), where=result["directory"], kind="E-GATE")
