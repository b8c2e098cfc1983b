"""`quark recipes`: lists, shows, validates and copies recipes; `rewrite` and `explain` add the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quarkcli import memory
from quarkcli.cli import apps, explain, files, output, rewrite, tables
from quarkcli.cli.completion import names
from quarkcli.cli.flags import Json, Pickle
from quarkcli.errors import QuarkError, UsageError

app = apps.new(
    "Work with recipes: files that say what to quantize and how.",
    apps.examples("quark recipes list", "quark recipes copy nvfp4 my-recipe.yaml"),
)
MORE = "'quark recipes show NAME' says what one is for; a wider terminal shows more here."
_HEAD = ("NAME", "BITS", "DATA", "KV CACHE", "ALGORITHM", "PURPOSE", "HARDWARE")
Name = Annotated[
    str, typer.Argument(metavar="NAME_OR_FILE", autocompletion=names("ptq"), help="Name of a recipe, or a file.")
]


@app.command("list", epilog=apps.examples("quark recipes list", "quark recipes list --json"))
def list_(json: Json = False) -> None:
    """List the built-in recipes and those in your own folder.

    Your own folder is $QUARK_HOME/ptq, or ~/.config/quark/ptq.
    """
    output.start(json=json)
    from quarkcli.cli import listings
    from quarkcli.recipe import catalog

    with memory.without_collection():
        known = catalog.files("ptq")
        rows = [listings.of_file("recipes", path) or facts_of(name, path) for name, path in known.items()]
    if json:
        output.json_data({"schema": "quark/recipes/1", "recipes": rows})
        return
    cells = [_row(row) for row in rows]
    width = tables.room()
    if width is None or tables.fits(_HEAD, cells, width):
        output.table(_HEAD, cells)
    else:
        _grouped(cells, width)


def _grouped(rows: list[tuple[str, ...]], width: int) -> None:
    """Prints a line for each recipe, under the hardware that it is for: whole names, and what there is room for."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        groups.setdefault(row[-1] if row[-1] not in ("", "-") else "other", []).append(row)
    heads = [_HEAD[:count] for count in range(len(_HEAD) - 1, 0, -1)]
    head = next((head for head in heads if tables.fits(head, [row[: len(head)] for row in rows], width)), _HEAD[:1])
    first, *lines = tables.table(head, [row[: len(head)] for row in rows], None)
    shown = dict(zip((row[0] for row in rows), lines, strict=True))
    output.data(first)
    for hardware, group in groups.items():
        output.data(f"{hardware}:")
        for row in group:
            output.data(shown[row[0]])
    if head != _HEAD[:-1]:
        output.data(MORE)


def facts_of(name: str, path: Path) -> dict[str, Any]:
    """Returns the facts of a recipe; a file of the user's that is wrong is listed with its error."""
    from quarkcli.cli import facts
    from quarkcli.recipe import recipe

    try:
        return {**facts.recipe(recipe.from_file(path)), "name": name, "error": None}
    except QuarkError as error:
        return {"name": name, "file": str(path), "error": str(error)}


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    if row["error"] is not None:
        return (row["name"], "-", "-", "-", "-", f"has an error: {row['error']}", "-")
    bits = ", ".join(f"{value:g}" for value in row["bits"])
    algorithm = ", ".join(row["algorithms"]) or "-"
    return (
        row["name"],
        bits,
        output.yes(row["needs_data"]),
        row["kv_cache"] or "-",
        algorithm,
        row["purpose"],
        row["hardware"],
    )


