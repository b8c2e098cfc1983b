"""`quark convert`: writes a quantized checkpoint in another dialect, without rounding again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Debug, Json, Pickle, Quiet, Threads
from quarkcli.cli.logflags import LogFormat, LogLevel

EXAMPLES = apps.examples(
    "quark convert out/demo-nvfp4 --to quark -o out/demo-nvfp4-quark",
    "quark convert out/demo-nvfp4 --to quark -o out/demo-nvfp4-quark --overwrite --json",
)


def convert(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A quantized checkpoint, in any checkpoint format that quark reads.")
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="DIALECT", help="Checkpoint format (dialect) to write, such as modelopt.")
    ],
    to_output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Write the new checkpoint here.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output directory that exists already.")
    ] = False,
    threads: Threads = None,
    allow_pickle: Pickle = False,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = None,
    debug: Debug = False,
) -> None:
    """Write a quantized checkpoint in another checkpoint format.

    Codes and scales stay as they are; every written tensor is read back and compared. Only a scale of a whole tensor
    may differ in its last bit, where one of the formats stores the inverse. If the format cannot hold a tensor, the
    command stops (exit 4) and says which one and why. The result is as complete as one of 'quark quantize'.
    """
    output.start(json=json, debug=debug, quiet=quiet, log_format=log_format, log_level=log_level)
    from quarkcli.api import checkpoints
    from quarkcli.cli.progress import Progress

    with Progress("lines") as progress:
        found = checkpoints.convert(
            directory, to, to_output, overwrite=overwrite, threads=threads, allow_pickle=allow_pickle, listener=progress
        )
    if json:
        output.json_data(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    loads = ", ".join(found["loads_in"]) or "no server that quark knows"
    rows = [
        ("output", found["directory"]),
        ("dialect", f"{found['from']} -> {found['to']}; loads in: {loads}"),
        ("weights", f"{found['weights']} with their old codes and scales"),
        ("size", output.size(found["bytes"])),
    ]
    if found["one_ulp_off"]:
        what = "have a per-tensor scale that differs in its last bit, because one format stores its inverse"
        rows.append(("", f"{len(found['one_ulp_off'])} of them {what}"))
    for line in output.pairs(rows):
        output.data(line)
