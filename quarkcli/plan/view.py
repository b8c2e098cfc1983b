"""Shows a plan in one line, and as a table for notebooks: what becomes of the weights, by role."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from quarkcli.plan import words

if TYPE_CHECKING:
    from quarkcli.plan.model import Plan

_HEAD = ("role", "weights", "parameters", "how", "why")


def line(plan: Plan) -> str:
    """Returns `<plan nvfp4 for llama: 28 of 30 weights quantized, 6 parts, 9 entries>`."""
    done = sum(1 for _ in plan.quantized())
    return (
        f"<plan {plan.scheme} for {plan.family}: {done:,} of {len(plan.targets):,} weights quantized, "
        f"{len(plan.parts)} parts, {len(plan.entries)} entries>"
    )


def _cell(text: str) -> str:
    return f"<td style='text-align:left'>{escape(text)}</td>"


def table(plan: Plan) -> str:
    """Returns HTML: a row for weights of one role that end alike for one reason."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for target in plan.targets.values():
        counts = found.setdefault((target.role, words.how(target), words.why(plan, target)), [0, 0])
        counts[0] += 1
        counts[1] += target.numel
    rows = [(role, f"{many:,}", f"{size:,}", how, why) for (role, how, why), (many, size) in found.items()]
    rows.append(("other tensors", f"{len(plan.kept):,}", "", "kept", "the recipe leaves them as they are"))
    cells = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in _HEAD)
    return f"<p>{escape(line(plan).strip('<>'))}</p><table><tr>{head}</tr>{''.join(cells)}</table>"
