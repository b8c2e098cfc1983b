"""`quark models`: lists, shows and infers families."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quarkcli.cli import apps, files, output
from quarkcli.cli.completion import names
from quarkcli.cli.flags import Debug, Json, Offline, Pickle, Revision

app = apps.new(
    "List and describe model families: which tensor of a model does what.",
    apps.examples("quark models list", "quark models show llama"),
)


@app.command("list", epilog=apps.examples("quark models list", "quark models list --json"))
def list_(json: Json = False) -> None:
    """List the model families that quark knows.

    quark guesses other models from the names of their tensors, with a warning.
    """
    output.start(json=json)
    from quarkcli.cli import listings
    from quarkcli.recipe import catalog

    rows = [listings.of_file("models", path) or facts_of(name, path) for name, path in catalog.files("models").items()]
    if json:
        output.json_data({"schema": "quark/models/1", "models": rows})
        return
    shown = [
        (row["name"], output.yes(row["experts"]), ", ".join(row["model_types"]), ", ".join(row["architectures"]))
        for row in rows
    ]
    output.table(("NAME", "EXPERTS", "MODEL TYPES", "ARCHITECTURES"), shown)


def facts_of(name: str, path: Path) -> dict[str, Any]:
    """Returns the facts of a family."""
    from quarkcli import family

    card = family.card(name, path)
    return {
        "name": card.name,
        "architectures": list(card.architectures),
        "model_types": list(card.model_types),
        "experts": family.has_experts(card),
        "file": str(card.file),
    }


@app.command("show", epilog=apps.examples("quark models show kimi_k2 --resolved", "quark models show qwen3_moe --json"))
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=names("models"), help="A family's name.")],
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Also show the lines it takes over from other families.")
    ] = False,
    json: Json = False,
) -> None:
    """Print the file of a model family.

    It says what each tensor does (its role), how experts and attention are stored, and which weights share an input or
    a scale.
    """
    output.start(json=json)
    from quarkcli import family
    from quarkcli.recipe import catalog, load

    path = catalog.find("models", name)
    if json:
        found: Any = catalog.document(path).data
        if resolved:
            found = family.load(path).model_dump(exclude_defaults=True, exclude={"extends"})
        output.json_data({"schema": "quark/model/1", "name": path.stem, "file": str(path), "family": found})
    elif resolved:
        output.data(family.to_yaml(family.load(path), f"{path.stem}, with what it takes over").rstrip("\n"), whole=True)
    else:
        output.data("\n".join(load.read_text(path).splitlines()), whole=True)


@app.command(
    "infer", epilog=apps.examples("quark models infer ./new-model", "quark models infer ./new-model -o new.yaml")
)
def infer(
    model: Annotated[str, typer.Argument(metavar="DIR_OR_ID", help="Model directory, hub id, or 'demo'.")],
    to: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the family file here. [default: standard output]"),
    ] = None,
    revision: Revision = "main",
    offline: Offline = False,
    allow_pickle: Pickle = False,
    debug: Debug = False,
) -> None:
    """Guess a family file from a model's tensor names.

    The file is a start: read it, correct it, and put it into the models folder of $QUARK_HOME or ~/.config/quark.
    """
    output.start(debug=debug)
    from quarkcli import family
    from quarkcli.disk.embedded import located
    from quarkcli.disk.source import Source
    from quarkcli.job import idle
    from quarkcli.recipe import catalog

    if to is not None:
        files.check_new(to)
    source = Source.open(
        located(model), revision=revision, offline=offline, bare=True, tell=output.tell, allow_pickle=allow_pickle
    )
    for line in idle.of_model(source, revision=revision, allow_pickle=allow_pickle):
        output.warning(f"{line}")
    text = family.to_yaml(*family.guess(source.config, source.headers))
    if to is None:
        output.data(text.rstrip("\n"), whole=True)
        return
    files.write(to, text)
    output.note(f"{to}: read it, then move it into {catalog.user_folder() / 'models'}")
