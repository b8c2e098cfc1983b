"""Says what a run has cost: the same in the terminal, in the report and on the card.

The headline is what a user loses: KL, agreement and perplexity where they were measured, else the output error of
blocks. The error of weights alone is shown only where there is nothing better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORST = 3  # that are named
_BARS = "▁▂▃▄▅▆▇█"


def rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns labelled sentences; none where nothing was quantized."""
    return [*_evaluation(report["evaluation"]), *_errors(report["loss"])]


def _evaluation(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    before, after = found["baseline_perplexity"], found["perplexity"]
    return [
        ("cost", f"KL {found['kl']:.4f} nats per token; top token agrees on {found['top1_agreement']:.1%}"),
        ("", f"perplexity {before:.2f} -> {after:.2f} ({found['perplexity_increase']:+.1%})"),
        ("", f"on {found['tokens']:,} tokens of {found['text']}, in {found['dtype']}"),
    ]


def _errors(loss: Mapping[str, Any]) -> list[tuple[str, str]]:
    errors = loss["output_errors"]
    if errors:
        mean = f"{_mean(errors):.3g} of a block's output on average, over {len(errors)} blocks"
        return [("error", mean), ("", f"worst: {_worst(errors)}"), ("", f"by block: {bars(errors.values())}")]
    if not loss["weight_errors"]:
        return []
    return [
        (
            "error",
            f"weight error {_mean(loss['weight_errors']):.3g} on average; it compares runs of one algorithm only",
        ),
        ("", f"worst: {_worst(loss['weight_errors'])}"),
    ]


def _mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / len(errors)


def _worst(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.3g}" for name, error in worst(errors, WORST))


def worst(errors: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    """Returns the largest errors with their names, largest first."""
    return sorted(errors.items(), key=lambda item: -item[1])[:count]


def bars(values: Any, width: int = 60) -> str:
    """Returns one bar per value, of neighbours where there are more than `width`, as high as the largest allows."""
    found = list(values)
    size = -(-len(found) // width)
    groups = [max(found[start : start + size]) for start in range(0, len(found), size)]
    top = max(groups, default=0.0) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(value / top * len(_BARS)))] for value in groups)
