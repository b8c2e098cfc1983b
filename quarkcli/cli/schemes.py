"""`quark schemes`: lists and shows schemes."""

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
_WEIGHTS = "weights"
_WAYS = ["fast", "weight-only", "emulated"]
_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "tensorrt-llm": "TensorRT-LLM", "transformers": "transformers"}

app = apps.new(
    "List and describe schemes: how numbers are stored in few bits.",
    apps.examples("quark schemes list", "quark schemes show nvfp4"),
)


# Empty where they are not given: see `apps._Plain`.
Server = Annotated[
    str,
    typer.Option(
        "--server", metavar="NAME", help="Show only what this server loads: vllm, sglang, tensorrt-llm, transformers."
    ),
]
Gpu = Annotated[
    str,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="Show only what runs on this GPU, and how: h100, mi300x, or a generation such as hopper.",
    ),
]


@app.command("list", epilog=apps.examples("quark schemes list", "quark schemes list --server vllm --gpu h100"))
def list_(server: Server = "", gpu: Gpu = "", json: Json = False) -> None:
    """List schemes.

    Schemes for weights are names for --scheme and --layer, the others for --kv-cache and --attention. LOADS IN names
    the servers that load the result; a scheme without one is only for measurements. With --gpu, RUNS says how: fast,
    weight-only or emulated.
    """
    output.start(json=json)
    from quarkcli.cli import listings
    from quarkcli.recipe import catalog

    loader, generation = _asked(server, gpu)
    known = [(kind, name, path) for kind in catalog.SCHEMES for name, path in catalog.files(kind).items()]
    rows = [listings.of_file("schemes", path) or facts_of(kind, name, path) for kind, name, path in known]
    rows = sorted(
        (row for row in rows if _fits(row, loader, generation)), key=lambda row: _rank(row, loader, generation)
    )
    if json:
        asked = {"server": loader, "gpu": gpu or None, "generation": generation}
        output.json_data({"schema": "quark/schemes/1", "asked": asked, "schemes": rows})
        return
    if generation is None:
        output.table(("NAME", "FOR", "BITS", "DATA", "LOADS IN", "WHAT"), [_row(row) for row in rows])
        return
    cells = [_row(row) for row in rows]
    runs = [_runs(row, loader, generation) for row in rows]
    table = [(*cell[:4], how, cell[5]) for cell, how in zip(cells, runs, strict=True)]
    output.table(("NAME", "FOR", "BITS", "DATA", "RUNS", "WHAT"), table)
    _explain(gpu, generation, loader)


def _asked(server: str, gpu: str) -> tuple[str | None, str | None]:
    """Returns the server and the generation of the GPU that were named. Raises UsageError for unknown ones."""
    if not (server or gpu):
        return None, None
    from quarkcli import servers
    from quarkcli.job import rates

    loader = servers.named(server).name if server else None
    return loader, rates.generation(gpu) if gpu else None


def _fits(row: dict[str, Any], server: str | None, generation: str | None) -> bool:
    """Returns whether a listed scheme is loaded by the server, and run on the generation."""
    if server is None and generation is None:
        return True
    found = (row.get("servers") or {}).items()
    ways = [facts["gpus"] for name, facts in found if server in (None, name)]
    return any(generation is None or generation in gpus for gpus in ways)


def _rank(row: dict[str, Any], server: str | None, generation: str | None) -> int:
    """Returns the place of a scheme in the list: fast ones first, where a server and a GPU were named."""
    if server is None or generation is None:
        return 0
    return _WAYS.index(row["servers"][server]["gpus"][generation])


def _runs(row: dict[str, Any], server: str | None, generation: str) -> str:
    """Returns how a generation runs a scheme: one word for the server asked for, else by server."""
    ways = {name: facts["gpus"].get(generation) for name, facts in row["servers"].items()}
    if server is not None:
        return str(ways[server])
    return ", ".join(f"{_NAMES.get(name, name)} {way}" for name, way in ways.items() if way)


