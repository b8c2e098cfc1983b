"""Makes the charts of one run from its report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quarkcli.recipe.match import starred
from quarkcli.reporting.page import scale
from quarkcli.reporting.page.charts import Bar, Grid, Table, bars, broad, chart, columns, grid, heat, key
from quarkcli.reporting.page.elements import Element, element

Report = Mapping[str, Any]
Row = Mapping[str, Any]
Cells = dict[tuple[str, int], list[tuple[float, Row]]]
MOST_ROWS, MOST_COLUMNS = 32, 48  # of the tokens of experts; more are shown in groups


def measure(report: Report) -> str:
    """Returns what errors of weights are shown: `output_error` where a solver measured it, else `error`."""
    return "output_error" if any(row["output_error"] is not None for row in report["tensors"]) else "error"


def by_layer(rows: Iterable[Row], field: str) -> Cells:
    """Returns the rows that have a number, by their name inside a layer, with `*` for experts, and by layer."""
    found: Cells = {}
    for row in rows:
        if row["layer"] is not None and row[field] is not None:
            inside = starred(row["name"].removeprefix(f"{row['part']}.").removesuffix(".input"))
            found.setdefault((inside, row["layer"]), []).append((row[field], row))
    return found


def layers_grid(cells: Cells) -> Grid:
    """Returns means by name and layer."""
    names = list(dict.fromkeys(name for name, _ in cells))
    layers = sorted({layer for _, layer in cells})
    places = {layer: at for at, layer in enumerate(layers)}
    values = {
        (names.index(name), places[layer]): sum(value for value, _ in own) / len(own)
        for (name, layer), own in cells.items()
    }
    return Grid(names, [str(layer) for layer in layers], values)


def errors(report: Report) -> Element | None:
    """Returns the heat map of weights by layer and projection."""
    field = measure(report)
    cells = by_layer(report["tensors"], field)
    if not cells:
        return None
    says = _worst_place(cells)
    if any(len(own) > 1 for own in cells.values()):
        most = max(len(own) for own in cells.values())
        says += f" A cell of experts (*) is the mean over up to {most}; the table has each."
    if field == "output_error":
        title, unit = (
            "Output error by layer and projection",
            "|(W − Q)X| / |WX| of each weight W, quantized as Q, with inputs X",
        )
    else:
        title = "Weight error by layer and projection"
        unit = "|W − Q| / |W| of each weight W, quantized as Q; compare it only with runs of the same algorithm"
    rows = sorted((pair for own in cells.values() for pair in own), key=lambda pair: -pair[0])
    table = Table(
        ("Weight", "Error", "Bits", "Bytes", "Format"),
        [
            (row["name"], scale.short(value), scale.short(row["bits"]), scale.size(row["bytes"]), row["format"])
            for value, row in rows
        ],
        frozenset({1, 2, 3}),
    )
    return broad(chart(title, unit, *heat(layers_grid(cells), scale.short), says=says, table=table))


def _worst_place(cells: Cells) -> str:
    value, row = max((pair for own in cells.values() for pair in own), key=lambda pair: pair[0])
    return f"Worst: {row['name']} with {scale.short(value)}."


def blocks(report: Report) -> Element | None:
    """Returns the error of what each block returns, where there was data."""
    rows = [row for row in report["parts"] if row["layer"] is not None and row["output_error"] is not None]
    if not rows:
        return None
    plot = columns([str(row["layer"]) for row in rows], [row["output_error"] for row in rows], scale.short)
    table = Table(
        ("Block", "Output error", "Mean weight error"),
        [(row["name"], scale.short(row["output_error"]), scale.short(row["weight_error"])) for row in rows],
        frozenset({1, 2}),
    )
    says = "The difference between the output of a quantized block and of the original block, for the same input."
    return chart("Output error of each block", "relative to the block's output", plot, says=says, table=table)


def drift(report: Report) -> Element | None:
    """Returns how far hidden states are from the model's own behind each block."""
    found = (report["evaluation"] or {}).get("drift")
    if not found:
        return None
    names = [str(layer) for layer in range(len(found))]
    rows = [(name, scale.short(value)) for name, value in zip(names, found, strict=True)]
    says = "The distance of hidden states from the original model's, which adds up over the blocks."
    table = Table(("Block", "Drift"), rows, frozenset({1}))
    unit = "relative distance behind each block"
    return chart("Drift over the blocks", unit, columns(names, found, scale.short), says=says, table=table)


