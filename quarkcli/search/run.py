"""Runs `quark search`: candidates, groups, losses (measured or from a file), choice, recipe.

Torch is imported only where losses are measured, so that what can be refused is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from quarkcli import family, memory
from quarkcli.disk import outputs
from quarkcli.disk.embedded import DEMO
from quarkcli.disk.writer import atomic_write_text, disk_errors
from quarkcli.errors import ConfigError, UsageError
from quarkcli.events import Listener, Message, Phase, Working
from quarkcli.job import device as devices
from quarkcli.job import idle, preflight
from quarkcli.job import run as job
from quarkcli.job.costs import routed_share
from quarkcli.job.options import SKIP, Calibration, Options, Prepared
from quarkcli.job.rows import token_rows
from quarkcli.recipe import auto_quantize
from quarkcli.recipe.auto_quantize import Rule
from quarkcli.recipe.recipe import from_config
from quarkcli.search import candidates, scores
from quarkcli.search.candidates import KEEP, Candidate, Group, Space
from quarkcli.search.choice import Choice, Choosing
from quarkcli.search.text import recipe_text
from quarkcli.spec import TensorSpec
from quarkcli.threads import limited

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData

ROWS = 128  # rows of text to score with, where nothing says otherwise
POINTS = 9  # budgets of the table
_TRIES = 8  # of a size, each smaller by what the files were too large


@dataclass(frozen=True)
class Asked:
    """The options of the command line.

    options  those that a run with one of the schemes would have
    schemes  names to choose among; or `recipe`, a file of NVIDIA ModelOpt that says which
    budget   bits per weight; or `size`, bytes of the checkpoint; neither: no recipe is made
    output   the recipe's file, None: named after model and budget
    scores   the file that keeps the losses, None: named after model and fingerprint, beside the output
    """

    options: Options
    schemes: Sequence[str] = ()
    recipe: Path | None = None
    budget: float | None = None
    size: int | None = None
    output: Path | None = None
    scores: Path | None = None


@dataclass(frozen=True)
class Found:
    """The result of a search.

    choice    for the budget; None when none was given
    prepared  a run of the recipe that was made of it
    output    that recipe's file
    scores    the file of the losses
    measured  whether the losses were measured now; else they come from the file
    """

    choosing: Choosing
    curve: list[Choice]
    choice: Choice | None
    prepared: Prepared | None
    output: Path | None
    scores: Path
    measured: bool


def search(asked: Asked, tell: Listener) -> Found:
    """Returns the result, and writes the recipe when there is a budget. Raises QuarkError; then there is no recipe."""
    tell(Phase("resolve"))
    if asked.budget is not None and asked.size is not None:
        raise UsageError("--budget and --size exclude each other", kind="E-FLAG-CONFLICT")
    if asked.options.on_nonfinite == SKIP:
        what = "a search compares algorithms and cannot skip one"
        raise UsageError(
            what, where=f"--on-nonfinite {SKIP}", hint="use it with 'quark quantize'", kind="E-SEARCH-FLAGS"
        )
    candidates.check_settings(asked.options.settings)
    for file in filter(None, (asked.output, asked.scores)):
        outputs.check_file(file)
    space, asked, rows = _space(asked)
    for run in space.runs:
        _check(run)
    groups, unjudged = candidates.groups(space, asked.options.target)
    if not groups:
        raise ConfigError(
            "none of the schemes quantizes a weight that calibration text reaches",
            where=space.base.recipe.name,
            kind="E-SEARCH",
        )
    _say_unjudged(unjudged, tell)
    output = _output(asked, space)
    _check_budget(asked, Choosing(space, groups, _nothing(groups), unjudged))
    losses, path, measured = _losses(asked, space, groups, rows, output, tell)
    choosing = Choosing(space, groups, losses, unjudged)
    choice, prepared, text = _fitting(asked, choosing, output)
    if output is not None:
        with disk_errors(output):
            atomic_write_text(output, text)
    return Found(choosing, choosing.curve(POINTS), choice, prepared, output, path, measured)


# --- what is chosen among ---------------------------------------------------------------------------------------------


def _space(asked: Asked) -> tuple[Space, Asked, int]:
    """Returns the candidates, what is asked with the budget of a file, and how many rows of text to score with."""
    if bool(asked.schemes) == (asked.recipe is not None):
        both = (
            "--schemes and --recipe exclude each other" if asked.schemes else "neither --schemes nor --recipe is given"
        )
        raise UsageError(both, hint="use --schemes nvfp4,fp8, for example", kind="E-SEARCH-FLAGS")
    if asked.recipe is None:
        names = list(asked.schemes)
        candidates.check(names)
        found = tuple(Candidate(name, _prepared(asked.options, name)) for name in names)
        return Space(found, [Rule(("*",), tuple(names), keep=False)]), asked, ROWS
    file = auto_quantize.from_file(asked.recipe)
    overrides = asked.options.overrides
    exclude = [*overrides.exclude, *file.disabled]
    options = replace(asked.options, overrides=replace(overrides, exclude=exclude, allow_unmatched=True))
    runs = {name: job.prepare(replace(options, recipe=recipe), carries=False) for name, recipe in file.formats.items()}
    keeps = any(rule.keep for rule in file.rules)
    found = tuple(Candidate(name, run) for name, run in runs.items()) + ((Candidate(KEEP, None),) if keeps else ())
    base = found[0].prepared
    assert base is not None
    share = (file.expert_ratio or _active(base)) if file.active_experts else 1.0
    if asked.budget is None and asked.size is None:
        asked = replace(asked, budget=file.bits)
    return Space(found, file.rules, file.uncounted, share, file.notes), asked, file.rows or ROWS


def _prepared(options: Options, name: str) -> Prepared | None:
    return None if name == KEEP else job.prepare(replace(options, scheme=name), carries=False)


def _active(run: Prepared) -> float:
    """Returns the share of its routed experts that a token runs through. Raises ConfigError when nothing says so."""
    share = routed_share(run.plan, run.source.config)
    if share is None:
        raise ConfigError(
            "config.json does not say how many experts a token runs through",
            where=str(run.source.folder),
            hint="add auto_quantize.constraints.cost.active_moe_expert_ratio",
            kind="E-SEARCH",
        )
    return share


def _check(run: Prepared) -> None:
    """Raises ConfigError or UsageError for a run that cannot be measured block by block."""
    if run.others:
        hint = "name one checkpoint format here; 'quark quantize' can write the recipe in all of them"
        raise UsageError(
            "a search counts the bytes of one checkpoint format", where="--dialect", hint=hint, kind="E-SEARCH-FLAGS"
        )
    preflight.check_reader(run.dialect, {"scores": {"scores"}})
    inside = {tensor for part in run.plan.parts if part.block is not None for tensor in part.tensors}
    for key, changes in run.plan.changes.items():
        if changes.online:
            raise ConfigError(
                f"{key} rotates inputs while the model runs, and a search compares only weights",
                where="--algorithm",
                hint="search without it, then add it to the recipe",
                kind="E-SEARCH",
            )
        outside = sorted(changes.tensors - inside)
        if outside:
            raise ConfigError(
                f"{key} changes {outside[0]}, which all blocks read, and a search measures one block at a time",
                where="--algorithm",
                hint="search without it, then add it to the recipe",
                kind="E-SEARCH",
            )


def _say_unjudged(names: Sequence[str], tell: Listener) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        tell(
            Message(
                f"the search cannot measure these weights and leaves them as they are: {', '.join(names[:3])}{more}",
                "warning",
            )
        )


def _output(asked: Asked, space: Space) -> Path | None:
    """Returns the recipe's file. Raises UsageError where it cannot be made."""
    if asked.budget is None and asked.size is None:
        if asked.output is not None:
            raise UsageError(
                "a recipe needs a budget",
                where="-o",
                hint="add --budget 5.0, or --size 6GB",
                kind="E-SEARCH-FLAGS",
            )
        return None
    name = DEMO if asked.options.model == DEMO else space.base.source.name
    budget = f"{asked.budget:g}bits" if asked.budget is not None else f"{asked.size}bytes"
    output = asked.output or Path(f"{name}-{budget}.yaml")
    if output.exists() and not (asked.options.overwrite and output.is_file()):
        raise UsageError(
            "exists already",
            where=str(output),
            hint=f"{'use --overwrite to replace the file, or ' if output.is_file() else ''}choose another -o",
            kind="E-OUTPUT-FILE",
        )
    _check_folder(output)
    if asked.scores is not None and asked.scores.resolve() == output.resolve():
        what = "the recipe and its losses cannot be one file"
        raise UsageError(what, where=f"--scores {asked.scores}", hint="give another --scores", kind="E-FLAG-CONFLICT")
    return output


