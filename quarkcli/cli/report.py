"""`quark report`: shows the report of a finished run, or the state of a run under way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from quarkcli.cli import apps, files, output, tables
from quarkcli.cli.flags import Json
from quarkcli.errors import UsageError

EXAMPLES = apps.examples(
    "quark report out/demo-mxfp4",
    "quark report out/demo-mxfp4 --html page.html",
)


Form = Annotated[
    Literal["text", "md", "json"] | None,
    typer.Option("--format", help="Print text, Markdown or JSON. [default: text on a terminal, else Markdown]"),
]


def report(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A checkpoint that quark wrote, or the .partial directory of an unfinished run."
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="The page that --html writes. [default: <name of DIR>.html here]"),
    ] = None,
    form: Form = None,
    html: Annotated[bool, typer.Option("--html", help="Write a page with charts and print its name.")] = False,
    json: Json = False,
) -> None:
    """Show the report of a finished or unfinished run.

    Prints sizes, losses, what was kept and why, warnings and checks. A finished checkpoint also has it as a page with
    charts: quark/report.html.
    """
    output.start(json=json or form == "json")
    if to is not None and not html:
        raise UsageError(
            "a file works only with --html", where=str(to), hint="add --html, or leave FILE out", kind="E-FLAG-CONFLICT"
        )
    asked = [
        *(["--html"] if html else []),
        *(["--json"] if json else []),
        *([f"--format {form}"] if form is not None and not (json and form == "json") else []),
    ]
    if len(asked) > 1:
        raise UsageError(
            f"{' and '.join(asked)} exclude each other", hint="choose one form of the answer", kind="E-FLAG-CONFLICT"
        )
    from quarkcli.reporting.reading import read

    page_file = to or Path(f"{directory.resolve().name}.html")
    if html:
        files.check_new(page_file, replace=True)
    found = read(directory)
    if html:
        from quarkcli.reporting.page import page

        files.write_named(page_file, page(found), replace=True)
        return
    if json or form == "json":
        output.json_data(found)
        return
    from quarkcli.cli import summary

    if form == "md" or (form is None and tables.room() is None):
        output.data(summary.markdown(found), whole=True)
        return
    for line, heading in summary.screen(found):
        (output.heading if heading else output.data)(line)
