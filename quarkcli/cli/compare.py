"""`quark compare`: compares two checkpoints tensor by tensor, with a limit for CI."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quarkcli.cli import apps, files, output, verdict
from quarkcli.cli.amounts import number
from quarkcli.cli.flags import Debug, Json, Offline, Pickle, Quiet
from quarkcli.cli.logflags import LogFormat, LogLevel
from quarkcli.errors import some

if TYPE_CHECKING:
    from quarkcli.disk.compare import Comparison

EXAMPLES = apps.examples(
    "quark compare demo out/demo-mxfp4",
    "quark compare out/demo-mxfp4 demo --min-sqnr 15 --json",
)
LIMIT = 20  # tensors that people are shown
Page = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Write a page that shows both checkpoints and their runs side by side."
    ),
]

Least = Annotated[
    float | None,
    typer.Option(
        "--min-sqnr",
        parser=number,
        metavar="DB",
        help="Fail (exit 8) if the signal-to-noise ratio (SQNR) of a tensor is below this, in dB; or if the other "
        "checkpoint lacks it or has another shape.",
    ),
]


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A checkpoint, quantized or not: a directory, a hub id, or 'demo'.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other checkpoint.")],
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=0,
            metavar="N",
            help="Show the N worst tensors.",
            show_default=f"{LIMIT}; all with --json",
        ),
    ] = None,
    min_sqnr: Least = None,
    html: Page = None,
    offline: Offline = False,
    allow_pickle: Pickle = False,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = None,
    debug: Debug = False,
) -> None:
    """Compare two checkpoints tensor by tensor.

    Takes two quantized checkpoints in any format, or one and its original model. Prints the signal-to-noise ratio
    (SQNR) in dB, the worst tensor first. Also lists tensors that only one has, shapes and static scales that differ.
    The signal is the model that is not quantized, else A.
    """
    output.start(json=json, debug=debug, quiet=quiet, log_format=log_format, log_level=log_level)
    from quarkcli.api import checkpoints
    from quarkcli.cli.progress import Progress
    from quarkcli.disk import compare as comparing

    if html is not None:
        files.check_new(html, replace=True)
    with Progress("lines") as progress:
        found = checkpoints.compared(a, b, offline=offline, allow_pickle=allow_pickle, listener=progress)
    if html is not None:
        _write_page(html, found, named=not json)
    verdict.shown(lambda: comparing.check(found, min_sqnr, limit), partial(_show, found, limit, json))


def _write_page(to: Path, found: Comparison, named: bool) -> None:
    from quarkcli.reporting import reading
    from quarkcli.reporting.page import compared

    reports = (reading.read(Path(name)) if reading.has_report(Path(name)) else None for name in (found.a, found.b))
    write = files.write_named if named else files.write
    write(to, compared.page(found.as_dict(), *reports), replace=True)


def _show(found: Comparison, limit: int | None, json: bool, result: dict[str, Any]) -> None:
    if json:
        output.json_data(result)
    else:
        _show_table(found, LIMIT if limit is None else limit)


def _show_table(found: Comparison, limit: int) -> None:
    from quarkcli.disk.compare import decibels

    for line in output.pairs(_facts(found)):
        output.data(line)
    different = [row for row in found.rows if not row.identical]
    shown = different[:limit]
    if shown:
        output.data("")
        rows = [(decibels(row.sqnr), f"{row.largest:.3g}", row.a, row.b, row.name) for row in shown]
        output.table(("SQNR", "LARGEST", "A", "B", "TENSOR"), rows)
    if len(different) > len(shown):
        output.note(f"{len(different) - len(shown)} more tensors differ; --limit shows more")


def _facts(found: Comparison) -> list[tuple[str, str]]:
    from quarkcli.disk.compare import decibels

    equal = sum(row.identical for row in found.rows)
    rows = [("a", found.a), ("b", found.b)]
    if found.identical:
        return [*rows, ("tensors", f"all {equal} tensors are equal bit for bit, codes and scales included")]
    rows.append(("tensors", f"{len(found.rows)} in both checkpoints, {equal} of them equal bit for bit"))
    near = sum(row.codes and not row.identical for row in found.rows)
    if near:
        rows.append(
            ("", f"{near} with equal codes and block scales, and a per-tensor scale that differs in its last bit")
        )
    if found.rows and math.isfinite(found.sqnr):
        rows.append(("sqnr", f"{decibels(found.sqnr)} over the other tensors; the signal is {found.reference}"))
    for label, names in (("only in a", found.only_a), ("only in b", found.only_b)):
        if names:
            rows.append((label, _some(names)))
    if found.shapes:
        rows.append(("shapes", _some([f"{name} {a} and {b}" for name, (a, b) in found.shapes.items()])))
    if found.scales:
        texts = [f"{name} {_number(a)} and {_number(b)}" for name, (a, b) in found.scales.items()]
        rows.append(("scales", f"differ: {_some(texts)}"))
    if found.turned:
        rows.append(
            (
                "turned",
                f"rotated back for the comparison, because one checkpoint has a Hadamard there: {_some(found.turned)}",
            )
        )
    if found.rewritten:
        what = "their own difference says nothing of the loss, which 'quark eval' measures"
        rows.append(("rewritten", f"by an algorithm: {_some(found.rewritten)}; {what}"))
    return rows


def _some(texts: list[str]) -> str:
    return f"{len(texts)}: {some(texts)}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
