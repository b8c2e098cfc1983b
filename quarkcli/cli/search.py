"""`quark search`: finds a mixed recipe for a budget, from the loss of each group of weights in each scheme."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quarkcli.cli import again, apps, output
from quarkcli.cli.amounts import amount, size
from quarkcli.cli.flags import Nonfinite
from quarkcli.cli.jobflags import JobFlags, takes_job_flags

if TYPE_CHECKING:
    from quarkcli.job.options import Options
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
        help="Schemes to choose among, such as nvfp4,fp8; 'bf16' leaves a weight as it is.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        parser=amount,
        metavar="BITS",
        help="Most bits per searched weight on average, scales included. [default: none; then only the table is made]",
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        metavar="BYTES",
        parser=size,
        help="Instead of --budget: the largest size of the checkpoint's files, such as 6GB.",
    ),
]
File = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="Instead of --schemes: a recipe of NVIDIA ModelOpt with an auto_quantize section.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write the recipe to this file. [default: ./<model>-<budget>bits.yaml]"
    ),
]
Scores = Annotated[
    Path | None,
    typer.Option(
        "--scores",
        metavar="FILE",
        help="File that keeps the measurements, so that another budget needs no new ones. [default: "
        "<model>-<fingerprint>.scores.json beside the recipe]",
    ),
]
# Not of a search: it has its own schemes and output, works in one go, and leaves caches to `quantize`.
_WITHOUT = (
    "scheme", "recipe", "output", "layers", "layer_types", "kv_cache", "attention", "min_kv_scale", "resume",
    "time_budget", "max_cpu_mem", "max_gpu_mem", "offload", "verify", "evaluate", "keep_download",
)  # fmt: skip
# A search has no recipe of quark's, and one checkpoint format.
_REWORDED = {
    "settings": ("of the recipe, such as calibration.samples=64, or of an algorithm", "of an algorithm"),
    "algorithm": ("the recipe's", "those of --recipe"),
    "dialect": (
        " With a comma list, one run writes all of them, each into a directory of its name. [default: the recipe's, "
        "else auto]",
        " [default: auto]",
    ),
    "calib_data": ("the recipe's, else a hub", "a hub"),
    "calib_samples": ("the recipe's, else 512", "score_size of --recipe, else 128"),
    "calib_seqlen": ("the recipe's, else 512", "512"),
    "bos": ("the recipe's, else auto", "auto"),
}


# It compares algorithms, and skips none.
@partial(takes_job_flags, without=_WITHOUT, reworded=_REWORDED, replaced={"on_nonfinite": Nonfinite})
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
    """Find the best mix of schemes for a budget.

    Measures how much each group of weights loses in each scheme; a group is what servers multiply together, such as q,
    k and v. Predicts the KL divergence of every mix, chooses the best one exactly, and writes a recipe for 'quark
    quantize'. Also shows what other budgets would lose.
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
        _show(found, asked.options)


def _show(found: Found, options: Options) -> None:
    choosing = found.choosing
    names = [candidate.name for candidate in choosing.space.candidates]
    output.table(("BITS", "SIZE", "PREDICTED KL", *(f"{name} GROUPS" for name in names)), _budgets(found, names))
    output.note(
        f"bits count {choosing.counted:,.0f} searched weights in {len(choosing.groups)} groups; size includes "
        f"{output.size(choosing.rest)} of other tensors"
    )
    if found.choice is None:
        output.note("no recipe is written without --budget or --size")
        return
    output.data("")
    output.table(("GROUPS", "COUNT", "SCHEME", "PREDICTED KL"), _groups(found, found.choice))
    output.data("")
    output.data(str(found.output), whole=True)
    output.note(f"scores: {found.scores}")
    command = f"quark quantize --model {shlex.quote(options.model)} --recipe {shlex.quote(str(found.output))}"
    output.note(f"next: {command}{again.flags(options, again.UNSAID_BY_RECIPES)}")


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
