"""`quark report`: shows the results of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Json

EXAMPLES = apps.examples("quark report out/demo-mxfp4", "quark report out/demo-mxfp4 --format json")


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that quark wrote.")],
    form: Annotated[Literal["md", "json"], typer.Option("--format", help="Markdown or JSON.")] = "md",
    json: Json = False,
) -> None:
    """Show what a finished run did.

    Sizes, loss, what was kept and why, warnings, checks.
    """
    json = json or form == "json"
    output.start(json=json)
    from quarkcli.report.reading import read

    found = read(directory)
    if json:
        output.json_data(found)
        return
    from quarkcli.cli import summary

    output.data(summary.markdown(found))
