"""Checks before the work: source, plan, calibration settings, disk, memory, device.

Torch is imported only where a device is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from quarkcli import family, memory, servers
from quarkcli.algorithms.base import Assignment
from quarkcli.dialects.base import Writer
from quarkcli.disk.outputs import nearest
from quarkcli.disk.side_files import SideFiles, shown
from quarkcli.disk.source import Source
from quarkcli.disk.writer import disk_errors, free_bytes, output_state, partial_path, resolved
from quarkcli.errors import (
    ConfigError,
    DataError,
    ModelError,
    QuarkError,
    ResourceError,
    Stopped,
    UsageError,
    some,
)
from quarkcli.family import HeaderLike
from quarkcli.job import authored, forecast
from quarkcli.job.options import Calibration, Options, seed_of
from quarkcli.job.reach import balances
from quarkcli.plan.fused import Servers, sentence, splits
from quarkcli.plan.model import Plan, QuantizedTarget
from quarkcli.plan.share import split_groups
from quarkcli.recipe.recipe import Recipe
from quarkcli.spec import MIN_MAX, PerGroup, PerTensor, PerTile, TensorSpec

DEFAULT_SAMPLES = 512
DEFAULT_SEQLEN = 512
_LESS_DATA = "use fewer --calib-samples, a shorter --calib-seqlen, or a scheme that needs no data, such as mxfp4"
_WEIGHT_DTYPES = {"BF16", "F16", "F32"}


def check_plan(plan: Plan) -> None:
    """Refuses dtypes that are no weights, and ranges that cannot be found."""
    for target, *_ in plan.quantized_alike():
        if target.dtype not in _WEIGHT_DTYPES:
            raise ModelError(
                f"is stored as {target.dtype}, and weights must be BF16, F16 or F32", where=target.view.tensor,
                hint=f"give the original model, or use --exclude '{target.name}' to keep this weight",
                kind="E-MODEL-DTYPE",
            )  # fmt: skip
        if target.input is not None and target.input.needs_amax and target.site is None:
            raise ConfigError(
                f"its input needs calibration, and text does not reach this module (role {target.role})",
                where=target.name, hint=f"use --exclude '{target.name}', or a scheme that needs no data for it",
                kind="E-SLOT-UNREACHED",
            )  # fmt: skip
        _check_weight_observers(target)
    checked: set[int] = set()
    for key, _, spec, _ in plan.activations():
        if id(spec) not in checked:
            _check_activation(key, spec)
            checked.add(id(spec))


def check_reader(dialect: Writer, needs: Mapping[str, set[str]]) -> None:
    """Refuses to calibrate for a dialect that is only written: each block reads what those below decode to."""
    if needs and dialect.reader is None:
        raise ConfigError(
            f"format {dialect.name} cannot be read back, and calibration continues with the weights read back",
            where="--dialect", hint="use another --dialect, or a scheme and an algorithm that need no data",
            kind="E-DIALECT-CANNOT",
        )  # fmt: skip


def check_servers(plan: Plan, target: Servers) -> None:
    """Refuses a plan that splits what servers fuse, unless it is for none: then it is a warning.

    Scales over block scales must be one, too: servers would load the files, and decode the others wrong.
    """
    if target != servers.NONE and (groups := [group for group, over in split_groups(plan).items() if over]):
        raise ModelError(
            f"{len(groups)} groups of weights that servers multiply together have several global scales; servers "
            f"would decode all but one weight wrong: {some(groups, 3)}",
            hint="remove 'share' from the recipe; --target none writes it all the same",
            kind="E-SERVER-REFUSES",
        )
    mixed = [target for members in plan.disagreeing() for target in members]
    found = splits((target, (target.weight, target.input)) for target in mixed)
    if not found:
        return
    if target != servers.NONE:
        raise ModelError(
            sentence(found), hint="give all of them one scheme, or exclude all; --target none writes it all the same",
            kind="E-SERVER-REFUSES",
        )  # fmt: skip
    text = f"{sentence(found)}; --target none allows it"
    if text not in plan.warnings:
        plan.warnings.append(text)


def _check_activation(name: str, spec: TensorSpec) -> None:
    """Refuses an activation's spec that calibration has no range for, or an observer that would see nothing."""
    reason = _unmeasured(spec) if spec.is_static else None
    observers = [stage.observer.name for stage in spec.stages if stage.observer != MIN_MAX]
    if observers and not spec.needs_amax:
        reason = (
            f"its scale is not measured, so observer '{observers[0]}' would have no effect",
            "leave the observer out, or make the scale static without a constant_amax",
        )
    if reason is not None:
        raise ConfigError(reason[0], where=name, hint=reason[1], kind="E-OBSERVER")


