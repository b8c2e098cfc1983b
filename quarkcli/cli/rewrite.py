"""`quark recipes normalize`, `convert`, `schema`: turns old forms of recipes into today's form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quarkcli.cli import files, output
from quarkcli.cli.flags import Json

Old = Annotated[str, typer.Argument(metavar="NAME_OR_FILE", help="A recipe, or a config of ModelOpt or Quark.")]


def normalize(name: Old, json: Json = False) -> None:
    """Print a recipe as one ordered list of entries.

    Takes any form: quark's, ModelOpt's and Quark's recipes, presets, bare lists and dicts, and the config of a
    checkpoint.
    """
    output.start(json=json)
    from quarkcli.recipe import catalog, convert, recipe

    found = recipe.from_file(catalog.find_recipe(name))
    rows = convert.canonical(found)
    for note in found.notes:
        output.note(f"note: {note}")
    if json:
        output.json_data({"schema": "quark/entries/1", "file": found.file, "entries": rows, "notes": found.notes})
        return
    for line in convert.as_lines(rows):
        output.data(line)


def convert(
    name: Old,
    to: Annotated[Path, typer.Option("--output", "-o", metavar="NEW.yaml", help="Write it to this new file.")],
) -> None:
    """Write a recipe of any form as a native one with comments; the plan is the same. Never replaces a file."""
    output.start()
    from quarkcli.recipe import catalog, recipe
    from quarkcli.recipe.convert import as_native

    files.check_new(to)
    found = recipe.from_file(catalog.find_recipe(name))
    for note in found.notes:
        output.note(f"note: {note}")
    files.write_named(to, as_native(found))


def schema(
    to: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it to this file instead of printing it."),
    ] = None,
) -> None:
    """Print the JSON Schema of a native recipe file, for editors and other checkers."""
    output.start()
    import json

    from quarkcli.recipe.schema import json_schema

    if to is None:
        output.data(json.dumps(json_schema(), indent=2), whole=True)
    else:
        files.write_named(to, json.dumps(json_schema(), indent=2) + "\n")
