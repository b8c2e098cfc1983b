"""Writes the page of two checkpoints side by side: how far apart their tensors are, and their reports."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quarkcli import __version__
from quarkcli.recipe.match import starred
from quarkcli.reporting.page import Report, figures, scale, section, style
from quarkcli.reporting.page.charts import Bar, Grid, Table, bars, broad, chart, columns, grid, heat, key, numbers
from quarkcli.reporting.page.elements import Element, document, element

# The number of a block, behind whatever blocks are called, and the name inside it.
_BLOCK = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")
Pair = tuple[Report | None, Report | None]


def page(found: Mapping[str, Any], a: Report | None, b: Report | None) -> str:
    """Returns the page.

    found   schema `quark/compare/1`, with all tensors
    a, b    reports of the two, where they have one
    """
    names = found["a"], found["b"]
    charts = [_distances(found), *_both(figures.measure, _heat, names, (a, b))]
    costs = [*_both(_blocks, _columns, names, (a, b)), *_both(_drift, _columns, names, (a, b))]
    return document(
        f"{names[0]} and {names[1]}",
        style(),
        element("header", element("h1", names[0], " ", element("small", "and"), f" {names[1]}"), _lead(found)),
        element("dl", *_tiles(found), class_="tiles"),
        section("The two runs", [_facts(names, a, b), *costs, _roles(names, a, b)]) if a or b else None,
        section("Differences", [*charts, _tensors(found)]),
        *_notes(found),
        element("footer", f"Written by quark {__version__}. `quark compare --json` has the numbers."),
    )


def _lead(found: Mapping[str, Any]) -> Element:
    return element("p", f"The two checkpoints, tensor by tensor; the signal is {found['reference']}.", class_="lead")


def _tiles(found: Mapping[str, Any]) -> list[Element]:
    ratio = "equal" if found["identical"] else "–" if found["sqnr_db"] is None else f"{found['sqnr_db']:.2f} dB"
    rows = (
        ("SQNR", ratio, "signal to quantization noise over the tensors that differ"),
        ("Tensors in both", f"{found['compared']:,}", f"{found['equal_bit_for_bit']:,} equal bit for bit"),
        ("Only in A", f"{len(found['only_in_a']):,}", found["a"]),
        ("Only in B", f"{len(found['only_in_b']):,}", found["b"]),
    )
    return [
        element("div", element("dt", name), element("dd", value, class_="value"), element("dd", more, class_="more"),
                class_="tile")
        for name, value, more in rows
    ]  # fmt: skip


def _notes(found: Mapping[str, Any]) -> list[Element]:
    texts = [f"only in {which}: {name}" for which in "ab" for name in found[f"only_in_{which}"]]
    texts += [f"{name}: shape {one['a']} and {one['b']}" for name, one in found["shapes_differ"].items()]
    texts += [
        f"{name}: static scale {scale.short(one['a'])} and {scale.short(one['b'])}"
        for name, one in found["scales_differ"].items()
    ]
    if not texts:
        return []
    more = [f"and {len(texts) - 10:,} more"] if len(texts) > 10 else []
    items = (element("li", text) for text in [*texts[:10], *more])
    title = element("h3", f"Other differences ({len(texts):,})")
    return [element("div", title, element("ul", *items), class_="notes")]


def _relative(row: Mapping[str, Any]) -> float | None:
    """Returns |A - B| / |signal| of a tensor."""
    if row["equal_values"]:
        return 0.0
    return None if row["sqnr_db"] is None else 10 ** (-row["sqnr_db"] / 20)


def _distances(found: Mapping[str, Any]) -> Element | None:
    cells: dict[tuple[str, int], list[float]] = {}
    for row in found["tensors"]:
        place, value = _BLOCK.match(row["name"]), _relative(row)
        if place is not None and value is not None:
            inside = starred(place[2].removesuffix(".weight"))
            cells.setdefault((inside, int(place[1])), []).append(value)
    if not any(any(own) for own in cells.values()):
        return None
    names, layers = list(dict.fromkeys(name for name, _ in cells)), sorted({layer for _, layer in cells})
    values = {(names.index(name), layers.index(layer)): sum(own) / len(own) for (name, layer), own in cells.items()}
    drawn = Grid(names, [str(layer) for layer in layers], values)
    says = "A cell of experts (*) is the mean over all experts." if any(len(own) > 1 for own in cells.values()) else ""
    table = numbers(drawn, scale.short, "Layer")
    plot = heat(drawn, scale.short)
    unit = "|A − B| / |signal| of each tensor"
    return broad(chart("Distance by layer and projection", unit, *plot, says=says, table=table))


def _tensors(found: Mapping[str, Any]) -> Element | None:
    rows = [row for row in found["tensors"] if not row["equal_bit_for_bit"]]
    if not rows:
        return None
    table = Table(
        ("Tensor", "Signal-to-noise ratio (SQNR), dB", "Largest difference", "A", "B"),
        [
            (
                row["name"], "–" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}",
                scale.short(row["largest_difference"]), row["a"], row["b"],
            )
            for row in rows[:50]
        ],
        frozenset({1, 2}),
    )  # fmt: skip
    says = f"The first {min(50, len(rows)):,} of {len(rows):,} that differ."
    return broad(chart("Tensors that differ", "worst first", grid(table), says=says))


def _both(
    of: Callable[[Report], Any], draw: Callable[..., list[Element | None]], names: Sequence[str], reports: Pair
) -> list[Element | None]:
    """Returns the same chart of both, on one scale."""
    found = [(name, report, of(report)) for name, report in zip(names, reports, strict=True) if report is not None]
    if len(found) == 2 and found[0][2] is not None and found[1][2] is not None:
        return draw(*found)
    return []


def _heat(*both: tuple[str, Report, str]) -> list[Element | None]:
    """Returns the errors of weights of both, where they are of one kind."""
    fields = {field for _, _, field in both}
    field = fields.pop() if len(fields) == 1 else "error"
    grids = [figures.layers_grid(figures.by_layer(report["tensors"], field)) for _, report, _ in both]
    if not all(one.values for one in grids):
        return []
    colours = scale.Colours(value for one in grids for value in one.values.values())
    what = "output error" if field == "output_error" else "weight error"
    return [
        chart(
            f"{letter}: {what}",
            f"{name}; relative",
            *heat(one, scale.short, colours),
            table=numbers(one, scale.short, "Layer"),
        )
        for letter, (name, _, _), one in zip("AB", both, grids, strict=True)
    ]


def _blocks(report: Report) -> tuple[str, list[float | None]] | None:
    rows = [row for row in report["parts"] if row["layer"] is not None]
    errors = [row["output_error"] for row in rows]
    return ("output error of each block", errors) if any(error is not None for error in errors) else None


def _drift(report: Report) -> tuple[str, list[float | None]] | None:
    found = (report["evaluation"] or {}).get("drift")
    return ("drift behind each block", found) if found else None


def _columns(*both: tuple[str, Report, tuple[str, list[float | None]]]) -> list[Element | None]:
    top = max((value for _, _, (_, values) in both for value in values if value is not None), default=0.0)
    found: list[Element | None] = []
    for letter, (name, _, (what, values)) in zip("AB", both, strict=True):
        names = [str(at) for at in range(len(values))]
        rows = [(at, scale.short(value)) for at, value in zip(names, values, strict=True)]
        plot = columns(names, values, scale.short, top=top)
        table = Table(("Layer", what.capitalize()), rows, frozenset({1}))
        found.append(chart(f"{letter}: {what}", f"{name}; relative", plot, table=table))
    return found


_FACTS: tuple[tuple[str, Callable[[Report], str]], ...] = (
    ("Recipe", lambda report: report["recipe"]["name"]),
    ("Algorithms", lambda report: ", ".join(report["algorithms"])),
    ("Dialect", lambda report: report["dialect"]["name"]),
    ("Size", lambda report: scale.size(report["size"]["output_bytes"])),
    ("Bits per quantized weight", lambda report: scale.short(report["size"]["effective_bits"])),
    ("KL, nats per token", lambda report: _score(report, "kl")),
    ("Top token agrees", lambda report: _score(report, "top1_agreement")),
    ("Perplexity", lambda report: _score(report, "perplexity")),
    ("Mean output error of blocks", lambda report: scale.short(report["loss"]["mean_output_error"])),
    ("Mean weight error", lambda report: scale.short(report["loss"]["mean_weight_error"])),
    ("Time", lambda report: scale.seconds(report["seconds"])),
    ("Peak memory", lambda report: scale.size(report["peak_rss_bytes"])),
    ("Warnings", lambda report: scale.count(len(report["warnings"]))),
    ("Command", lambda report: shlex.join(report["run"]["command"] or [])),
    ("Machine", lambda report: f"{report['run']['host']['name']}, {report['device']}"),
)


def _score(report: Report, field: str) -> str:
    return scale.short((report["evaluation"] or {}).get(field))


def _facts(names: Sequence[str], a: Report | None, b: Report | None) -> Element:
    rows = [(label, *("–" if report is None else text(report) or "–" for report in (a, b))) for label, text in _FACTS]
    table = grid(Table(("", f"A: {names[0]}", f"B: {names[1]}"), rows, whole=True))
    return broad(chart("Side by side", "–: the run does not have this number", table))


def _roles(names: Sequence[str], a: Report | None, b: Report | None) -> Element | None:
    if a is None or b is None:
        return None
    sizes: dict[str, list[int]] = {}
    for at, report in enumerate((a, b)):
        for row in report["tensors"]:
            sizes.setdefault(row["role"], [0, 0])[at] += row["bytes"]
    ordered = sorted(sizes.items(), key=lambda item: -max(item[1]))
    rows = [
        Bar(role.replace("_", " "), after, f"{scale.size(before)} → {scale.size(after)}", before)
        for role, (before, after) in ordered
    ]
    legend = key(("before", f"A: {names[0]}"), ("bar", f"B: {names[1]}"))
    table = Table(
        ("Role", "A", "B", "B / A"),
        [(bar.name, scale.size(bar.before), scale.size(bar.value), _ratio(bar)) for bar in rows],
        frozenset({1, 2, 3}),
    )
    return broad(chart("Bytes by role", "of all tensors of a role in the output", legend, bars(rows), table=table))


def _ratio(bar: Bar) -> str:
    share = bar.value / bar.before if bar.before else math.inf
    return f"{share:.0%}" if math.isfinite(share) else "–"