def _unmeasured(spec: TensorSpec) -> tuple[str, str] | None:
    """Returns the reason no calibration finds an activation's static scale, and the fix; None when one does."""
    if spec.then is not None:
        return (
            "an activation cannot have a chain (two quantizations in a row) with a static scale",
            "write when: dynamic in both stages",
        )
    assert spec.scale is not None
    two_level = spec.is_two_level
    if not spec.symmetric:
        return "a static scale of an activation cannot have a zero point", "write zero_point: none, or when: dynamic"
    if not isinstance(spec.granularity, PerGroup if two_level else PerTensor):
        return (
            f"{spec.describe()}: an activation can have only one static scale",
            "write granularity: tensor, or when: dynamic",
        )
    if two_level and spec.scale.when == "static":
        return (
            f"{spec.describe()}: the scales of groups of an activation cannot be stored",
            "write when: dynamic, above 'global_scale'",
        )
    if two_level and spec.observer.name not in {MIN_MAX.name, "percentile", "headroom"}:
        return f"observer '{spec.observer.name}' does not see the groups under a global scale", "use percentile"
    return None


def _check_weight_observers(target: QuantizedTarget) -> None:
    """Refuses observers that a weight or a bias cannot have."""
    for stage in (*target.weight.stages, *(target.bias_spec.stages if target.bias_spec else ())):
        if stage.observer.name == "histogram":
            raise ConfigError(
                "observer 'histogram' works only for activations", where=target.name,
                hint="use mse or percentile", kind="E-OBSERVER",
            )  # fmt: skip
        if stage.observer.name == "percentile" and isinstance(stage.granularity, PerTile):
            raise ConfigError(
                "observer 'percentile' does not work with tiles", where=target.name, hint="use mse", kind="E-OBSERVER"
            )
    then = target.weight.then
    if then is not None and then.observer != MIN_MAX and isinstance(then.granularity, PerTensor):
        raise ConfigError(
            f"observer '{then.observer.name}' would have no effect: the first stage fixes this scale",
            where=target.name,
            hint="put the observer into the first stage, or make the second stage per channel or group",
            kind="E-OBSERVER",
        )


def data_needs(plan: Plan, steps: Sequence[Assignment]) -> dict[str, set[str]]:
    """Returns kinds of statistics by site that static scales and algorithms wait for. Empty: no data is needed.

    Raises ConfigError where two algorithms want different ones of the same kind.
    """
    balances(plan, steps)
    needs: dict[str, set[str]] = {}
    for site, spec in plan.measured():
        needs.setdefault(site, set()).add(spec.observer.statistic)
    for step in steps:
        for site, kinds in step.needs(plan).items():
            needs.setdefault(site, set()).update(kinds)
    return needs


def prepass_needs(plan: Plan, steps: Iterable[Assignment]) -> dict[str, set[str]]:
    """Returns kinds of statistics by site that transforms want of the source model before part 0."""
    needs: dict[str, set[str]] = {}
    for step in steps:
        for site, kinds in step.prepass(plan).items():
            needs.setdefault(site, set()).update(kinds)
    return needs


