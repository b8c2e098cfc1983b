"""`quark algorithms`: lists and shows algorithms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Json
from quarkcli.errors import UsageError

if TYPE_CHECKING:
    from quarkcli.algorithms.base import Algorithm
    from quarkcli.plan.model import Plan

app = apps.new(
    "List and describe algorithms, which lose less accuracy than rounding to nearest.",
    apps.examples("quark algorithms list", "quark algorithms show gptq"),
)
_SCHEME = "nvfp4"  # of the plan of the embedded model, by which needs are told: weights and inputs are quantized in it
_WORDS = {
    "absmax": "ranges",
    "channel_absmax": "ranges per channel",
    "mean_abs": "mean magnitudes",
    "gram": "second moments",
    "gram_val": "second moments of held-out tokens",
    "cross": "cross moments with the original",
    "samples": "sampled rows",
    "outputs": "outputs of blocks",
}


def complete() -> list[str]:
    """Returns the names for the shell."""
    from quarkcli import algorithms

    return algorithms.names()


@app.command("list", epilog=apps.examples("quark algorithms list", "quark algorithms list --json"))
def list_(json: Json = False) -> None:
    """List algorithms.

    Their names are for --algorithm, in the order in which they run: transforms (rewrite weights first), one solver for
    each weight (chooses its codes), tuners (train afterwards). DATA says what they need from calibration, RUNS how
    often they run the model.
    """
    output.start(json=json)
    rows = known()
    if json:
        output.json_data({"schema": "quark/algorithms/1", "algorithms": rows})
        return
    shown = [(r["name"], r["kind"], _data(r), _runs(r), r["summary"]) for r in rows]
    output.table(("NAME", "KIND", "DATA", "RUNS", "WHAT"), shown)


@app.command("show", epilog=apps.examples("quark algorithms show gptq", "quark algorithms show gptq --json"))
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete, help="An algorithm's name.")],
    json: Json = False,
) -> None:
    """Show an algorithm.

    Prints what it does, its parameters and their defaults, the data it needs, and how often it runs the model.
    """
    output.start(json=json)
    wanted = name.replace("_", "-").lower()
    rows = {row["name"]: row for row in known()}
    row = rows[wanted] if wanted in rows else _unknown(name)
    if json:
        output.json_data({"schema": "quark/algorithm/1", "algorithm": row})
        return
    parameters = [f"{row['name']}.{key}={_yaml(value)}" for key, value in row["parameters"].items()]
    lines = [
        ("name", row["name"]),
        ("kind", row["kind"]),
        ("what", row["summary"]),
        *output.listed("--set", parameters or ["no parameters"]),
        ("data", _data(row)),
        ("runs", _runs(row)),
        (
            "memory",
            f"{output.size(row['memory_bytes'])} for a weight of 4096 x 4096, in addition to the tensors of the layer",
        ),
    ]
    for line in output.pairs(lines):
        output.data(line)
    for text in (row["about"], row["about_parameters"]):
        if text:
            output.data(f"\n{text}")


def known() -> list[dict[str, Any]]:
    """Returns the facts of every algorithm, as they were shipped, or computed where recipe files were changed."""
    from quarkcli.cli import listings

    return list(listings.shipped("algorithms").values()) or facts()


def facts() -> list[dict[str, Any]]:
    """Returns the facts of every algorithm, told by a plan of the embedded model in nvfp4.

    data     kinds of statistics that it asks for
    prepass  kinds that it asks for before part 0
    streams  whose activations it looks at: those behind quantized blocks, those of the source
    """
    from quarkcli import algorithms
    from quarkcli.cli.facts import one_linear
    from quarkcli.job import run as job
    from quarkcli.job.options import Options

    plan = job.prepare(Options(model="demo", scheme=_SCHEME, calib_data="builtin")).plan
    large = one_linear(_SCHEME)
    return [_facts(algorithms.create(name, {}), plan, large) for name in algorithms.names()]


def _unknown(name: str) -> NoReturn:
    from quarkcli import algorithms

    try:
        algorithms.create(name, {})
    except UsageError as error:
        raise UsageError(error.what, hint=error.hint, kind="E-ALGORITHM-UNKNOWN") from error
    raise AssertionError(name)


def _facts(algorithm: Algorithm, plan: Plan, large: Plan) -> dict[str, Any]:
    import inspect
    import sys

    from quarkcli.algorithms.base import Assignment

    text = inspect.cleandoc(sys.modules[type(algorithm).__module__].__doc__ or "")
    summary, _, about = text.partition("\n\n")
    kinds = [kind for kind in type(algorithm).__mro__ if kind.__module__.startswith("quarkcli.algorithms.")]
    documented = [kind.__doc__ for kind in reversed(kinds) if not kind.__module__.endswith(".base")]
    own = "\n\n".join(inspect.cleandoc(each) for each in documented if each)
    step = Assignment(algorithm)
    return {
        "name": algorithm.name,
        "kind": algorithm.kind,
        "summary": " ".join(summary.split()),
        "about": about,
        "about_parameters": own,
        "parameters": dict(algorithm.parameters),
        "data": _kinds(step.needs(plan)),
        "prepass": _kinds(step.prepass(plan)),
        "streams": sorted(algorithm.streams),
        "memory_bytes": step.memory(large),
    }


def _kinds(needs: dict[str, set[str]]) -> list[str]:
    return sorted({kind for kinds in needs.values() for kind in kinds})


def _data(row: dict[str, Any]) -> str:
    return ", ".join(_WORDS.get(kind, kind) for kind in dict.fromkeys([*row["prepass"], *row["data"]])) or "-"


def _runs(row: dict[str, Any]) -> str:
    """Returns the runs of the model that an algorithm costs, beside writing it."""
    found = ["one"] if row["data"] else []
    found += ["one of the original before"] if row["prepass"] else []
    found += ["one of the original beside"] if "source" in row["streams"] else []
    found += ["many of each block, with gradients"] if row["kind"] == "tuner" else []
    return ", ".join(found) or "-"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
