"""Finds flags that have no effect in a run, whatever the plan decides, and gives a line for each.

Flags about modules are looked at where the plan is resolved (`plan.flags`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from quarkcli.algorithms.base import Assignment
from quarkcli.disk import pickles
from quarkcli.disk.source import Source
from quarkcli.forward.defaults import BUILTIN, SELF
from quarkcli.job import device as devices
from quarkcli.job import judging
from quarkcli.job.options import SKIP, Calibration, Options
from quarkcli.plan.model import Plan

OF_DATA = (
    "calib_data", "calib_samples", "calib_seqlen", "calib_batch", "calib_column", "chat_template", "bos", "allow_short",
    "moe_calibration", "min_expert_tokens", "seed", "strict",
)  # fmt: skip
OF_WORK = (
    "resume", "overwrite", "time_budget", "on_nonfinite", "max_cpu_mem", "max_gpu_mem", "offload", "verify", "evaluate",
    "threads",
)  # fmt: skip
NO_CODE = "--trust-remote-code is not used: the model brings no code"
_TEXT = ".txt"
# Values of a recipe that a flag replaces -> the field of `Options`; of `Overrides` where it starts with a dot.
_REPLACED = {
    "calibration.data": "calib_data",
    "calibration.samples": "calib_samples",
    "calibration.seqlen": "calib_seqlen",
    "calibration.column": "calib_column",
    "calibration.bos": "bos",
    "calibration.seed": "seed",
    "calibration.moe": "moe_calibration",
    "calibration.min_expert_tokens": "min_expert_tokens",
    "export.dialect": "dialect",
    "quantize.algorithm": "algorithm",
    "quantize.kv_cache": ".kv_cache",
    "quantize.attention": ".attention",
}


def flag(field: str) -> str:
    """Returns the flag of a field: `calib_data` -> `--calib-data`."""
    return "--" + field.replace("_", "-")


def given(options: Options, names: Iterable[str]) -> list[str]:
    """Returns those of these fields that differ from their defaults, as flags; `--no-` where they are on by default."""
    usual = {field.name: field.default for field in fields(options)}
    differing = (name for name in names if getattr(options, name) != usual[name])
    return [_written(name, getattr(options, name), usual[name]) for name in differing]


def _written(name: str, value: object, usual: object) -> str:
    """Returns a switch as it was given: `--no-` where it is off and is on, or decided by the plan, by default."""
    if name == "evaluate":
        return "--eval" if value else "--no-eval"
    return flag(f"no_{name}" if usual is True else name)


def of_run(
    options: Options,
    source: Source,
    plan: Plan,
    needs: Iterable[str],
    calibration: Calibration | None,
    steps: Iterable[Assignment] = (),
) -> list[str]:
    """Returns one line for all flags that have no effect for the same reason."""
    random = any(step.algorithm.random for step in steps)
    found = [*_of_source(options, source, calibration), *_of_settings(options, calibration, random)]
    found += _of_steps(options, plan)
    if calibration is None:
        unused = given(options, (name for name in OF_DATA if not (random and name == "seed")))
        unused += [f"--on-nonfinite {SKIP}"] if options.on_nonfinite == SKIP else []
        unused += [f"--offload {options.offload}"] if options.offload != "auto" else []
        found += [f"{', '.join(unused)} not used: nothing in this plan needs data"] if unused else []
    else:
        found += _of_data(options, plan, set(needs), calibration)
    if options.max_gpu_mem is not None and devices.on_cpu(options.device):
        found.append("--max-gpu-mem is not used: the job runs on a CPU")
    found += judging.idle(options, calibration is not None)
    if options.target == "none" and not plan.disagreeing():
        found.append("--target none changes nothing: weights that servers multiply together have one scheme")
    if options.device == "cuda" and not devices.has_gpu():
        found.append("--device cuda: this machine has no CUDA device, so 'quark quantize' would stop (exit 6)")
    return found


def of_plan(options: Options) -> list[str]:
    """Returns a line for flags about the work that `quark plan` was given."""
    unused = given(options, OF_WORK)
    return [f"{', '.join(unused)} not used: a plan reads no weights and writes nothing"] if unused else []


def of_model(source: Source, *, revision: str = "main", trusted: bool = False, allow_pickle: bool = False) -> list[str]:
    """Returns lines for flags that a model in a local directory, or without code of its own, has no use for.

    `--offline` is a promise that holds whether or not the hub would be asked, and is never idle.
    """
    found = []
    if source.hub_id is None and revision != "main":
        found.append(f"--revision {revision} is not used: a local directory has no revisions")
    if allow_pickle and not source.pickled:
        found.append(pickles.UNUSED)
    if trusted and not brings_code(source):
        found.append(NO_CODE)
    return found


def brings_code(source: Source) -> bool:
    """True when there is Python code beside the weights."""
    return any(name.endswith(".py") for name in source.names())


def _of_source(options: Options, source: Source, calibration: Calibration | None) -> list[str]:
    found = of_model(source, revision=options.revision, allow_pickle=options.allow_pickle)
    if options.trust_remote_code and calibration is None:
        return [*found, "--trust-remote-code is not used: this plan runs no model"]
    return [*found, *of_model(source, trusted=options.trust_remote_code)]


def _of_settings(options: Options, calibration: Calibration | None, random: bool) -> Iterator[str]:
    """Yields lines for `--set` of values that a flag replaces, or that this plan does not look at."""
    for text in options.settings:
        key = text.partition("=")[0]
        field = next((field for name, field in _REPLACED.items() if f"{key}.".startswith(f"{name}.")), None)
        owner = options.overrides if field and field.startswith(".") else options
        if field is not None and getattr(owner, field.removeprefix(".")) is not None:
            yield f"--set {text} is not used: {flag(field.removeprefix('.'))} is given"
        elif calibration is None and key.partition(".")[0] == "calibration" and not (random and field == "seed"):
            yield f"--set {text} is not used: nothing in this plan needs data"


def _of_steps(options: Options, plan: Plan) -> Iterator[str]:
    quantized = {target.name for target in plan.quantized()} if plan.algorithms else set()
    for step in plan.algorithms:
        if not (quantized if step.weights is None else quantized & step.weights):
            given_by = "--algorithm" if options.algorithm else "algorithm"
            yield f"{given_by} {step.name} is not used: no weight that it could work on is quantized"


def of_rows(options: Options, calibration: Calibration) -> Iterator[str]:
    """Yields lines for flags about the choice of rows."""
    if options.calib_column is not None and not _has_columns(calibration.source):
        yield f"--calib-column {options.calib_column} is not used: {calibration.source} is plain text"
    if options.chat_template is not None and not _has_columns(calibration.source):
        yield f"--chat-template {options.chat_template} is not used: {calibration.source} is plain text"
    if options.allow_short and not calibration.asked:
        yield "--allow-short is not used: no number of rows is asked for"


def _of_data(options: Options, plan: Plan, needs: set[str], calibration: Calibration) -> Iterator[str]:
    yield from of_rows(options, calibration)
    if options.moe_calibration is not None and not any(t.expert and t.site in needs for t in plan.targets.values()):
        experts = any(target.expert for target in plan.targets.values())
        why = "no input of an expert is measured" if experts else "the model has no routed experts"
        yield f"--moe-calibration {options.moe_calibration} is not used: {why}"
    if options.min_expert_tokens is not None:
        yield from _of_few(options, plan, needs, calibration)
    if options.offload in ("none", "cpu") and devices.on_cpu(options.device):
        yield f"--offload {options.offload} is not used: on a CPU hidden states are always in RAM"
    if options.calib_batch is not None and devices.on_cpu(options.device):
        yield (
            "--calib-batch is not used: it works only on a GPU; on a CPU the number of rows that run together is fixed"
        )


def _of_few(options: Options, plan: Plan, needs: set[str], calibration: Calibration) -> Iterator[str]:
    said = f"--min-expert-tokens {options.min_expert_tokens} is not used"
    if calibration.moe == "all":
        yield f"{said}: every expert sees all tokens"
    elif not any(target.expert for target in plan.targets.values()):
        yield f"{said}: the model has no routed experts"
    elif not any(t.expert and t.site in needs for t in plan.targets.values()):
        yield f"{said}: no input of an expert is measured"


def _has_columns(data: str) -> bool:
    path = Path(data)
    if path.is_dir():
        return any(file.suffix != _TEXT for file in path.rglob("*") if file.is_file())
    return data not in (BUILTIN, SELF) and path.suffix != _TEXT


def screen(*, progress: str, log_level: str, log_format: str, quiet: bool, plan: bool) -> list[str]:
    """Returns lines for flags about what a job shows while it runs."""
    bar = [f"--progress {progress}"] if progress != "auto" else []
    level = [f"--log-level {log_level}"] if log_level not in ("info", "warning", "error") else []
    if plan:
        return [f"{bar[0]} not used: a plan shows no progress"] if bar else []
    if quiet:
        return [f"{', '.join(bar + level)} not used: --quiet shows only warnings and errors"] if bar + level else []
    if log_format == "json" and progress in ("bar", "lines"):
        return [f"{bar[0]} not used: every event is a line of JSON"]
    return []