def calibration(options: Options, recipe: Recipe, source: Source, needs: Mapping[str, set[str]]) -> Calibration | None:
    """Returns the calibration settings: flag, else recipe, else default; None when nothing needs data."""
    if not needs:
        return None
    warnings: list[str] = []
    data = options.calib_data if options.calib_data is not None else recipe.calib_data
    if data is None:
        data, warning = _default_data(options)
        warnings += [warning] if warning else []
    _check_data(data)
    samples = options.calib_samples or recipe.calib_samples
    seqlen = options.calib_seqlen or recipe.calib_seqlen or DEFAULT_SEQLEN
    limit = family.position_limit(source.config)
    if limit is not None and seqlen > limit:
        if options.calib_seqlen:
            what = f"--calib-seqlen {seqlen} is more than the model's {limit} positions"
            raise DataError(what, hint=f"use --calib-seqlen {limit}", kind="E-DATA-SEQLEN")
        if recipe.calib_seqlen:
            warnings.append(
                f"calibration uses rows of {limit} tokens, the most that the model takes; the recipe asks for {seqlen}"
            )
        seqlen = limit
    return Calibration(
        source=data,
        samples=samples or DEFAULT_SAMPLES,
        seqlen=seqlen,
        asked=samples is not None,
        column=options.calib_column or recipe.calib_column,
        seed=seed_of(options, recipe),
        moe=options.moe_calibration or recipe.moe_calibration or "routed",
        min_expert_tokens=options.min_expert_tokens or recipe.min_expert_tokens or 1,
        bos=options.bos or recipe.bos or "auto",
        warnings=warnings,
    )


def check_tokenizer(source: Source, side_files: SideFiles, calibration: Calibration | None) -> None:
    """Refuses to calibrate with a tokenizer of which the checkpoint would lack a file."""
    lost = side_files.lost_tokenizer()
    if calibration is not None and lost is not None:
        hint = "put the file itself into the folder; schemes that need no data leave it out and warn"
        where = f"{shown(source.folder)}/{lost[0]}"
        raise ModelError(f"a file of the tokenizer is among the {lost[1]}", where=where, hint=hint, kind="E-TOKENIZER")


def _default_data(options: Options) -> tuple[str, str | None]:
    from quarkcli.forward.defaults import default_source

    data, warning = default_source(options.offline)
    if warning and options.strict:
        hint = "use --calib-data FILE, or --calib-data builtin if you want the built-in text"
        raise DataError(warning, hint=hint, kind="E-DATA-STRICT")
    return data, warning


def _check_data(data: str) -> None:
    """Refuses a place that holds no data; what is on the hub is seen later."""
    from quarkcli.forward import files
    from quarkcli.forward.defaults import BUILTIN, SELF

    if data not in (BUILTIN, SELF) and (path := files.local(data)) is not None:
        files.find(path)


def forecast_of(
    plan: Plan,
    dialect: Writer,
    source: Source,
    headers: Mapping[str, HeaderLike],
    calibration: Calibration | None,
    steps: Iterable[Assignment],
) -> forecast.Forecast:
    """Returns the sizes of this plan in this dialect. `headers`: of the source's tensors as they are read."""
    steps = list(steps)
    streams = len(frozenset[str]().union(*(step.algorithm.streams for step in steps)))
    return forecast.forecast(
        plan,
        dialect,
        headers,
        source_bytes=sum(source.files.values()),
        calibrated=calibration is not None,
        tokens=calibration.samples * calibration.seqlen * streams if calibration else 0,
        hidden=family.hidden_size(source.config) or 0,
        solving=max(step.memory(plan) for step in steps),
    )


def misplaced(output: Path, source: Path) -> list[str]:
    """Returns a line for a place where `quark quantize` would not write."""
    try:
        _check_place(output, source)
        _check_writable(output)
    except (UsageError, ResourceError) as error:
        return [f"{error}, so 'quark quantize' would stop (exit {int(error.code)}); {error.hint}"]
    return []


def check_output(output: Path, overwrite: bool, source: Path) -> None:
    """Refuses an output that exists, unless it may be replaced, and one that touches the source."""
    _check_place(output, source)
    state = output_state(output)
    if state in {"finished", "foreign"} and not overwrite:
        what = "a finished checkpoint" if state == "finished" else "something that is not a checkpoint of quark"
        raise UsageError(
            f"exists: {what}", where=str(output), hint="use --overwrite to replace it, or choose another -o",
            kind="E-OUTPUT-EXISTS",
        )  # fmt: skip
    _check_writable(output)


