"""`quark schemes`: list, show."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.completion import names
from quarkcli.cli.flags import Json
from quarkcli.errors import QuarkError

if TYPE_CHECKING:
    from quarkcli.recipe import catalog

_SERVER = "vllm"
_NAMES = {"vllm": "vLLM", "transformers": "transformers"}

app = apps.new("Schemes: how numbers are coded.", apps.examples("quark schemes list", "quark schemes show nvfp4"))


@app.command("list", epilog=apps.examples("quark schemes list", "quark schemes list --json"))
def list_(json: Json = False) -> None:
    """List schemes.

    Those for weights are names for --scheme and --layer, the others for --kv-cache and --attention. LOADS IN says what
    loads the result in some dialect; a scheme that nothing loads is there to be measured.
    """
    output.start(json=json)
    from quarkcli.cli import listings
    from quarkcli.recipe import catalog

    known = [(kind, name, path) for kind in catalog.SCHEMES for name, path in catalog.files(kind).items()]
    rows = [listings.of_file("schemes", path) or facts_of(kind, name, path) for kind, name, path in known]
    if json:
        output.json_data({"schema": "quark/schemes/1", "schemes": rows})
        return
    output.table(("NAME", "FOR", "BITS", "DATA", "LOADS IN", "WHAT"), [_row(row) for row in rows])


def facts_of(kind: catalog.Kind, name: str, path: Path) -> dict[str, Any]:
    """Returns the facts of a scheme; a file of the user's that is wrong is listed with its error."""
    from quarkcli.cli import facts
    from quarkcli.recipe import catalog

    try:
        return {**facts.scheme(kind, name, path), "error": None}
    except QuarkError as error:
        return {"name": name, "kind": catalog.SCHEMES[kind], "error": str(error)}


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    if row["error"] is not None:
        return (row["name"], row["kind"], "-", "-", "-", f"not usable: {row['error']}")
    also = f" (also {', '.join(row['aliases'])})" if row["aliases"] else ""
    by = ", ".join(_loaders(row)) or "-"
    return (row["name"], row["kind"], f"{row['bits']:g}", output.yes(row["needs_data"]), by, row["summary"] + also)


@app.command("show", epilog=apps.examples("quark schemes show nvfp4", "quark schemes show fp8 --json"))
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=names("schemes"), help="A scheme's name.")],
    json: Json = False,
) -> None:
    """Show a scheme.

    Elements, scales, groups, bits, whether it needs data, which dialects hold it and what loads them, hardware.
    """
    output.start(json=json)
    found = _find(name)
    if json:
        output.json_data({"schema": "quark/scheme/1", "schemes": found})
        return
    for number, row in enumerate(found):
        if number:
            output.data("")
        for line in output.pairs(_lines(row)):
            output.data(line)


def _find(name: str) -> list[dict[str, Any]]:
    """Returns the schemes of this name for weights, cache and attention, whichever exist."""
    from quarkcli.cli import facts
    from quarkcli.recipe import catalog

    wanted = catalog.same(name)
    paths: list[tuple[catalog.Kind, Path]] = []
    for kind in catalog.SCHEMES:
        known = catalog.names(kind)
        paths += [(kind, known[one]) for one in known if catalog.same(one) == wanted]
    if not paths:
        catalog.find("schemes", name)  # raises, with the nearest names
    return [facts.scheme(kind, path.stem, path) for kind, path in paths]


def _lines(row: dict[str, Any]) -> list[tuple[str, str]]:
    from quarkcli.recipe import catalog

    lines = [("name", row["name"]), ("for", row["kind"]), ("what", row["summary"])]
    if row["aliases"]:
        lines.append(("also", ", ".join(row["aliases"])))
    for_weights = row["kind"] == catalog.SCHEMES["schemes"]
    lines += row["described"].items()
    lines += [("input", "kept as it is")] if for_weights and "input" not in row["described"] else []
    per = "weight, scales included" if for_weights else "value"
    lines += [("bits", f"{row['bits']:g} per {per}"), ("data", "needed" if row["needs_data"] else "not needed")]
    lines += [("" if number else "dialects", text) for number, text in enumerate(_held(row))]
    return [*lines, ("hardware", row["hardware"])] if row["hardware"] else lines


def _loaders(row: dict[str, Any]) -> list[str]:
    """Returns the loaders of a listed scheme in any dialect, for people."""
    return _shown({name for by in row["dialects"].values() for name in by})


def _held(row: dict[str, Any]) -> list[str]:
    """Returns a line per dialect that holds a listed scheme, with its loaders there, for people."""
    lines = []
    for name, by in row["dialects"].items():
        places = _shown(by) if _SERVER in by else [*_shown(by), "no server"]
        lines.append(f"{name}: " + (f"loads in {', '.join(places)}" if by else "no server: simulation only"))
    return lines or ["none can hold it"]


def _shown(found: Collection[str]) -> list[str]:
    return [shown for name, shown in _NAMES.items() if name in found]