def _check_folder(file: Path) -> None:
    if not file.parent.is_dir():
        hint = "make the directory first, or choose another"
        raise UsageError("there is no such directory", where=str(file.parent), hint=hint, kind="E-OUTPUT-FILE")


def _check_budget(asked: Asked, choosing: Choosing) -> None:
    """Raises ConfigError for a budget that no choice meets, or that leaves nothing to quantize. `choosing`: any."""
    _choice(choosing, asked)
    free = choosing.whole(KEEP)
    fits = free is not None and (
        (asked.budget is not None and free.bits <= asked.budget) or (asked.size is not None and free.size <= asked.size)
    )
    if fits:
        raise ConfigError(
            "the budget is large enough to quantize nothing",
            where="--budget" if asked.budget is not None else "--size",
            hint="use a smaller one",
            kind="E-SEARCH",
        )


# --- losses -----------------------------------------------------------------------------------------------------------


def _nothing(groups: Sequence[Group]) -> scores.Losses:
    return {(group.name, name): 0.0 for group in groups for name in group.allowed}


def _losses(
    asked: Asked, space: Space, groups: Sequence[Group], rows: int, output: Path | None, tell: Listener
) -> tuple[scores.Losses, Path, bool]:
    """Returns the losses, the file that keeps them, and whether they were measured."""
    run = replace(space.base, calibration=_calibration(space.base, rows))
    for warning in dict.fromkeys(_warnings(space, run, writes=output is not None)):
        tell(Message(warning, "warning"))
    data = token_rows(run, tell)
    assert data is not None
    digest = scores.fingerprint(space, groups, data)
    beside = output.parent if output is not None else Path()
    path = asked.scores or beside / f"{space.base.source.name}-{digest[:12]}.scores.json"
    losses = scores.read(path, digest, groups)
    if losses is not None:
        tell(Message(f"the losses come from {path}; nothing is measured"))
        return losses, path, False
    losses = _measured(space, run, groups, data, path, tell)
    about = {
        "model": space.base.source.name,
        "tokens": data.token_count,
        "data": data.source,
        "algorithms": [step.name for step in space.base.steps],
    }
    with disk_errors(path):
        scores.write(path, digest, losses, about)
    return losses, path, True


