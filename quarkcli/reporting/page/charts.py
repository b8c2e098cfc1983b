"""Draws charts as inline SVG, with places in percent of the width, so that they fit every screen.

Every chart has a title, its unit, and a table of the numbers behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from quarkcli.reporting.page import scale
from quarkcli.reporting.page.elements import Element, element

ROWS = 60  # of a table behind a chart; more stand in report.json
_ROW = 24  # pixels of a row of a heat map
_HIGH = 132  # pixels of a chart of columns
Text = Callable[[float | None], str]
Places = Mapping[tuple[int, int], float]


class Table(NamedTuple):
    """The numbers behind a chart. `numeric`: columns that are numbers; `whole`: all rows are shown at once."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    whole: bool = False


class Grid(NamedTuple):
    """Values by row and column, with names of both and what columns are."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Places
    axis: str = "layer"


class Bar(NamedTuple):
    """A named value, and what it was before; `text` stands beside it, `note` below its name."""

    name: str
    value: float
    text: str
    before: float | None = None
    note: str = ""


def chart(title: str, unit: str, *plot: Element | None, says: str = "", table: Table | None = None) -> Element:
    """Returns a figure. `says`: what one can read from it."""
    caption = element("figcaption", element("h3", title), element("p", unit, class_="unit"))
    note = element("p", says, class_="says") if says else None
    return element("figure", caption, note, *plot, _behind(table) if table else None)


def broad(figure: Element) -> Element:
    """Returns a chart that takes the whole width of the page."""
    figure.set("class", "wide")
    return figure


def _behind(table: Table) -> Element:
    """Returns the numbers of a chart, folded away."""
    shown = table.rows[:ROWS]
    more = len(table.rows) - len(shown)
    rest = element("p", f"{more:,} more rows are in report.json.", class_="unit") if more else None
    return element("details", element("summary", "Table"), grid(table._replace(rows=shown)), rest)


def grid(table: Table) -> Element:
    """Returns a table that scrolls by itself where it is wider than the screen."""

    def row(tag: str, cells: Sequence[str]) -> Element:
        return element(
            "tr", *(element(tag, cell, class_="n" if at in table.numeric else None) for at, cell in enumerate(cells))
        )

    head = element("thead", row("th", table.headers))
    body = element("tbody", *(row("td", cells) for cells in table.rows))
    return element("div", element("table", head, body), class_="scroll whole" if table.whole else "scroll", tabindex=0)


def heat(cells: Grid, text: Text, colours: scale.Colours | None = None) -> list[Element]:
    """Returns a heat map and its colour scale. `colours`: of several maps that are to be compared."""
    colours = colours or scale.Colours(cells.values.values())
    width = 100 / max(1, len(cells.columns))
    drawing = element(
        "svg",
        role="img",
        width="100%",
        height=_ROW * len(cells.rows),
        class_="heat" if len(cells.columns) <= 64 else "heat dense",
    )
    for (row, column), value in sorted(cells.values.items()):
        tip = f"{cells.rows[row]}, {cells.axis} {cells.columns[column]}: {text(value)}"
        drawing.append(
            element(
                "rect",
                element("title", tip),
                x=_percent(column * width),
                y=row * _ROW,
                width=_percent(width),
                height=_ROW,
                class_=f"c{colours.step(value)}",
            )
        )
    names = element("div", *(_label(name) for name in cells.rows), class_="names")
    plot = element("div", names, drawing, element("span"), _axis(cells.columns, cells.axis), class_="plot")
    return [plot, _legend(colours, text)]


def numbers(cells: Grid, text: Text, what: str) -> Table:
    """Returns the numbers of a grid: a row for each of its rows, a column for each of its columns."""
    rows = [
        (name, *(text(cells.values.get((row, column))) for column in range(len(cells.columns))))
        for row, name in enumerate(cells.rows)
    ]
    return Table((what, *cells.columns), rows, frozenset(range(1, len(cells.columns) + 1)))


def _label(name: str) -> Element:
    return element("span", element("bdi", name), title=name)


def _axis(names: Sequence[str], what: str, most: int = 8) -> Element:
    """Returns the names below columns."""
    width = 100 / max(1, len(names))
    drawing = element("svg", width="100%", height=34, class_="axis", aria_hidden="true")
    for at in scale.ticks(names, most):
        drawing.append(element("text", names[at], x=_percent((at + 0.5) * width), y=13, text_anchor="middle"))
    drawing.append(element("text", what, x="50%", y=30, text_anchor="middle", class_="what"))
    return drawing


def _legend(colours: scale.Colours, text: Text) -> Element:
    bounds = colours.bounds()
    boxes = element("svg", width="100%", height=10, role="presentation")
    width = 100 / scale.STEPS
    for step in range(scale.STEPS):
        boxes.append(element("rect", x=_percent(step * width), width=_percent(width), height=10, class_=f"c{step}"))
    how = "logarithmic scale" if colours.logarithmic else "linear scale"
    marks = (text(bounds[0]), how, text(bounds[-1]))
    return element("div", boxes, element("div", *(element("span", mark) for mark in marks)), class_="legend")


def columns(
    names: Sequence[str], values: Sequence[float | None], text: Text, axis: str = "layer", top: float | None = None
) -> Element:
    """Returns a chart of upright columns over an axis from zero. `top`: of several charts that are to be compared."""
    ticks = scale.nice(max((value for value in values if value is not None), default=0.0) if top is None else top)
    top, width = ticks[-1], 100 / max(1, len(names))
    gap = 0.12 if len(names) <= 48 else 0.0
    drawing = element("svg", role="img", width="100%", height=_HIGH + 8, class_="columns")
    for tick in ticks:
        y = 8 + _HIGH * (1 - tick / top)
        drawing.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_="base" if not tick else "line"))
    for at, value in enumerate(values):
        if value is None:
            continue
        high = max(1.0, _HIGH * value / top)
        tip = element("title", f"{axis} {names[at]}: {text(value)}")
        drawing.append(
            element(
                "rect",
                tip,
                x=_percent((at + gap) * width),
                width=_percent((1 - 2 * gap) * width),
                y=8 + _HIGH - high,
                height=high,
                class_="bar",
            )
        )
    marks = element("div", *(element("span", text(tick)) for tick in reversed(ticks)), class_="marks")
    return element("div", marks, drawing, element("span"), _axis(names, axis), class_="plot upright")


def bars(rows: Sequence[Bar]) -> Element:
    """Returns lying bars, each with its name before it and its number behind it."""
    top = max((max(row.value, row.before or 0.0) for row in rows), default=0.0) or 1.0
    lines = []
    for row in rows:
        drawing = element("svg", width="100%", height=18, role="presentation")
        if row.before is not None:
            drawing.append(element("rect", x=0, y=1, width=_percent(100 * row.before / top), height=7, class_="before"))
        place = {"y": 4, "height": 10} if row.before is None else {"y": 9, "height": 8}
        share = max(0.2, 100 * row.value / top) if row.value else 0.0
        drawing.append(element("rect", x=0, width=_percent(share), class_="bar", **place))
        note = element("small", row.note) if row.note else None
        name = element("span", element("bdi", row.name), note, class_="name", title=row.name)
        lines.append(element("div", name, drawing, element("span", row.text, class_="value"), class_="row"))
    return element("div", *lines, class_="bars")


def key(*names: tuple[str, str]) -> Element:
    """Returns what colours stand for: (class of the colour, meaning)."""
    boxes = (element("span", element("i", class_=colour), name) for colour, name in names)
    return element("p", *boxes, class_="key")


def _percent(value: float) -> str:
    return f"{value:.4g}%"
