"""Runs a job in ten steps: from a recipe and a model to a checkpoint that servers load.

`prepare` is steps 1 to 4 and reads headers only; `run` is all ten. What `quark plan` shows is what `prepare` returns
and `run` uses; there is no second path. A plan without a slot that needs data runs no forward pass.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkcli import algorithms, dialects, family, memory, servers
from quarkcli.disk import nonfinite, outputs, side_files
from quarkcli.disk.embedded import DEMO, located
from quarkcli.disk.journal import Journal
from quarkcli.disk.origin import open_weights
from quarkcli.disk.place import remove_stale
from quarkcli.disk.source import Source
from quarkcli.disk.writer import STATE
from quarkcli.errors import DataError, UsageError
from quarkcli.events import Event, Listener, Message, Phase, Working, broadcast, silent
from quarkcli.forward.group import Group
from quarkcli.job import (
    asked,
    authored,
    carried,
    directories,
    dividing,
    download,
    finish,
    idle,
    judging,
    partial_path,
    preflight,
    ranks,
    rows,
)
from quarkcli.job import device as devices
from quarkcli.job.fingerprint import fingerprint
from quarkcli.job.options import SKIP, Options, Prepared, dialect_of
from quarkcli.job.walking import runner_of, take_up, walk_of
from quarkcli.plan import online
from quarkcli.plan.coverage import coverage
from quarkcli.plan.model import Part
from quarkcli.plan.resolve import resolve
from quarkcli.recipe import catalog
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.recipe import Recipe
from quarkcli.reporting import log
from quarkcli.reporting.build import part_warnings
from quarkcli.reporting.run import Clock
from quarkcli.threads import Workers, limited

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData
    from quarkcli.job.pipeline import Pipeline


def load_recipe(options: Options) -> Recipe:
    """Step 1: returns the recipe of `--scheme` or `--recipe`, with the algorithms of `--algorithm`."""
    if (options.scheme is None) == (options.recipe is None):
        excluding = "--scheme and --recipe exclude each other"
        raise UsageError(
            excluding if options.scheme else "neither --scheme nor --recipe is given",
            hint="use --scheme nvfp4, for example; 'quark schemes list' and 'quark recipes list' show all",
            kind="E-RECIPE-OR-SCHEME",
        )
    settings, of_steps = asked.of_recipe_and_steps(options.settings)
    if settings and options.recipe is None:
        hint = "use --recipe in the place of --scheme, or the flags, such as --calib-samples"
        raise UsageError("there is no recipe to change", where="--set", hint=hint, kind="E-SET")
    if settings and isinstance(options.recipe, Recipe):
        raise UsageError("settings change only a recipe that is given by its name or file", where="--set", kind="E-SET")
    if options.scheme is not None:
        recipe = recipes.from_scheme(options.scheme)
    elif isinstance(options.recipe, Recipe):
        recipe = replace(options.recipe)
    else:
        recipe = recipes.from_file(catalog.find_recipe(str(options.recipe)), settings, asked.mistakes)
    return asked.with_steps(recipe, options.algorithm, of_steps)


def open_source(options: Options, tell: Listener = silent, kept: Path | None = None) -> Source:
    """Step 2: returns the model with its config and headers. `kept`: a file of headers that an earlier run read."""
    place = located(options.model)
    return Source.open(
        place, revision=options.revision, offline=options.offline, bare=True, kept=kept, tell=tell,
        allow_pickle=options.allow_pickle,
    )  # fmt: skip


def _output(options: Options, recipe: Recipe, name: str = "") -> Path:
    """Returns the output: as asked for, else named after recipe and model (`name`, or the end of what was given)."""
    name = DEMO if options.model == DEMO else name or options.model.rpartition("/")[2]
    return _expanded(options.output) or Path(f"{name}-{recipe.file_name}")


def _expanded(path: Path | None) -> Path | None:
    return Path(os.path.expanduser(path)) if path is not None else None  # noqa: PTH111 - never raises


def prepare(options: Options, tell: Listener = silent, *, carries: bool = True) -> Prepared:
    """Does steps 1 to 4: everything that can go wrong for reasons visible in config and headers goes wrong here.

    Weights that the plan leaves alone may keep the codes of a quantized source (`carries`).
    """
    tell(Phase("resolve"))
    servers.check_name(options.target)
    recipe = load_recipe(options)  # 1
    tell(Working(f"reading config and headers of {options.model}"))
    source = open_source(options, tell, download.headers_path(partial_path(_output(options, recipe))))  # 2
    tell(Working("comparing the recipe with the model"))
    weights, origin = open_weights(source)
    headers = weights.headers
    name, model, inferred = family.for_checkpoint(source.config, headers)
    layout = family.lay_out(name, model, inferred, source.config, headers)
    family.check_fit(model, layout, source.config, headers)
    surprises = [*source.notes(), *family.surprises(layout.tensor_roles, headers, weights.unlisted)]
    plan = resolve(recipe, options.overrides, layout)  # 3
    advice = asked.advise(plan, recipe.algorithm_places)
    steps = algorithms.pipeline(plan, asked.places(recipe, plan))
    tell(Phase("check"))  # 4
    for step in steps:
        step.check(plan)
    plan.changes = {step.key: step.changes(plan) for step in steps if step.kind in ("transform", "tuner")}
    online.check(plan)
    preflight.check_plan(plan)
    preflight.check_servers(plan, options.target)
    writers = dialects.choose(dialect_of(options, recipe), plan, servers.favoured(plan, options.target))
    plan.joined = directories.joined(plan, writers)
    needs = preflight.data_needs(plan, steps)
    parallel = directories.degrees(plan, writers, source.config, options, needs)
    prepass = preflight.prepass_needs(plan, steps)
    calibration = preflight.calibration(options, recipe, source, needs | prepass)
    if carries and origin is not None:
        plan = carried.carry(plan, weights, origin, writers, steps, options.target)
    size = preflight.forecast_of(plan, writers[0], source, headers, calibration, steps)
    size = authored.with_whole(size, options, calibration, source, headers)
    needed = download.needed(options, source, steps, prepass)
    size = replace(size, disk_bytes=size.disk_bytes + (needed.at_once if needed is not None else 0))
    beside = side_files.gather(source)
    preflight.check_tokenizer(source, beside, calibration)
    share = coverage(plan, layout, headers)
    warnings = [*recipe.notes, *surprises, *plan.warnings, *beside.warnings()]
    warnings += [doubt] if (doubt := share.warning()) else []
    warnings += calibration.warnings if calibration else ()
    warnings += idle.of_run(options, source, plan, needs, calibration, steps)
    warnings += download.idle(options, source, needed)
    prepared = Prepared(
        options=options, recipe=recipe, source=source, weights=weights, origin=origin, layout=layout, plan=plan,
        steps=steps, advice=advice, dialect=writers[0], dialect_reason="", needs=needs, prepass=prepass,
        calibration=calibration, forecast=size, coverage=share, tensor_parallel=parallel[0], download=needed,
        output=_output(options, recipe, source.name), side_files=beside, warnings=warnings,
    )  # fmt: skip
    return directories.complete(prepared, writers, parallel)


def run(
    options: Options,
    tell: Listener = silent,
    planned: Callable[[Prepared], None] = lambda prepared: None,
    judge: judging.Judge | None = None,
) -> dict[str, Any]:
    """Does all ten steps. Returns the report. Raises QuarkError; then no output directory was made or changed.

    planned   called once with what is about to be done, before any weight is read
    judge     scores what was written against the source; None: nobody does

    Of several processes that torchrun started, the first does all that is done once; the others return no report.
    """
    with ranks.together() as group:
        return _lead(options, tell, planned, judge, group) if group.is_main else _assist(options, group)


def _assist(options: Options, group: Group) -> dict[str, Any]:
    """Does this rank's share of steps 7 and 8. Returns an empty report."""
    started = time.monotonic()
    log_file = log.LogFile()
    prepared = prepare(options, log_file)
    dividing.check(prepared, group)
    device = devices.device(options.device)
    group.work_on(device)
    devices.check(device, prepared.forecast, options.max_gpu_mem)
    with _limits(prepared, device):
        data = group.share(None)
        runner = runner_of(prepared, data, device, log_file) if data is not None else None
        partial = partial_path(prepared.output)
        journal = Journal(partial, None, [], group.rank)
        group.share(None)  # by then the first rank has made the folders
        dividing.check_place(partial)
        with log_file.attach(partial / STATE / f"rank-{group.rank:03d}.log"), log_file.last_words():
            _parts(prepared, data, runner, journal, device, started, log_file, group)
    return {}