def _warnings(space: Space, run: Prepared, *, writes: bool) -> Iterator[str]:
    """Yields what is odd about the candidates, the text, and flags that change nothing."""
    for each in space.runs:
        yield from each.plan.warnings
    yield from space.notes
    calibration = run.calibration
    yield from calibration.warnings if calibration is not None else ()
    options = replace(run.options, target="auto")  # it says which weights are tied
    yield from idle.of_run(options, run.source, run.plan, run.needs or {"scores"}, calibration)
    if options.overwrite and not writes:
        yield "--overwrite not used: nothing is written without a budget"


def _measured(
    space: Space, run: Prepared, groups: Sequence[Group], data: CalibrationData, path: Path, tell: Listener
) -> scores.Losses:
    from quarkcli.search.losses import measure
    from quarkcli.search.states import place

    _check_folder(path)
    _check_resources(run, data, path)
    device = devices.device(run.options.device)
    memory.return_large_buffers()
    memory.collect()
    tell(Phase("search"))
    tell(Working("building the model's class"))
    with disk_errors(path), limited(run.threads), place(path.parent) as folder:
        return measure(space, run, groups, data, device, folder, tell)


def _check_resources(run: Prepared, data: CalibrationData, path: Path) -> None:
    """Refuses a search that the disk or the memory cannot hold: hidden states of every block, four of one."""
    states = data.tokens.numel() * (family.hidden_size(run.source.config) or 0)
    blocks = sum(part.block is not None for part in run.plan.parts)
    size = run.forecast
    needed = size.memory_bytes + 3 * size.largest_part + 16 * states
    preflight.check_resources(path, replace(size, disk_bytes=2 * states * blocks, memory_bytes=needed))


