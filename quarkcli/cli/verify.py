"""`quark verify`: checks that a written checkpoint is complete and sound."""

from __future__ import annotations

from typing import Annotated

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Debug, Json, Nonfinite, Servers

SCHEMA = "quark/verify/1"
EXAMPLES = apps.examples("quark verify out/demo-mxfp4 --source demo", "quark verify out/demo-mxfp4 --json")


def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A quantized checkpoint.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="DIR_OR_ID", help="The model it was made from: all its tensors must be there."
        ),
    ] = None,
    target: Servers = "auto",
    on_nonfinite: Nonfinite = "stop",
    hashes: Annotated[
        bool | None,
        typer.Option(
            "--hashes/--no-hashes",
            help="Compare hashes with the manifest; by default up to 20 GB of files.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a quantized checkpoint.

    Files against the manifest, names, scales, the values of what was not quantized, and with --source that no tensor is
    lost. Exit 8 when something is wrong.
    """
    output.start(json=json, debug=debug)
    from quarkcli.cli.progress import Progress
    from quarkcli.disk import verify as checks
    from quarkcli.job import run as job

    with Progress("lines") as progress:
        origin = str(job.EMBEDDED) if source == "demo" else source
        found = checks.directory(directory, origin, target, on_nonfinite, progress, hashes)
    if json:
        output.json_data({"schema": SCHEMA, "directory": directory, "source": source, "ok": True, "checks": found})
        return
    for line in found:
        output.data(f"ok: {line}")
