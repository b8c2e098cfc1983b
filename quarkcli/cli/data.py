"""`quark data`: lists and previews calibration data."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Json
from quarkcli.cli.jobflags import JobFlags, takes_job_flags

if TYPE_CHECKING:
    from quarkcli.job.preview import Preview

app = apps.new(
    "List and preview calibration data.",
    apps.examples("quark data list", "quark data preview --model demo --calib-data builtin"),
)
SHOWN, CUT = 3, 400  # rows, and characters of each, that people are shown
_OF_ROWS = {
    "model", "recipe", "calib_data", "calib_samples", "calib_seqlen", "calib_column", "chat_template", "bos",
    "allow_short", "seed", "trust_remote_code", "allow_pickle", "revision", "offline", "json", "quiet", "debug",
}  # fmt: skip
_WITHOUT = set(JobFlags.__dataclass_fields__) - _OF_ROWS


@app.command("list", epilog=apps.examples("quark data list", "quark data list --json"))
def list_(json: Json = False) -> None:
    """List what --calib-data takes: special names and kinds of files."""
    output.start(json=json)
    from quarkcli.job import preview

    rows = preview.sources()
    if json:
        output.json_data({"schema": "quark/data/1", "sources": rows})
        return
    output.table(("NAME", "KIND", "WHAT"), [(row["name"], row["kind"], row["what"]) for row in rows])


@partial(takes_job_flags, without=_WITHOUT)
def preview(
    flags: JobFlags,
    *,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=0, metavar="N", help="Show N rows.", show_default=f"{SHOWN}; all with --json"),
    ] = None,
) -> None:
    """Show the calibration rows that a job would use.

    The same flags as in 'quark quantize' give the same rows. Prints their text as the tokenizer decodes it, the number
    of tokens, and how many rows of the data were skipped and why. Reads no weights.
    """
    flags.start()
    from quarkcli.cli.progress import Progress
    from quarkcli.job import preview as previewing

    with Progress("lines") as progress:
        found = previewing.preview(flags.options(), progress)
    for warning in found.warnings:
        output.warning(f"{warning}")
    if flags.json:
        output.json_data({"schema": "quark/preview/1", **found.as_dict(limit)})
    else:
        _show(found, SHOWN if limit is None else limit)


app.command(
    "preview",
    epilog=apps.examples(
        "quark data preview --model demo --calib-data builtin",
        "quark data preview --model ./my-model --calib-data chats.jsonl --calib-samples 64 --limit 1",
    ),
)(preview)


def _show(found: Preview, limit: int) -> None:
    data = found.data
    prefix = f", each begins with {found.tokenizer.decode(data.prefix)!r}" if data.prefix else ""
    rows = [
        ("source", data.source),
        ("rows", f"{len(data.tokens)} of {data.tokens.shape[1]} tokens{prefix}"),
        ("tokens", f"{data.token_count:,}"),
        *output.listed("skipped", [f"{count} x {reason}" for reason, count in data.skipped.items()]),
        ("digest", data.digest),
    ]
    for line in output.pairs(rows):
        output.data(line)
    for text in found.texts(limit):
        more = f" ... and {len(text['text']) - CUT:,} more characters" if len(text["text"]) > CUT else ""
        output.data(f"\nrow {text['row']}, {text['tokens']} tokens:\n{text['text'][:CUT]}{more}")
