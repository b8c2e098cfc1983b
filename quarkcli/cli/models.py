"""`quark models`: list, show."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Json, names

app = apps.new("Model families: roles of tensors.", apps.examples("quark models list", "quark models show llama"))


@app.command("list", epilog=apps.examples("quark models list", "quark models list --json"))
def list_(json: Json = False) -> None:
    """List the families that are described.

    Roles of other models are inferred from tensor names, with a warning.
    """
    output.start(json=json)
    from quarkcli import family
    from quarkcli.recipe import catalog

    rows: list[dict[str, Any]] = []
    for name, path in catalog.files("models").items():
        found = family.load(path)
        rows.append(
            {
                "name": name,
                "architectures": found.architectures,
                "model_types": found.model_types,
                "experts": found.experts is not None,
                "file": str(path),
            }
        )
    if json:
        output.json_data({"schema": "quark/models/1", "models": rows})
        return
    shown = [
        (row["name"], "yes" if row["experts"] else "no", ", ".join(row["model_types"]), ", ".join(row["architectures"]))
        for row in rows
    ]
    output.table(("NAME", "EXPERTS", "MODEL TYPES", "ARCHITECTURES"), shown)


@app.command("show", epilog=apps.examples("quark models show llama", "quark models show qwen3_moe --json"))
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=names("models"), help="A family's name.")],
    json: Json = False,
) -> None:
    """Print a family's file.

    Roles, experts, attention, and what shares an input or a scale.
    """
    output.start(json=json)
    from quarkcli.recipe import catalog

    path = catalog.find("models", name)
    if json:
        found = catalog.document(path).data
        output.json_data({"schema": "quark/model/1", "name": path.stem, "file": str(path), "family": found})
    else:
        output.data(path.read_text(encoding="utf-8").rstrip("\n"))
