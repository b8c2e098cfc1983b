"""`quark init`: writes a recipe to start from, with a reason for each choice."""

from __future__ import annotations

import json as jsons
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quarkcli.cli import again, apps, files, output
from quarkcli.cli.flags import Debug, Json, Offline, Pickle, Revision

if TYPE_CHECKING:
    from quarkcli.job.choosing import Choice, Wish

EXAMPLES = apps.examples(
    "quark init demo --gpu h100 --server vllm",
    "quark init ./my-model --gpu mi300x --server vllm -o recipe.yaml",
)
Server = Annotated[
    str,
    typer.Option(
        "--server", metavar="NAME", help="Server that will load it: vllm, sglang, tensorrt-llm, transformers."
    ),
]
_COMMENT = 110  # columns of a comment
_ROWS, _LENGTH = 512, 512


def init(
    model: Annotated[str, typer.Argument(metavar="DIR_OR_ID", help="Model directory, hub id, or 'demo'.")],
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="GPU that will serve the model: h100, b200, mi300x, or a generation such as hopper.",
        ),
    ],
    server: Server = "vllm",
    tp: Annotated[
        int, typer.Option("--tp", min=1, metavar="N", help="GPUs that share the model (tensor parallel).")
    ] = 1,
    to: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the recipe to this new file. [default: standard output]"
        ),
    ] = None,
    revision: Revision = "main",
    offline: Offline = False,
    allow_pickle: Pickle = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a recipe for a model, a GPU and a server. Comments give the reason for each choice.

    Fixed rules choose the scheme, the algorithms, the KV cache and the checkpoint format. Reads only the config and the
    headers of the weight files. The recipe runs as it is: quark quantize --model MODEL --recipe FILE.
    """
    output.start(json=json, debug=debug)
    if to is not None:
        files.check_new(to)
    from quarkcli.job import choosing, idle
    from quarkcli.job.options import Options

    wish = choosing.Wish.of(gpu, server, tp)
    asked = Options(model=model, revision=revision, offline=offline, allow_pickle=allow_pickle)
    found = choosing.choose(asked, wish, output.tell)
    for line in idle.of_model(found.prepared.source, revision=revision, allow_pickle=allow_pickle):
        output.warning(line)
    if found.stored is not None:
        output.note(found.stored.said(wish))
    text = recipe_text(found, wish, model, str(to) if to is not None else "FILE")
    if to is not None:
        files.write(to, text)
    if json:
        output.json_data({"schema": "quark/init/1", **_facts(found, wish), "file": to and str(to), "recipe": text})
    else:
        output.data(str(to) if to is not None else text.rstrip("\n"), whole=True)


def _facts(choice: Choice, wish: Wish) -> dict[str, Any]:
    return {
        "model": choice.prepared.source.name, "gpu": wish.gpu, "generation": wish.generation,
        "server": wish.server.name, "tp": wish.tp, "scheme": choice.row.scheme, "runs": choice.way,
        "algorithms": [name for name, _ in choice.steps], "kv_cache": choice.cache,
        "dialect": choice.prepared.dialect.name, "passed_over": choice.passed_over,
        "source": choice.stored and {"stored": choice.stored.words, "refused": choice.stored.refused or None,
                                     "runs": choice.stored.way, "bytes": choice.stored.size},
    }  # fmt: skip


def recipe_text(choice: Choice, wish: Wish, model: str, file: str) -> str:
    """Returns the recipe's text, a comment before each choice."""
    prepared = choice.prepared
    needs_data = prepared.calibration is not None
    given = f"{shlex.quote(model)}{again.flags(prepared.options, again.OPENED)}"
    lines = [
        *_comment(f"Made by: quark init {given} --gpu {wish.gpu} --server {wish.server.name}"
                  + (f" --tp {wish.tp}" if wish.tp > 1 else "")),
        *_comment(f"Run it:  quark quantize --model {given} --recipe {shlex.quote(file)} -o OUT"),
        "schema: quark/recipe/1",
        "metadata:",
        f"  description: {_scalar(f'{choice.row.scheme} for {_model(choice)}, on {wish.gpu} with {wish.server.name}')}",
        "quantize:",
        *_comment(_scheme(choice, wish), 2),
        *(line for name, why in choice.passed_over.items() for line in _comment(f"Not {name}: {why}.", 2)),
        *(_comment(f"{_sentence(choice.stored.said(wish))}; this rounds it once more.", 2) if choice.stored else []),
        *_what(choice),
        *_comment(f"{_sentence(choice.steps_why)}.", 2),
        "  algorithm:",
        *(f"    - {jsons.dumps({'method': name, **parameters})}" for name, parameters in choice.steps),
        *_comment(f"KV cache: {choice.cache_why}.", 2),
        f"  kv_cache: {choice.cache}",
        *_comment("Routers, norms, embedding and head stay as they are: quantizing them loses much and saves little."),
        "exclusions: default",
        *(_calibration(choice) if needs_data else _comment("No calibration data is needed.")),
        *_comment(f"{wish.server.title} loads this dialect (layout of the files); 'quark plan' lists other servers."),
        "export:",
        f"  dialect: {prepared.dialect.name}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _what(choice: Choice) -> list[str]:
    """Returns what is quantized: the scheme, or its entries where they are for some modules alone."""
    if not choice.entries:
        return [f"  scheme: {choice.row.scheme}"]
    return ["  quant_cfg:", *(f"    - {jsons.dumps(entry)}" for entry in choice.entries)]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _model(choice: Choice) -> str:
    """Returns the model in words: `Qwen3MoeForCausalLM (30.5 B parameters, mixture of experts)`."""
    prepared = choice.prepared
    total = sum(prepared.coverage.total.values())
    kind = "mixture of experts" if _has_experts(choice) else "dense"
    name = ", ".join(prepared.source.config.get("architectures") or [prepared.source.name])
    count = f"{total / 1e9:.1f} B" if total >= 1e9 else f"{total / 1e6:.1f} M"
    return f"{name} ({count} parameters, {kind})"


def _has_experts(choice: Choice) -> bool:
    return any(target.expert is not None for target in choice.prepared.plan.targets.values())


def _scheme(choice: Choice, wish: Wish) -> str:
    from quarkcli import servers

    size = choice.prepared.forecast
    return (
        f"{choice.row.scheme}: {choice.row.why}. {wish.server.title} runs it {choice.way} on {wish.generation}: "
        f"{servers.MEANING[choice.way]}. {output.size(size.source_bytes)} become {output.size(size.output_bytes)}."
    )


def _calibration(choice: Choice) -> Iterator[str]:
    from quarkcli import family

    limit = family.position_limit(choice.prepared.source.config)
    yield from _comment(
        "Give text like yours: a line 'data: chats.jsonl' here, or --calib-data. Without it quark takes a general data "
        "set of the hub, or a text that comes with quark."
    )
    yield "calibration:"
    yield f"  samples: {_ROWS}"
    yield f"  seqlen: {min(_LENGTH, limit or _LENGTH)}"
    if _has_experts(choice):
        yield from _comment("Each expert is calibrated on the tokens that are routed to it, as in a server.", 2)
        yield "  moe: routed"


def _comment(text: str, indent: int = 0) -> list[str]:
    lead = f"{' ' * indent}# "
    return [f"{lead}{line}" for line in wrap(text, _COMMENT - indent, break_long_words=False, break_on_hyphens=False)]


def _scalar(text: str) -> str:
    return jsons.dumps(text, ensure_ascii=False)