def _lead(
    options: Options,
    tell: Listener,
    planned: Callable[[Prepared], None],
    judge: judging.Judge | None,
    group: Group,
) -> dict[str, Any]:
    """Does all ten steps, with the share of this rank of steps 7 and 8. Returns the report."""
    log_file, clock = log.LogFile(), Clock(group.size)
    tell = broadcast(log_file, clock, tell)
    prepared = prepare(options, tell)  # 1-4
    judging.check(prepared)
    dividing.check(prepared, group)
    planned(prepared)  # 5
    for warning in dict.fromkeys(warning for one in prepared.every for warning in one.warnings):
        tell(Message(warning, "warning"))
    shown = tell
    tell = broadcast(tell, *(_remember(one.warnings) for one in prepared.every))
    partial = partial_path(prepared.output)
    for line in remove_stale(partial):
        tell(Message(line, "warning", always=True))
    device = _with_room(prepared, group)
    with Journal.lock(partial, resume=options.resume) as journal, _limits(prepared, device):  # 6
        preflight.check_output(prepared.output, options.overwrite, prepared.source.folder)  # another run may have ended
        finish.begin_report(prepared, None, partial, clock, device)
        download.side_files(prepared, tell)
        data = group.share(rows.token_rows(prepared, tell))
        tell(Working("building the model's class"))
        runner = runner_of(prepared, data, device, tell) if data is not None else None
        journal.start(fingerprint(prepared, data, device), resume=options.resume)
        directories.make(prepared, partial)
        rows.keep(prepared, data, partial)
        download.keep_headers(prepared, partial)
        finish.begin_report(prepared, data, partial, clock, device)
        group.share(None)  # the others may go on
        logs = [partial / one.folder / outputs.LOG for one in prepared.every]
        with log_file.attach(*logs), log_file.last_words(), finish.begun():
            _parts(prepared, data, runner, journal, device, clock.began, tell, group)  # 7, 8
            _refuse_nonfinite(journal.finished, options)
            for warning in part_warnings(journal.finished):
                tell(Message(warning, "warning"))
            tell(Phase("finalize"))
            records = {part.name: journal.finished[part.name] for part in prepared.plan.parts}
            split = [outputs.of_folder(records, one.folder) for one in prepared.every]
            for one, own in zip(prepared.every, split, strict=True):
                finish.write_config(one, partial / one.folder, own, tell)  # 9
            found = judging.measured(prepared, data, partial / prepared.folder, device, judge, tell)
            tell(Phase("verify"))
            directories.note_apart(prepared, records, shown)
            reports = [
                finish.verify_and_report(one, data, own, partial / one.folder, clock, device, found)  # 10
                for one, own in zip(prepared.every, split, strict=True)
            ]
            directories.list_them(prepared, partial)
            finish.hand_over(journal, partial, prepared.output, options.overwrite, tell, log_file.forgive)
    return directories.report(prepared, reports)


