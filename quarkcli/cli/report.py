"""`quark report`: shows the results of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Json
from quarkcli.errors import AccessError, ModelError

SCHEMA = "quark/report/2"
EXAMPLES = apps.examples("quark report out/demo-mxfp4", "quark report out/demo-mxfp4 --format json")


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that quark wrote.")],
    form: Annotated[Literal["md", "json"], typer.Option("--format", help="Markdown or JSON.")] = "md",
    json: Json = False,
) -> None:
    """Show what a finished run did.

    Sizes, loss, what was kept and why, warnings, checks.
    """
    output.start(json=json or form == "json")
    found = _read(directory)
    if output.session.json:
        output.json_data(found)
        return
    from quarkcli.cli import summary

    output.data(summary.markdown(found))


def _read(directory: Path) -> dict[str, Any]:
    from quarkcli.documents import text
    from quarkcli.documents.report import Report
    from quarkcli.documents.shape import check

    if not directory.is_dir():
        raise AccessError("no such directory", where=str(directory))
    path = directory / "quark" / "report.json"
    if not path.is_file():
        partial = directory.with_name(f"{directory.name}.partial")
        hint = f"{partial} is an unfinished run" if partial.is_dir() else "only checkpoints that quark wrote have one"
        raise ModelError("no report (quark/report.json)", where=str(directory), hint=hint)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AccessError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    found = text.parse_object(content, str(path))
    if found.get("schema") != SCHEMA:
        raise ModelError(f"not a report of the form {SCHEMA}", where=str(path))
    check(Report, found, str(path))
    return found
