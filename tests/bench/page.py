"""The loss table as Markdown, from the results of `tests.bench.table`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

BEGIN, END = "<!-- losses: begin -->", "<!-- losses: end -->"
IN, OUT = "in domain", "out of domain"
HEAD = (
    "| scheme and steps | bits | KL in | share | KL out | share | perplexity | top-1 | job s | seeds |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def brief(result: dict[str, Any]) -> str:
    """Returns one result in a few words."""
    if "refused" in result:
        return f"refused: {result['refused']}"
    losses = (f"{name} {loss['kl']:.5f}" for name, loss in result["losses"].items())
    return f"KL {', '.join(losses)}; {result['seconds']['cpu']:.0f} s"


def tables(results: dict[str, Any]) -> str:
    """Returns a table for every model: means over seeds, KL as it is and as a share of the scheme's rtn."""
    by_model: dict[str, dict[tuple[str, str], list[Any]]] = defaultdict(lambda: defaultdict(list))
    for result in results.values():
        by_model[result["model"]][result["scheme"], result["steps"]].append(result)
    return "\n".join(text for model, rows in sorted(by_model.items()) for text in _table(model, rows))


def _table(model: str, rows: dict[tuple[str, str], list[Any]]) -> Iterable[str]:
    yield f"\n### {model}\n\n{HEAD}"
    refused = []
    for (scheme, steps), found in sorted(rows.items(), key=lambda row: _order(row[0], row[1])):
        if any("refused" in result for result in found):
            refused.append((scheme, steps, found[0]["refused"]))
            continue
        yield _line(scheme, steps, found, rows.get((scheme, "rtn")))
    if refused:
        yield "\nRefused: " + "; ".join(f"{scheme} + {steps}: {why}" for scheme, steps, why in refused) + "."


def _order(row: tuple[str, str], found: list[Any]) -> tuple[Any, ...]:
    """Returns what rows are sorted by: the scheme, then rtn, then KL from large to small."""
    scheme, steps = row
    kl = 0.0 if "refused" in found[0] else mean(result["losses"][IN]["kl"] for result in found)
    return scheme, steps != "rtn", -kl


def _line(scheme: str, steps: str, found: list[Any], rtn: list[Any] | None) -> str:
    def value(name: str, text: str = IN, of: list[Any] = found) -> float:
        return mean(result["losses"][text][name] for result in of)

    def loss(text: str) -> list[str]:
        if text not in found[0]["losses"]:
            return ["-", "-"]
        base = value("kl", text, rtn) if rtn and text in rtn[0]["losses"] else None
        return [f"{value('kl', text):.5f}", f"{value('kl', text) / base:.3f}" if base else "-"]

    cells = [
        f"{scheme} + {steps}" if steps != "rtn" else scheme,
        f"{found[0]['bits']:.3f}",
        *loss(IN),
        *loss(OUT),
        f"{value('source_perplexity'):.2f} -> {value('perplexity'):.2f}",
        f"{value('top1'):.4f}",
        f"{mean(result['seconds']['cpu'] for result in found):.0f}",
        ", ".join(str(result["seed"]) for result in sorted(found, key=lambda result: result["seed"])),
    ]
    return "| " + " | ".join(cells) + " |"


def write(page: Path, results: dict[str, Any]) -> None:
    """Puts the tables between the marks of a page."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{tables(results).strip()}\n\n{END}{after}")