def _with_room(prepared: Prepared, group: Group) -> str:
    """Returns the device, after a look at what the output, the disk and the memories have room for."""
    options = prepared.options
    preflight.check_output(prepared.output, options.overwrite, prepared.source.folder)
    preflight.check_resources(prepared.output, directories.together(prepared), options.max_cpu_mem)
    download.check_room(prepared)
    device = devices.device(options.device)
    group.work_on(device)
    devices.check(device, prepared.forecast, options.max_gpu_mem)
    return device


@contextmanager
def _limits(prepared: Prepared, device: str) -> Iterator[None]:
    """Sets the threads of torch, the use of freed memory, and the most memory of the device, while the body runs."""
    calibrates = prepared.calibration is not None
    memory.return_large_buffers(memory.LARGE if calibrates else memory.LARGE_IN_THREADS)
    threads = prepared.threads if calibrates else 1  # without calibration, workers of their own compute
    with limited(threads), devices.limit(device, prepared.options.max_gpu_mem):
        yield


def _remember(warnings: list[str]) -> Listener:
    """Returns a listener that collects warnings for the report; those about parts are in their records."""

    def listen(event: Event) -> None:
        if isinstance(event, Message) and event.level == "warning" and not event.many:
            warnings.append(event.text)

    return listen


def check_model(prepared: Prepared) -> list[str]:
    """Matches every tensor with the model's class, on the meta device. Returns the findings.

    Raises ModelError when a parameter that text needs has no tensor, or one of another shape.
    """
    from quarkcli.model.runner import Runner

    folder, headers = prepared.source.whole_folder(), prepared.weights.headers
    trusted, transposed = prepared.options.trust_remote_code, prepared.layout.transposed_experts
    runner = Runner(folder, headers, trust_remote_code=trusted, transposed_experts=transposed)
    runner.check_blocks()
    unknown = runner.unknown_tensors()
    found = [f"model class: {len(headers) - len(unknown)} of {len(headers)} tensors are its parameters"]
    if unknown:
        found.append(f"not its parameters: {', '.join(unknown[:5])}" + (", ..." if len(unknown) > 5 else ""))
    return found


