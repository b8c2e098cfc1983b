"""`quark recipes explain`: says why a slot of a model ends as it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quarkcli.cli import output
from quarkcli.cli.completion import names
from quarkcli.cli.flags import Json, Pickle

if TYPE_CHECKING:
    from quarkcli.plan.explain import Explanation


def explain(
    name: Annotated[
        str, typer.Argument(metavar="NAME_OR_FILE", autocompletion=names("ptq"), help="Name of a recipe, or a file.")
    ],
    slot: Annotated[
        str,
        typer.Argument(
            metavar="MODULE",
            help="A module, or one of its quantizers, such as model.layers.0.mlp.up_proj.weight_quantizer.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option("--model", metavar="DIR_OR_ID", help="Model directory, hub id, or 'demo' for the embedded model."),
    ],
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Explain why a module is or is not quantized: the entries that match it in order, and the one that decides."""
    output.start(json=json)
    from quarkcli import family
    from quarkcli.disk.origin import open_weights
    from quarkcli.job import idle
    from quarkcli.job import run as job
    from quarkcli.job.options import Options
    from quarkcli.plan.compose import Overrides
    from quarkcli.plan.explain import explain as explained
    from quarkcli.plan.resolve import resolve

    options = Options(model=model, recipe=name, allow_pickle=allow_pickle)
    recipe, source = job.load_recipe(options), job.open_source(options, output.tell)
    for line in idle.of_model(source, allow_pickle=allow_pickle):
        output.warning(f"{line}")
    headers = open_weights(source)[0].headers
    layout = family.lay_out(*family.for_checkpoint(source.config, headers), source.config, headers)
    found = explained(resolve(recipe, Overrides(), layout), slot)
    if json:
        output.json_data(found.as_json())
    else:
        _show(found)


def _show(found: Explanation) -> None:
    facts = found.facts()
    rows = [("slot", found.slot), ("also called", ", ".join(found.names[1:])), ("role", found.role)]
    rows += [("ends as", facts["spec"] or "not quantized"), ("although", found.idle or "")]
    rows += [("rule", ", then ".join(filter(None, facts["rule"])))]
    rows += [
        ("measured at", found.site or ""),
        ("read by", _some(found.readers)),
        ("shared with", _some(found.sharers)),
    ]
    for line in output.pairs([(label, text) for label, text in rows if text]):
        output.data(line)
    output.data("")
    matches = [
        (
            "*" if match.decides else "",
            match.entry.quantizer_path,
            match.effect,
            match.after.describe() if match.after is not None else "-",
            str(match.entry.origin),
        )
        for match in found.matches
    ]
    output.table(("", "ENTRY", "WHAT IT DOES", "SPEC THEN", "WRITTEN IN"), matches)
    if found.decided is None:
        output.data("no entry of the recipe matches this quantizer")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
