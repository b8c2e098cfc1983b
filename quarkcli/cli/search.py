"""`quark search`: a mixed recipe for a budget, from what each group of weights loses in each scheme."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quarkcli.cli import apps, output
from quarkcli.cli.amounts import size
from quarkcli.cli.jobflags import JobFlags, takes_job_flags

if TYPE_CHECKING:
    from quarkcli.search.choice import Choice
    from quarkcli.search.run import Found

EXAMPLES = apps.examples(
    "quark search --model demo --schemes nvfp4,fp8 --calib-data builtin",
    "quark search --model ./my-model --schemes nvfp4,fp8,bf16 --budget 5.0 --algorithm gptq -o mixed.yaml",
)
SCHEMA = "quark/search/1"
Schemes = Annotated[
    str | None,
    typer.Option(
        "--schemes",
        "--candidates",
        metavar="NAMES",
        help="Comma list of schemes to choose among; 'bf16' leaves a weight as it is.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        min=0,
        metavar="BITS",
        help="At most so many bits per searched weight, scales included. [default: none; then only the table is made]",
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        "--size", metavar="BYTES", parser=size, help="Instead: the checkpoint's files are at most this large."
    ),
]
File = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="Instead of --schemes: an auto_quantize recipe of NVIDIA ModelOpt."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="The recipe. [default: ./<model>-<budget>bits.yaml]"),
]
Scores = Annotated[
    Path | None,
    typer.Option(
        "--scores",
        metavar="FILE",
        help="Keeps what was measured, so that another budget costs nothing. "
        "[default: <model>-<fingerprint>.scores.json beside the recipe]",
    ),
]
# Not of a search: it has its own schemes and output, works in one go, and leaves caches to `quantize`.
_WITHOUT = (
    "scheme", "recipe", "output", "layers", "layer_types", "kv_cache", "attention", "min_kv_scale", "resume",
    "time_budget", "max_cpu_mem", "max_gpu_mem", "offload", "verify", "evaluate", "keep_download",
)  # fmt: skip


@partial(takes_job_flags, without=_WITHOUT)
def search(
    flags: JobFlags,
    *,
    schemes: Schemes = None,
    budget: Budget = None,
    size: Size = None,
    recipe: File = None,
    output: Output = None,
    scores: Scores = None,
) -> None:
    """Find the best mixed recipe for a budget.

    Measures what each group of weights that servers fuse loses in each scheme, predicts the KL divergence of any mix,
    chooses the best one exactly, and writes an ordinary recipe for quantize. Shows what other budgets would lose.
    """
    from quarkcli.cli.progress import Progress
    from quarkcli.events import Message
    from quarkcli.search.run import Asked
    from quarkcli.search.run import search as run

    flags.start()
    names = [name.strip() for name in schemes.split(",")] if schemes is not None else []
    asked = Asked(flags.options(), names, recipe, budget, size, output, scores)
    with Progress(flags.progress) as progress:
        for line in flags.idle(plan=False):
            progress(Message(line, "warning"))
        found = run(asked, progress)
    if flags.json:
        _show_json(found)
    else:
        _show(found)


def _show(found: Found) -> None:
    choosing = found.choosing
    names = [candidate.name for candidate in choosing.space.candidates]
    output.table(("BITS", "SIZE", "PREDICTED KL", *(f"{name} GROUPS" for name in names)), _budgets(found, names))
    output.note(
        f"bits are of {choosing.counted:,.0f} searched weights in {len(choosing.groups)} groups; "
        f"{output.size(choosing.rest)} of other tensors are in the size"
    )
    if found.choice is None:
        output.note("no recipe is made without --budget or --size")
        return
    output.data("")
    output.table(("GROUPS", "COUNT", "SCHEME", "PREDICTED KL"), _groups(found, found.choice))
    output.data("")
    output.data(str(found.output), whole=True)
    output.note(f"scores: {found.scores}")
    output.note(f"next: quark quantize --model MODEL --recipe {found.output}")


def _budgets(found: Found, names: list[str]) -> list[tuple[str, ...]]:
    rows = [*found.curve, *([found.choice] if found.choice is not None else [])]
    rows = sorted({tuple(choice.chosen.items()): choice for choice in rows}.values(), key=lambda choice: choice.bits)
    same = found.choice.chosen if found.choice is not None else None
    return [
        (
            f"{choice.bits:.4f}{' *' if choice.chosen == same else ''}",
            output.size(choice.size),
            f"{choice.loss:.6f}",
            *(str(choice.count(name)) for name in names),
        )
        for choice in rows
    ]


def _groups(found: Found, choice: Choice) -> Iterator[tuple[str, int, str, str]]:
    """Yields rows of groups that have one scheme, numbers folded, with what they lose together."""
    from quarkcli.cli.planview import fold
    from quarkcli.recipe.match import starred

    lost: dict[tuple[str, str], float] = {}
    for group, name in choice.chosen.items():
        key = starred(group), name
        lost[key] = lost.get(key, 0.0) + found.choosing.losses[group, name]
    each = iter(lost.values())  # in the order of `fold`
    for pattern, count, name in fold(choice.chosen.items(), choice.chosen):
        yield pattern, count, name, f"{next(each):.6f}"


def _show_json(found: Found) -> None:
    choosing = found.choosing
    output.json_data(
        {
            "schema": SCHEMA,
            "output": found.output,
            "scores": found.scores,
            "measured": found.measured,
            "searched_weights": choosing.counted,
            "other_bytes": choosing.rest,
            "choice": found.choice and _choice(found.choice),
            "curve": [_choice(choice) for choice in found.curve],
            "groups": [
                {
                    "name": group.name,
                    "weights": group.weights,
                    "members": sorted(group.names),
                    "losses": {name: choosing.losses[group.name, name] for name in group.allowed},
                    "bits": {name: choosing.bits[group.name, name] / group.weights for name in group.allowed},
                }
                for group in choosing.groups
            ],
        }
    )


def _choice(choice: Choice) -> dict[str, Any]:
    return {"bits": choice.bits, "bytes": choice.size, "predicted_kl": choice.loss, "chosen": dict(choice.chosen)}