def roles(report: Report) -> Element:
    """Returns bytes before and after, and bits, of each role."""
    found: dict[str, list[Row]] = {}
    for row in report["tensors"]:
        found.setdefault(row["role"], []).append(row)
    ordered = sorted(found.items(), key=lambda item: -sum(row["source_bytes"] for row in item[1]))
    shown, table = [], []
    for role, rows in ordered:
        before, after = (sum(row[field] for row in rows) for field in ("source_bytes", "bytes"))
        values = sum(row["bytes"] * 8 / row["bits"] if row["bits"] else 0 for row in rows)
        bits = 8 * after / values if values else 0.0
        formats = list(dict.fromkeys(row["format"] for row in rows))
        note = "; ".join(formats[:2]) + (f"; and {len(formats) - 2} more" if len(formats) > 2 else "")
        name, sizes = role.replace("_", " "), (scale.size(before), scale.size(after))
        shown.append(Bar(name, after, f"{sizes[0]} → {sizes[1]}, {bits:.3g} bits", before, note))
        table.append((name, scale.count(len(rows)), *sizes, f"{bits:.4g}", note))
    headers = ("Role", "Tensors", "Source", "Output", "Bits per value", "Format")
    legend = key(("before", "source"), ("bar", "of the output, or planned if it is not written yet"))
    behind = Table(headers, table, frozenset({1, 2, 3, 4}))
    return broad(chart("Bytes and bits by role", "bytes of all tensors of a role", legend, bars(shown), table=behind))


def outliers(report: Report) -> Element | None:
    """Returns the outlier ratio of every activation that calibration measured."""
    cells = by_layer(report["sites"], "outlier_ratio")
    if not cells:
        return None
    rows = sorted(report["sites"], key=lambda row: -(row["outlier_ratio"] or 0))
    table = Table(
        ("Activation", "Ratio", "Absmax", "Median", "99 %", "99.9 %"),
        [
            (
                row["name"],
                *map(scale.short, (row["outlier_ratio"], row["absmax"])),
                *(scale.short(row["quantiles"].get(share)) for share in ("0.5", "0.99", "0.999")),
            )
            for row in rows
        ],
        frozenset({1, 2, 3, 4, 5}),
    )
    says = "The largest value of the largest channel, divided by that of the median channel. A high ratio makes "
    says += f"the activation hard to quantize. {_worst_place(cells)}"
    plot = heat(layers_grid(cells), scale.short)
    return broad(chart("Outliers of activations", "largest channel / median channel", *plot, says=says, table=table))