def _parts(
    prepared: Prepared,
    data: CalibrationData | None,
    runner: Any,
    journal: Journal,
    device: str,
    started: float,
    tell: Listener,
    group: Group,
) -> None:
    """Does steps 7 and 8: this rank's share of the parts that the journal does not have, one at a time."""
    from quarkcli.job.part import PartWorker
    from quarkcli.job.prepass import decide

    plan, options = prepared.plan, prepared.options
    todo = dividing.agreed(plan, journal, group, tell)
    tell(Phase("calibrate+quantize" if data is not None else "quantize"))
    states = decide(prepared, data, runner, journal, tell, group)
    workers = Workers(prepared.threads if device == "cpu" else 1)
    worker = PartWorker(
        plan, prepared.dialect, prepared.steps, prepared.needs, prepared.weights, None, tell,
        others=[other.dialect for other in prepared.others], calibration=prepared.calibration, strict=options.strict,
        roles=prepared.layout.tensor_roles, on_nonfinite=options.on_nonfinite, states=states,
        late=preflight.data_needs(plan, [step for step in prepared.steps if step.kind != "transform"]),
        workers=workers, group=group,
    )  # fmt: skip
    label = "+".join([prepared.recipe.name, *(step.name for step in plan.algorithms)])
    begun = time.monotonic()
    with _pipeline(prepared, todo, journal, device, tell, group) as pipeline, workers:
        walk = worker.walk = walk_of(prepared, data, runner, journal, todo, pipeline, worker, tell, group)
        if walk is not None and todo[0].kind != "embed":
            walk.start()
            take_up(walk, journal, group)
        own = dividing.shares(todo, worker, prepared.weights.headers, group)
        for count, (part, writer, works) in enumerate(own, 1):
            result = None
            if works:
                tell(Working(f"reading {part.name}"))
                following = (share.part for share in own[count:] if share.works)
                tensors = pipeline.read(part, next(following, None))
                tell(Working(f"working on {part.name}"))
                result = worker.work(part, tensors)
                del tensors
            tell(Working(f"writing {part.name}"))
            eta = (time.monotonic() - begun) / count * (len(own) - count)
            done = result.told(part, len(plan.parts), label, eta, device) if result is not None else None
            pipeline.write(part, result, worker, writer, done)
            del result  # before the next part is read
            if walk is not None and part.kind == "embed":
                walk.start()
            if options.time_budget is not None:
                pipeline.drain()  # what writing takes counts
            why = preflight.reason_to_stop(options, time.monotonic() - started, len(own) - count)
            why = why if writer is None else group.share(why)
            if why is not None:
                pipeline.drain()
                raise why
    group.gather(None)
    if group.size > 1 and group.is_main:
        journal.absorb()


@contextmanager
def _pipeline(
    prepared: Prepared, todo: list[Part], journal: Journal, device: str, tell: Listener, group: Group
) -> Iterator[Pipeline]:
    """Opens what reads and writes the parts to do, while weight files of a model on the hub come and go."""
    from quarkcli.job.pipeline import Pipeline

    weights, partial, largest = prepared.weights, partial_path(prepared.output), prepared.forecast.largest_part
    folders = [one.folder for one in prepared.every]
    with (
        download.streaming(prepared, todo, tell) as stream,
        Pipeline(weights, partial, journal, device, folders, stream, largest, group, tell) as pipeline,
    ):
        yield pipeline


def _refuse_nonfinite(records: Mapping[str, Mapping[str, Any]], options: Options) -> None:
    """Raises DataError for what an interrupted run with another `--on-nonfinite` let pass."""
    first = next((name for record in records.values() for name in record["nonfinite"]), None)
    if first is not None and options.on_nonfinite != "keep":
        raise DataError(
            "NaN or inf in a tensor that is not quantized", where=first, hint=nonfinite.HINT, kind="E-NONFINITE-WEIGHT"
        )
    passed = (item for record in records.values() for item in record.get("skipped", {}).items())
    where, what = next(passed, ("", ""))
    if where and options.on_nonfinite != SKIP:
        hint = f"use --on-nonfinite {SKIP}, as the interrupted run did, or --resume never"
        raise DataError(what, where=where, hint=hint, kind="E-NONFINITE-ACTIVATION")
