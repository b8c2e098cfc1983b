"""`quark verify`: checks that a written checkpoint is complete and sound, and says what loads it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quarkcli.cli import apps, github, output, verdict
from quarkcli.cli.amounts import number
from quarkcli.cli.flags import Debug, Json, Nonfinite, Offline, Pickle, Quiet, Servers
from quarkcli.cli.logflags import LogFormat, LogLevel
from quarkcli.errors import UsageError

EXAMPLES = apps.examples(
    "quark verify out/demo-mxfp4 --source demo",
    "quark verify out/demo-mxfp4 --target vllm --tp 1,2,4",
)
Least = Annotated[
    float | None,
    typer.Option(
        "--min-sqnr",
        parser=number,
        metavar="DB",
        help="Lowest signal-to-noise ratio (SQNR) in dB that a decoded weight may have; needs --source.",
    ),
]


def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A quantized checkpoint.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="DIR_OR_ID",
            help="The original model. All its tensors must be there, and decoded weights must be close to its own.",
        ),
    ] = None,
    target: Servers = "auto",
    degrees: Annotated[
        str | None,
        typer.Option(
            "--tp",
            metavar="N,N...",
            help="Fail unless servers can split it over each of these numbers of devices (tensor parallel), such "
            "as 1,2,4,8.",
        ),
    ] = None,
    min_sqnr: Least = None,
    on_nonfinite: Nonfinite = "stop",
    hashes: Annotated[
        bool | None,
        typer.Option(
            "--hashes/--no-hashes",
            help="Compare the hashes of the files with the manifest. [default: for up to 20 GB of files]",
            show_default=False,
        ),
    ] = None,
    offline: Offline = False,
    allow_pickle: Pickle = False,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = None,
    debug: Debug = False,
) -> None:
    """Check a quantized checkpoint, of quark or another tool.

    Checks files against the manifest, tensor names, shapes, scales, the list of modules that are not quantized and the
    values of their tensors, and which servers load it. With --source also checks that no tensor is lost and that every
    weight decodes to nearly its old values. Ends with exit 8 if something is wrong.
    """
    output.start(json=json, debug=debug, quiet=quiet, log_format=log_format, log_level=log_level)
    from quarkcli.api import checkpoints
    from quarkcli.cli.progress import Progress

    degrees_asked = _degrees(degrees)

    def checked() -> dict[str, Any]:
        with Progress("lines") as progress:
            return checkpoints.verify(
                directory, source=source, target=target, tp=degrees_asked, min_sqnr=min_sqnr, on_nonfinite=on_nonfinite,
                hashes=hashes, offline=offline, allow_pickle=allow_pickle, listener=progress,
            )  # fmt: skip

    verdict.shown(checked, lambda found: _show(found, json))


def _show(found: dict[str, Any], json: bool) -> None:
    lines = [f"ok: {line}" for line in found["checks"]]
    output.summarize(github.section(f"quark verify {found['directory']}", [f"- {line}" for line in lines]))
    if json:
        output.json_data(found)
        return
    for line in lines:
        output.data(line)


def _degrees(text: str | None) -> tuple[int, ...]:
    """Returns the numbers of `1,2,4`. Raises UsageError."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 5 and int(part) for part in parts):
        raise UsageError(
            f"'{text}' is not a list of numbers of devices",
            where="--tp",
            hint="write --tp 1,2,4",
            kind="E-FLAG-VALUE",
        )
    return tuple(dict.fromkeys(int(part) for part in parts))
