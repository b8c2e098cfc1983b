"""`quark explain`: shows what an error code means, its causes and its cure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Json
from quarkcli.errors import UsageError, near_misses
from quarkcli.reporting.kinds import Kind, index

SCHEMA = "quark/explain/1"
EXAMPLES = apps.examples("quark explain", "quark explain E-PATTERN-NOMATCH")


def explain(
    code: Annotated[
        str | None,
        typer.Argument(metavar="CODE", help="The code in brackets after an error message. [default: list all]"),
    ] = None,
    json: Json = False,
) -> None:
    """Explain an error: its meaning, its causes and its cure.

    The code stands in brackets after the message. Without a code, lists all errors.
    """
    output.start(json=json)
    known = index()
    kinds = list(known.values()) if code is None else [_find(code, known)]
    if json:
        output.json_data({"schema": SCHEMA, "errors": [asdict(kind) for kind in kinds]})
    elif code is None:
        output.table(("CODE", "EXIT", "MEANS"), [(kind.code, _exit(kind), kind.means) for kind in kinds])
    else:
        for line in lines(kinds[0]):
            output.data(line)


def _find(code: str, known: dict[str, Kind]) -> Kind:
    """Returns the kind of a code, which may be in small letters, in brackets or without E-. Raises UsageError."""
    name = code.strip("[] ").upper()
    name = name if name.startswith("E-") else f"E-{name}"
    if name in known:
        return known[name]
    close = near_misses(name, known)
    hint = f"did you mean {' or '.join(close)}?" if close else "run 'quark explain' to list all codes"
    raise UsageError(f"no error has the code '{code}'", hint=hint, kind="E-COMMAND-LINE")


def _exit(kind: Kind) -> str:
    return " or ".join(map(str, kind.exit))


def lines(kind: Kind) -> list[str]:
    """Returns a kind of error for people."""
    rows = [("code", f"{kind.code} (exit {_exit(kind)})"), ("means", kind.means)]
    rows += [*output.listed("causes", kind.causes), ("cure", kind.cure), ("example", kind.example)]
    return output.pairs(rows)