@app.command("show", epilog=apps.examples("quark recipes show nvfp4", "quark recipes show my-recipe.yaml --json"))
def show(
    name: Name,
    resolved: Annotated[
        bool,
        typer.Option(
            "--resolved", help="Replace imports by their content and write out every entry, as a native recipe."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Print a recipe's file."""
    output.start(json=json)
    from quarkcli.recipe import catalog, load

    path = catalog.find_recipe(name)
    if resolved:
        _show_resolved(path, json)
        return
    document = catalog.document(path)
    if json:
        output.json_data({"schema": "quark/recipe-file/1", "file": str(path), "recipe": document.data})
    else:
        output.data("\n".join(load.read_text(path).splitlines()), whole=True)


def _show_resolved(path: Path, json: bool) -> None:
    from quarkcli.recipe import load, recipe
    from quarkcli.recipe.convert import as_native

    text = as_native(recipe.from_file(path))
    if json:
        data = load.parse(text, str(path)).data
        output.json_data({"schema": "quark/recipe-file/1", "file": str(path), "recipe": data})
    else:
        output.data(text.rstrip("\n"), whole=True)


app.command(
    "normalize", epilog=apps.examples("quark recipes normalize old.json", "quark recipes normalize mxfp4 --json")
)(rewrite.normalize)
app.command(
    "convert",
    epilog=apps.examples(
        "quark recipes convert old.yaml -o new.yaml", "quark recipes convert NVFP4_DEFAULT_CFG -o new.yaml"
    ),
)(rewrite.convert)
app.command("schema", epilog=apps.examples("quark recipes schema", "quark recipes schema -o recipe.schema.json"))(
    rewrite.schema
)
app.command(
    "explain",
    epilog=apps.examples(
        "quark recipes explain nvfp4 model.layers.0.mlp.up_proj --model demo",
        "quark recipes explain my-recipe.yaml lm_head.weight_quantizer --model demo --json",
    ),
)(explain.explain)


@app.command(
    "validate",
    epilog=apps.examples("quark recipes validate my-recipe.yaml", "quark recipes validate nvfp4 --model demo --json"),
)
def validate(
    name: Name,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="DIR_OR_ID", help="Also check it against this model; 'demo' is the embedded one."
        ),
    ] = None,
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Check a recipe.

    Checks its form, names and values. With --model also checks every pattern and shape, and that a checkpoint can hold
    the result.
    """
    output.start(json=json)
    from quarkcli.job import asked
    from quarkcli.recipe import catalog, recipe

    if allow_pickle and model is None:
        what = "needs --model: only a model is read from pickle files"
        raise UsageError(what, where="--allow-pickle", hint="add --model DIR_OR_ID", kind="E-FLAG-CONFLICT")
    path = catalog.find_recipe(name)
    found = recipe.from_file(path, also=asked.mistakes)
    asked.check(found)
    if found.dialect is not None:
        from quarkcli import dialects

        dialects.asked_for(found.dialect)
    resolved = _against(path, model, found.calib_data, allow_pickle) if model is not None else None
    answer = {"file": str(path), "entries": len(found.entries), "model": model, "plan": resolved}
    if json:
        output.json_data({"schema": "quark/validation/1", **answer})
        return
    output.data(f"ok: {path} has {len(found.entries)} entries")
    if resolved is not None:
        output.data(f"ok: it quantizes {resolved['quantized']} of {resolved['modules']} modules of {model}")
        for warning in resolved["warnings"]:
            output.warning(f"{warning}")


def _against(path: Path, model: str, data: str | None, allow_pickle: bool) -> dict[str, Any]:
    """Returns the plan's essentials.

    Without data of its own the built-in text stands in, so that no network is asked.
    """
    from quarkcli.job import idle
    from quarkcli.job import run as job
    from quarkcli.job.options import Options

    options = Options(model=model, recipe=str(path), calib_data=data or "builtin", allow_pickle=allow_pickle)
    prepared = job.prepare(options, output.tell)
    plan = prepared.plan
    unused = idle.of_model(prepared.source, allow_pickle=allow_pickle)
    return {
        "modules": len(plan.targets),
        "quantized": sum(1 for _ in plan.quantized()),
        "dialect": ",".join(one.dialect.name for one in prepared.every),
        "needs_data": bool(prepared.needs),
        "warnings": [*unused, *plan.warnings],  # those about calibration data concern a run
    }


@app.command(
    "copy",
    epilog=apps.examples("quark recipes copy nvfp4 my-recipe.yaml", "quark recipes copy int4_wo_128-gptq recipes/"),
)
def copy(
    name: Name,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="A new file, or a directory that exists.")],
) -> None:
    """Copy a recipe as a start for your own.

    Prints the name of the new file. Never replaces a file.
    """
    output.start()
    from quarkcli.recipe import catalog

    path = catalog.find_recipe(name)
    if destination.endswith("/"):
        files.check_folder(Path(destination))
    to = Path(destination)
    files.write_named(to / path.name if to.is_dir() else to, path.read_text(encoding="utf-8"))