def _calibration(base: Prepared, rows: int) -> Calibration:
    """Returns the settings of the text that is scored with."""
    found = preflight.calibration(base.options, base.recipe, base.source, {"scores": {"scores"}})
    assert found is not None
    return found if found.asked else replace(found, samples=rows)


# --- the recipe -------------------------------------------------------------------------------------------------------


def _choice(choosing: Choosing, asked: Asked) -> Choice | None:
    if asked.budget is not None:
        return choosing.of_bits(asked.budget)
    return choosing.of_size(asked.size) if asked.size is not None else None


def _fitting(asked: Asked, choosing: Choosing, output: Path | None) -> tuple[Choice | None, Prepared | None, str]:
    """Returns the choice, a run of its recipe, and the recipe's text.

    The headers of files depend on all tensors, so a size is held against the run's own forecast.
    """
    limit = asked.size
    for _ in range(_TRIES):
        choice = _choice(choosing, replace(asked, size=limit))
        if choice is None or output is None:
            return None, None, ""
        text = _text(asked, choosing, choice, output)
        prepared = _resolved(asked, choosing, choice, text, output)
        excess = prepared.forecast.output_bytes - asked.size if asked.size is not None else 0
        if excess <= 0:
            return replace(choice, size=prepared.forecast.output_bytes), prepared, text
        assert limit is not None
        limit -= excess
    raise ConfigError(
        f"no choice was found with files of at most {asked.size:,} bytes", where="--size", kind="E-BUDGET-SMALL"
    )


def _text(asked: Asked, choosing: Choosing, choice: Choice, output: Path) -> str:
    options = asked.options
    given = {
        "data": options.calib_data, "samples": options.calib_samples, "seqlen": options.calib_seqlen,
        "column": options.calib_column, "bos": options.bos, "seed": options.seed, "moe": options.moe_calibration,
        "min_expert_tokens": options.min_expert_tokens,
    }  # fmt: skip
    calibration = {key: value for key, value in given.items() if value is not None}
    return recipe_text(
        choosing.space, choosing.groups, choice, choosing.losses, name=output.stem, calibration=calibration,
        dialect=options.dialect,
    )  # fmt: skip


def _resolved(asked: Asked, choosing: Choosing, choice: Choice, text: str, output: Path) -> Prepared:
    """Returns a run of the recipe. Raises ConfigError when no dialect holds it.

    The recipe must mean what was chosen, weight by weight; else it is a defect of ours.
    """
    recipe = from_config(yaml.safe_load(text), output.stem)
    options = replace(asked.options, recipe=recipe, scheme=None, algorithm=None, settings=(), overrides=_PLAIN)
    prepared = job.prepare(options, carries=False)
    wanted: dict[str, tuple[TensorSpec | None, TensorSpec | None]] = dict.fromkeys(prepared.plan.targets, (None, None))
    for group in choosing.groups:
        candidate = choosing.space.named(choice.chosen[group.name])
        for own in filter(None, map(candidate.quantized, group.names)):
            wanted[own.name] = own.weight, own.input
    wrong = [name for name, target in prepared.plan.targets.items() if (target.weight, target.input) != wanted[name]]
    assert not wrong, f"the recipe does not say what was chosen for {wrong[0]}"
    return prepared


_PLAIN = Options("").overrides
