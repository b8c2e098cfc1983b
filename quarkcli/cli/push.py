"""`quark push`: uploads a finished checkpoint to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Debug, Json, Quiet
from quarkcli.cli.logflags import LogFormat, LogLevel

SCHEMA = "quark/push/1"
EXAMPLES = apps.examples(
    "quark push out/demo-mxfp4 my-org/demo-mxfp4 --private",
    "quark push out/demo-mxfp4 my-org/demo-mxfp4 --overwrite --json",
)


def push(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A finished checkpoint.")],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="Repository on the hub; it is made if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you can see.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace everything in the repository, in one commit.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = None,
    debug: Debug = False,
) -> None:
    """Upload a checkpoint to the hub.

    Runs 'quark verify' first and sends nothing that fails it (exit 8). One commit holds all files of the manifest and
    the model card. Uses the token in HF_TOKEN or of 'hf auth login'.
    """
    output.start(json=json, debug=debug, quiet=quiet, log_format=log_format, log_level=log_level)
    from quarkcli.cli.progress import Progress
    from quarkcli.disk import push as pushing
    from quarkcli.disk.side_files import README
    from quarkcli.reporting.card import licence

    folder = Path(directory)
    card = folder / README
    if not licence(card if card.is_file() else None):
        output.warning(
            "the model card names no licence; the licence of the original model applies, so add 'license:' to README.md"
        )
    with Progress("lines") as progress:
        found = pushing.push(folder, repository, private=private, overwrite=overwrite, tell=progress)
    if overwrite and not found["removed"]:
        output.warning("--overwrite is not used: the repository held no other files")
    if json:
        output.json_data({"schema": SCHEMA, **found})
        return
    rows = [("repository", found["url"]), ("commit", found["commit"])]
    rows.append(("files", f"{len(found['files'])}, {output.size(found['bytes'])}"))
    if found["removed"]:
        rows.append(("removed", f"{len(found['removed'])} files of before"))
    for line in output.pairs(rows):
        output.data(line)