def _check_writable(output: Path) -> None:
    """Raises ResourceError for a place in which the user may not write."""
    parent = partial_path(output).parent
    with disk_errors(parent):
        existing = nearest(parent)
    if not os.access(existing, os.W_OK):
        raise ResourceError(
            "cannot be written to", where=str(existing), hint="choose another directory with -o", kind="E-DISK-WRITE"
        )


def _check_place(output: Path, source: Path) -> None:
    """Raises UsageError for a place that no flag frees for an output."""
    final = resolved(output)
    if final == source or source in final.parents or final in source.parents:
        what, hint = "is inside the model's directory, or contains it", "use -o with a directory outside the model's"
        raise UsageError(what, where=str(output), hint=hint, kind="E-OUTPUT-PLACE")
    if final in _around():
        what = "is the directory that you work in, and the finished one takes its place"
        raise UsageError(what, where=str(output), hint="choose another -o", kind="E-OUTPUT-PLACE")
    if final.exists() and not final.is_file() and not final.is_dir():
        what = "is neither a file nor a directory"
        raise UsageError(what, where=str(output), hint="choose another -o", kind="E-OUTPUT-PLACE")
    with disk_errors(final):
        around = nearest(final.parent)
    if not around.is_dir():
        what = f"cannot be made, because {around} is not a directory"
        raise UsageError(what, where=str(output), hint="choose another -o", kind="E-OUTPUT-PLACE")


def _around() -> list[Path]:
    """Returns the directory that the command works in and those around it; nothing where it is gone."""
    try:
        here = Path.cwd().resolve()
    except OSError:
        return []
    return [here, *here.parents]


def check_resources(output: Path, size: forecast.Forecast, most: int | None = None) -> None:
    """Refuses a job that the disk or the memory cannot hold, before any weight is read.

    most   bytes of memory that it may take (`--max-cpu-mem`)
    """
    partial = partial_path(output)
    with disk_errors(output):
        present = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.exists() else 0
        free = free_bytes(output) + present
    if size.disk_bytes > free:
        raise ResourceError(
            f"{size.disk_bytes:,} bytes needed, {free:,} free", where=str(output),
            hint="free some space, or choose another -o", kind="E-DISK-FULL",
        )  # fmt: skip
    total = _total_memory()
    for room in filter(None, (most, total)):
        if min(size.memory_bytes, size.whole_bytes) > room:
            raise authored.too_large(size.whole_bytes, room)
    if most is not None and size.memory_bytes > most:
        what = f"the job needs about {size.memory_bytes:,} bytes of memory, and --max-cpu-mem allows {most:,}"
        less = f", or {_LESS_DATA}" if size.calibrated else ""
        raise ResourceError(what, hint=f"use a larger --max-cpu-mem{less}", kind="E-MEMORY")
    if total is not None and size.memory_bytes > total:
        raise ResourceError(
            f"the job needs about {size.memory_bytes:,} bytes of memory, and this machine has {total:,}",
            hint=_LESS_DATA if size.calibrated else "use a machine with more",
            kind="E-MEMORY",
        )


def reason_to_stop(options: Options, seconds: float, left: int) -> QuarkError | None:
    """Returns the reason to stop after a part, for the time or the memory that were taken; None to go on.

    left   parts that are not done yet
    """
    taken, most = memory.peak_rss(), options.max_cpu_mem
    if most is not None and taken > most:
        what = f"the job took {taken:,} bytes of memory, and --max-cpu-mem allows {most:,}; finished work is kept"
        return ResourceError(what, hint="run the same command with a larger limit to continue", kind="E-MEMORY")
    if left and options.time_budget is not None and seconds > options.time_budget:
        return Stopped(
            "the time budget is used up; finished work is kept", hint="run the same command again to continue",
            kind="E-TIME-BUDGET",
        )  # fmt: skip
    return None


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
