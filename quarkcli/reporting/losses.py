"""Says what a run has cost, in the same words for terminal, report and card.

The headline is what a user loses: KL, agreement and perplexity where they were measured, else the output error of
blocks. The error of weights alone is shown only where there is nothing better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

WORST = 3  # that are named
WIDTH = 48  # bars of a line
_BARS = "▁▂▃▄▅▆▇█"


def rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns labelled sentences; none where nothing was quantized."""
    return [*_evaluation(report["evaluation"]), *_errors(report)]


def _evaluation(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    before, after = found["baseline_perplexity"], found["perplexity"]
    return [
        (
            "cost",
            f"KL divergence {found['kl']:.4f} nats per token (0: no loss); same top token for "
            f"{found['top1_agreement']:.1%}",
        ),
        ("", f"perplexity {before:.2f} -> {after:.2f} ({found['perplexity_increase']:+.1%})"),
        ("", f"on {found['tokens']:,} tokens of {found['text']}, in {found['dtype']}"),
    ]


def _errors(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    loss = report["loss"]
    errors = loss["output_errors"]
    if errors:
        mean = f"{_mean(errors):.3g} of a block's output on average, over {len(errors)} blocks"
        return [("error", mean), ("", f"worst: {_worst(errors)}"), *_by_block(report["parts"], "output_error")]
    errors = loss["weight_errors"]
    if not errors:
        return []
    mean = f"weight error {_mean(errors):.3g} on average; compare it only with runs of the same algorithm"
    return [("error", mean), ("", f"worst: {_worst(errors)}"), *_by_block(report["parts"], "weight_error")]


def _by_block(parts: Iterable[Mapping[str, Any]], field: str) -> list[tuple[str, str]]:
    """Returns a line of bars, one for each block that has an error."""
    found = [row[field] for row in parts if row["layer"] is not None and row[field] is not None]
    if len(found) < 2:
        return []
    size = -(-len(found) // WIDTH)
    return [("", f"by block: {bars(found)}" + (f" ({size} a bar)" if size > 1 else ""))]


def _mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / len(errors)


def _worst(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.3g}" for name, error in worst(errors, WORST))


def worst(errors: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    """Returns the largest errors with their names, largest first."""
    return sorted(errors.items(), key=lambda item: -item[1])[:count]


def bars(values: Any, width: int = WIDTH) -> str:
    """Returns one bar per value, of neighbours where there are more than `width`, as high as the largest allows."""
    found = list(values)
    size = -(-len(found) // width)
    groups = [max(found[start : start + size]) for start in range(0, len(found), size)]
    top = max(groups, default=0.0) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(value / top * len(_BARS)))] for value in groups)