def _explain(gpu: str, generation: str, server: str | None) -> None:
    from quarkcli import servers

    output.note(f"{gpu} is of the generation {generation}. The facts on how servers run a scheme there come from:")
    for one in [servers.named(server)] if server is not None else map(servers.named, servers.names()):
        output.note(f"{one.title:<18}{one.kernels_from}")
    for way, meaning in servers.MEANING.items():
        output.note(f"{way:<12}{meaning}")


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
        return (row["name"], row["kind"], "-", "-", "-", f"has an error: {row['error']}")
    also = f" (also {', '.join(row['aliases'])})" if row["aliases"] else ""
    by = ", ".join(_loaders(row)) or "-"
    return (row["name"], row["kind"], f"{row['bits']:g}", output.yes(row["needs_data"]), by, row["summary"] + also)


@app.command("show", epilog=apps.examples("quark schemes show nvfp4", "quark schemes show fp8 --json"))
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=names("schemes"), help="A scheme's name.")],
    json: Json = False,
) -> None:
    """Show a scheme.

    Prints its number formats and scales, its bits, whether it needs data, which checkpoint formats hold it, which
    servers run it on which GPUs, and what it loses on models that were measured.
    """
    output.start(json=json)
    found = _find(name)
    if json:
        from quarkcli.cli import listings

        rows = [{**row, "losses": listings.losses(row["name"]) if row["kind"] == _WEIGHTS else []} for row in found]
        output.json_data({"schema": "quark/scheme/1", "schemes": rows})
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
    lines = [("name", row["name"]), ("for", row["kind"]), ("what", row["summary"])]
    if row["aliases"]:
        lines.append(("also", ", ".join(row["aliases"])))
    for_weights = row["kind"] == _WEIGHTS
    lines += row["described"].items()
    lines += [("input", "kept as it is")] if for_weights and "input" not in row["described"] else []
    per = "weight, scales included" if for_weights else "value"
    lines += [("bits", f"{row['bits']:g} per {per}"), ("data", "needed" if row["needs_data"] else "not needed")]
    lines += output.listed("dialects", _held(row))
    lines += output.listed("servers", [_served(facts) for facts in row["servers"].values()] or ["none is known"])
    lines += [("hardware", row["hardware"])] if row["hardware"] else []
    return [*lines, *output.listed("loss", _losses(row["name"]))] if for_weights else lines


def _served(facts: dict[str, Any]) -> str:
    """Returns one line: which dialects a server loads, and how it runs the scheme on which GPUs."""
    where: dict[str, list[str]] = {}
    for generation, way in facts["gpus"].items():
        where.setdefault(way, []).append(generation)
    runs = "; ".join(f"{way} on {', '.join(names)}" for way, names in where.items())
    less: dict[str, list[str]] = {}
    for generation, dialects in facts["not_in"].items():
        less.setdefault(", ".join(dialects), []).append(generation)
    barred = "".join(f"; on {', '.join(places)} not in {dialects}" for dialects, places in less.items())
    return f"{facts['title']} ({', '.join(facts['dialects'])}): {runs or 'no GPU is known to run it'}{barred}"


def _losses(name: str) -> list[str]:
    """Returns what a scheme has cost where it was measured here, a line per model and steps."""
    from quarkcli.cli import listings

    rows = listings.losses(name)
    if not rows:
        return ["not measured here; quark quantize measures it on your model"]
    return [
        f"{row['model']}, {row['steps']}: KL {row['kl']:.4f}, perplexity {row['source_perplexity']:.2f} -> "
        f"{row['perplexity']:.2f}"
        for row in rows
    ]


def _loaders(row: dict[str, Any]) -> list[str]:
    """Returns the loaders of a listed scheme in any dialect, for people."""
    return _shown(row["servers"])


def _held(row: dict[str, Any]) -> list[str]:
    """Returns a line per dialect that holds a listed scheme, with its loaders there, for people."""
    lines = []
    for name, by in row["dialects"].items():
        places = _shown(by) if _SERVER in by else [*_shown(by), "no server"]
        lines.append(f"{name}: " + (f"loads in {', '.join(places)}" if by else "no server; for measurements only"))
    return lines or ["none"]


def _shown(found: Collection[str]) -> list[str]:
    return [shown for name, shown in _NAMES.items() if name in found]
