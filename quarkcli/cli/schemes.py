"""`quark schemes`: list, show."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.flags import Json, names
from quarkcli.errors import QuarkError

app = apps.new("Schemes: how numbers are coded.", apps.examples("quark schemes list", "quark schemes show nvfp4"))


@app.command("list", epilog=apps.examples("quark schemes list", "quark schemes list --json"))
def list_(json: Json = False) -> None:
    """List schemes.

    Those for weights are names for --scheme and --layer, the others for --kv-cache.
    """
    output.start(json=json)
    from quarkcli.cli import facts
    from quarkcli.recipe import catalog

    rows = [_facts(facts.scheme, name) for name in catalog.files("schemes")]
    rows += [_facts(facts.cache, name) for name in catalog.files("kv_cache")]
    if json:
        output.json_data({"schema": "quark/schemes/1", "schemes": rows})
        return
    shown = [
        (row["name"], row["kind"], f"{row['bits']:g}", facts.yes(row["needs_data"]), row["summary"])
        if "error" not in row
        else (row["name"], "-", "-", "-", f"not usable: {row['error']}")
        for row in rows
    ]
    output.table(("NAME", "FOR", "BITS", "DATA", "WHAT"), shown)


def _facts(read: Any, name: str) -> dict[str, Any]:
    """A file of the user's that is wrong is listed with its error."""
    try:
        found: dict[str, Any] = read(name)
    except QuarkError as error:
        return {"name": name, "error": str(error)}
    return found


@app.command("show", epilog=apps.examples("quark schemes show nvfp4", "quark schemes show fp8 --json"))
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=names("schemes"), help="A scheme's name.")],
    json: Json = False,
) -> None:
    """Show a scheme.

    Specs, bits, whether it needs data, which dialects hold it, hardware.
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
    """The weight scheme and the cache scheme of this name, whichever exist."""
    from quarkcli.cli import facts
    from quarkcli.recipe import catalog

    wanted = name.replace("-", "_").lower()
    caches = [stem for stem in catalog.files("kv_cache") if stem.replace("-", "_").lower() == wanted]
    weights = [stem for stem in catalog.files("schemes") if stem.replace("-", "_").lower() == wanted]
    if not weights and not caches:
        catalog.find("schemes", name)  # raises, with the nearest names
    return [{**facts.scheme(stem), "dialects": _dialects(stem)} for stem in weights] + [facts.cache(s) for s in caches]


def _dialects(name: str) -> dict[str, list[str]] | None:
    """Dialect -> what loads it, asked with the embedded model; None when its widths do not fit the scheme."""
    from quarkcli import dialects, family, job
    from quarkcli.plan.compose import Overrides
    from quarkcli.plan.resolve import resolve
    from quarkcli.recipe import recipe
    from quarkcli.source import Source

    source = Source.open(str(job.EMBEDDED))
    layout = family.lay_out(*family.for_checkpoint(source.config, source.headers), source.config, source.headers)
    try:
        plan = resolve(recipe.from_scheme(name), Overrides(), layout, [])
    except QuarkError:
        return None
    return {d.name: sorted(d.loaders(plan)) for d in dialects.members() if not d.refusals(plan)}


def _lines(row: dict[str, Any]) -> list[tuple[str, str]]:
    from quarkcli.cli import facts

    lines = [("name", row["name"]), ("for", row["kind"]), ("what", row["summary"])]
    lines += [(key, row[key] or "kept as it is") for key in ("weight", "input", "k", "v") if key in row]
    per = "weight, scales included" if row["kind"] == "weights" else "value"
    lines += [("bits", f"{row['bits']:g} per {per}"), ("data", f"{facts.yes(row['needs_data'])}, calibration data")]
    if row.get("dialects"):
        held = [f"{name} (loads in {', '.join(by) or 'no server'})" for name, by in row["dialects"].items()]
        lines.append(("dialects", "; ".join(held)))
    return [*lines, ("hardware", row["hardware"])] if row.get("hardware") else lines