def experts(report: Report) -> Element | None:
    """Returns the calibration tokens of each expert."""
    tokens: Mapping[str, Mapping[str, int]] = report["experts"]["calibration_tokens"]
    if not tokens:
        return None
    counts = [[own[number] for number in sorted(own, key=int)] for own in tokens.values()]
    high, wide = -(-len(counts) // MOST_ROWS), -(-max(map(len, counts)) // MOST_COLUMNS)
    names, values = list[str](), dict[tuple[int, int], float]()
    prefixes = list(tokens)
    for row, start in enumerate(range(0, len(counts), high)):
        own = counts[start : start + high]
        names.append(_span([_layer(prefix) for prefix in prefixes[start : start + high]]))
        for column in range(0, max(map(len, own)), wide):
            values[row, column // wide] = min(count for line in own for count in line[column : column + wide])
    last = max(map(len, counts))
    heads = [_span([str(at) for at in range(start, min(last, start + wide))]) for start in range(0, last, wide)]
    every = [count for line in counts for count in line]
    says = (
        f"From {min(every):,} to {max(every):,} tokens; {sum(not count for count in every)} of {len(every):,} "
        "experts saw none."
    )
    if high > 1 or wide > 1:
        says += f" A cell stands for {high} x {wide} (layers x experts) and shows the fewest tokens among them."
    table = Table(
        ("Layer", "Experts", "Fewest", "Mean", "Most", "None"),
        [
            (
                prefix, f"{len(line):,}", f"{min(line):,}", scale.short(sum(line) / len(line)), f"{max(line):,}",
                str(sum(not count for count in line)),
            )
            for prefix, line in zip(prefixes, counts, strict=True)
        ],
        frozenset({1, 2, 3, 4, 5}),
    )  # fmt: skip
    plot = heat(Grid(names, heads, values, "expert"), scale.count)
    return broad(chart("Tokens per expert", "calibration tokens routed to it", *plot, says=says, table=table))


def _layer(prefix: str) -> str:
    numbers = re.findall(r"\.(\d+)\.", f"{prefix}.")
    return numbers[0] if numbers else prefix


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}–{names[-1]}"


def worst_tokens(report: Report) -> Element | None:
    """Returns the tokens on which the quantized model is furthest from the source."""
    found = (report["evaluation"] or {}).get("worst_tokens")
    if not found:
        return None
    rows = []
    for token in found:
        text = element("td", element("code", _tail(token["context"]), element("mark", visible(token["token"]))))
        guesses = (element("td", element("code", visible(token[side]))) for side in ("source_expects", "expects"))
        rows.append(element("tr", element("td", scale.short(token["kl"]), class_="n"), text, *guesses))
    heads = ("KL", "Text, with the token", "Original expects", "Quantized expects")
    head = element(
        "thead", element("tr", *(element("th", name, class_="n" if name == "KL" else None) for name in heads))
    )
    table = element("div", element("table", head, element("tbody", *rows)), class_="scroll", tabindex=0)
    says = f"The tokens with the largest divergence, of {report['evaluation']['tokens']:,} scored tokens."
    return broad(chart("Worst tokens", "KL in nats of the next token's distribution", table, says=says))


def _tail(text: str, letters: int = 90) -> str:
    """Returns the end of a text on one line."""
    line = re.sub(r"[^\S\n]+", " ", re.sub(r"[^\S\n]*\n\s*", " ⏎ ", text))
    return line if len(line) <= letters else f"…{line[-letters:]}"


def visible(token: str) -> str:
    """Returns a token with signs for what nobody would see: `␣`, `⏎`, `⇥`, with their number where they are many."""
    if not token:
        return "∅"
    blank = not token.strip()
    for letter, sign in (("\n", "⏎"), ("\t", "⇥"), *([(" ", "␣")] if blank else [])):
        token = token.replace(letter, sign)
    return re.sub(r"([␣⏎⇥])\1{2,}", lambda run: f"{run[1]}×{len(run[0])}", token)


def phases(report: Report) -> Element | None:
    """Returns what took the time."""
    rows = report["run"]["phases"]
    if not rows:
        return None
    shown = [Bar(row["name"], row["seconds"], scale.seconds(row["seconds"])) for row in rows]
    table = Table(("Phase", "Seconds"), [(row["name"], f"{row['seconds']:.3f}") for row in rows], frozenset({1}))
    return chart("Time by phase", "wall time of this process", bars(shown), table=table)


def part_times(report: Report) -> Element | None:
    """Returns the time of every part."""
    rows = [row for row in report["parts"] if row["done"]]
    if not rows:
        return None
    plot = columns([_short_name(row) for row in rows], [row["seconds"] for row in rows], scale.seconds, "part")
    table = Table(
        ("Part", "Time", "Tensors", "Source", "Written"),
        [
            (
                row["name"], scale.seconds(row["seconds"]), str(row["tensors"]), scale.size(row["source_bytes"]),
                scale.size(row["bytes"]),
            )
            for row in rows
        ],
        frozenset({1, 2, 3, 4}),
    )  # fmt: skip
    return chart("Time by part", "of the work on it, without reading and writing", plot, table=table)


def part_memory(report: Report) -> Element | None:
    """Returns the memory behind every part."""
    rows = [row for row in report["parts"] if row["done"]]
    if not rows:
        return None
    field = "peak_gpu_bytes" if any(row["peak_gpu_bytes"] for row in rows) else "peak_rss_bytes"
    what = "of the device" if field == "peak_gpu_bytes" else "of this process"
    plot = columns([_short_name(row) for row in rows], [row[field] for row in rows], scale.size, "part")
    table = Table(
        ("Part", "RAM", "Peak RAM", "Peak GPU"),
        [
            (row["name"], *(scale.size(row[key]) for key in ("rss_bytes", "peak_rss_bytes", "peak_gpu_bytes")))
            for row in rows
        ],
        frozenset({1, 2, 3}),
    )
    return chart("Memory by part", f"highest use {what} until the end of each part", plot, table=table)


def _short_name(row: Row) -> str:
    return str(row["layer"]) if row["layer"] is not None else row["kind"]


def kept(report: Report) -> Element | None:
    """Returns the reasons why tensors are kept."""
    if not report["kept_reasons"]:
        return None
    rows = [(reason, f"{count:,}") for reason, count in report["kept_reasons"].items()]
    table = grid(Table(("Reason", "Tensors"), rows, frozenset({1})))
    return chart("Kept in source precision", "tensors by reason", table)


def rules(report: Report) -> Element | None:
    """Returns the rules that decided."""
    if not report["decided_by"]:
        return None
    rows = [(rule, f"{own['on']:,}", f"{own['off']:,}") for rule, own in report["decided_by"].items()]
    return chart(
        "Rules that decided", "quantizers that each rule decides, because it is the last that matches",
        grid(Table(("Rule", "On", "Off"), rows, frozenset({1, 2}))),
    )  # fmt: skip
