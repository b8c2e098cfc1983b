"""Draws a plan: what becomes of the model, what that takes, who serves it, and what to type next."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quarkcli import servers
from quarkcli.cli import output, planview, predictview, tables
from quarkcli.job import directories, idle
from quarkcli.job.groups import PlanRow, groups, of_report
from quarkcli.plan import advice
from quarkcli.plan.online import sentences
from quarkcli.recipe.advice import AUTO

if TYPE_CHECKING:
    from quarkcli.job.options import Prepared
    from quarkcli.job.predict import Prediction

NEXT = "  next      quark quantize with the same flags; every module: --modules; for scripts: --json"
USUAL = 120  # columns where there is no terminal
_LABEL = 10
_HEAD = ("PART", "TENSORS", "PARAMS", "NOW", "AFTER", "HOW", "WHY")


def lines(
    prepared: Prepared, forecast: Prediction | None, width: int | None = None, remarks: Sequence[str] = ()
) -> list[str]:
    """Returns the picture.

    width     columns of the terminal; None: as they are
    remarks   what is to say below the table
    """
    width = width or tables.room() or _usual()
    rows = [_cells(group) for group in groups(prepared)]
    facts = _labelled(_facts(prepared, forecast), width)
    notes = _labelled(output.listed("!", remarks), width)
    return [*tables.wrapped(_title(prepared), width), *facts, *_laid(_HEAD, rows, 2, width), *notes]


def after(report: Mapping[str, Any], width: int | None = None) -> list[str]:
    """Returns the table of a finished run, with what was written, lost and taken."""
    width = width or tables.room("stderr") or _usual()
    rows = report["tensors"]
    measured = [row for row in rows if row["output_error"] is not None]
    column, error = ("OUTPUT ERROR", "output_error") if measured else ("WEIGHT ERROR", "error")
    shown = bool(measured) or report["calibration"] is None  # a weight's own error says nothing of calibrated codes
    head = ("PART", "TENSORS", "PARAMS", "NOW", "AFTER", *((column,) if shown else ()), "TIME", "HOW")
    cells = []
    for group in of_report(rows, error):
        errors = ("-" if group.error is None else f"{group.error:.3g}",) if shown else ()
        took = predictview.duration(group.seconds) if group.seconds else "-"
        cells.append((*_cells(group)[:5], *errors, took, group.how))
    return _laid(head, cells, 1, width)


def _usual() -> int:
    """Returns the columns where a program or a file reads: as $COLUMNS says."""
    return shutil.get_terminal_size((USUAL, 24)).columns


def _title(prepared: Prepared) -> str:
    config, source = prepared.source.config, prepared.source
    architecture = ", ".join(config.get("architectures") or ["unknown architecture"])
    blocks = sum(part.block is not None for part in prepared.plan.parts)
    guessed = ", roles guessed from tensor names" if prepared.layout.inferred else ""
    return f"{source.name} -> {prepared.recipe.name}    {architecture}, {blocks} blocks{guessed}"


def _facts(prepared: Prepared, forecast: Prediction | None) -> Iterator[tuple[str, str]]:
    timed = predictview.rows(forecast) if forecast is not None else []
    facts = [*_sizes(prepared), ("needs", _needs(prepared)), *timed, *_ways(prepared), *_serves(prepared)]
    yield from facts + output.listed("writes", [str(one.checkpoint) for one in prepared.every])


def _labelled(rows: Iterable[tuple[str, str]], width: int) -> Iterator[str]:
    for label, text in rows:
        room = max(20, width - _LABEL - 2)
        for number, line in enumerate(tables.fold(text, room)):
            yield f"  {label if not number else '':<{_LABEL}}{line}".rstrip()


def _sizes(prepared: Prepared) -> Iterator[tuple[str, str]]:
    size, share = prepared.forecast, prepared.coverage
    total, done = sum(share.total.values()), sum(share.quantized.values())
    bits = 8 * size.output_bytes / total if total else 0.0
    yield (
        "size",
        f"{output.size(size.source_bytes)} -> {output.size(size.output_bytes)} "
        f"({size.output_bytes / max(1, size.source_bytes):.0%}); {size.effective_bits:.2f} bits on "
        f"{done / max(1, total):.0%} of the parameters, {bits:.1f} overall",
    )


def _needs(prepared: Prepared) -> str:
    size, settings = directories.together(prepared), prepared.calibration
    whole = " (the whole model at once, which writes the text)" if size.whole_bytes else ""
    found = [f"RAM {output.size(size.memory_bytes)}{whole}", f"disk {output.size(size.disk_bytes)}"]
    if settings is None:
        unused = ", ".join(idle.given(prepared.options, idle.OF_DATA))
        found.append("no calibration data" + (f" ({unused} not used)" if unused else ""))
    else:
        most = "" if settings.asked else "up to "
        found.append(f"calibration {most}{settings.samples} rows of {settings.seqlen} tokens from {settings.source}")
    return ", ".join(found)


def _ways(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """Yields what is special of this run: its source, algorithms, and what is done while the model runs."""
    yield from output.listed("source", prepared.origin.lines(prepared.plan) if prepared.origin else [])
    yield from planview.download(prepared)
    yield ("steps", ", ".join(planview.step(prepared.plan, step) for step in prepared.steps))
    yield from (("", f"{AUTO} chose {advice.text(one.as_dict())}") for one in prepared.advice)
    yield from output.listed("runs", sentences(prepared.plan.online))


def _serves(prepared: Prepared) -> Iterator[tuple[str, str]]:
    for one in prepared.every:
        ways = planview.parallel(one.tensor_parallel)
        yield ("dialect", f"{one.dialect.name} ({one.dialect_reason}); {ways}")
        written = servers.planned(one.plan, one.dialect)
        yield from output.listed("serves", servers.verdicts(servers.AUTO, written))


def _laid(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int, width: int) -> list[str]:
    """Returns the table; where it does not fit, its last columns, which are sentences, stand on lines of their own.

    texts   the number of those columns
    """
    for below in range(texts + 1):
        lines = _aligned([line[: len(head) - below] for line in (head, *rows)], texts - below)
        if all(len(line) <= width for line in lines):
            return [lines[0], *_folded(lines[1:], [row[len(head) - below :] for row in rows], width)]
    return [line for row in rows for line in _block(head, row, texts, width)]


def _block(head: Sequence[str], row: Sequence[str], texts: int, width: int) -> Iterator[str]:
    """Yields a row for a narrow terminal: its name, and what is to say of it below."""
    label, tensors, parameters, before, after, *more = row
    figures = zip(head[5 : len(head) - texts], more, strict=False)
    yield from (f"  {line}" for line in tables.fold(label, width - 2))
    told = [f"{title.lower()} {figure}" for title, figure in figures if figure != "-"]
    for text in (f"{tensors} tensors, {parameters}", f"{before} -> {after}", *told, *row[len(head) - texts :]):
        yield from (f"      {line}" for line in tables.fold(text, width - 6) if line)


def _folded(rows: Sequence[str], more: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    for row, texts in zip(rows, more, strict=True):
        yield row
        for text in filter(None, texts):
            yield from (f"      {line}" for line in tables.fold(text, width - 6))


def _cells(group: PlanRow) -> tuple[str, ...]:
    return (
        group.label, f"{group.tensors:,}", _count(group.parameters), output.size(group.before),
        output.size(group.after), group.how, group.why,
    )  # fmt: skip


def _count(number: int) -> str:
    """Returns `6.3 M`, `512`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _aligned(rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Returns rows in columns; all but the first and the last `texts` are figures."""
    figures = range(1, len(rows[0]) - texts)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    out = []
    for row in rows:
        cells = (
            cell.rjust(widths[column]) if column in figures else cell.ljust(widths[column])
            for column, cell in enumerate(row)
        )
        out.append(f"  {'  '.join(cells)}".rstrip())
    return out
