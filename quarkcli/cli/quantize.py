"""`quark quantize`, and `quark plan`, which stops after the plan."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quarkcli.cli import again, apps, output
from quarkcli.cli.jobflags import JobFlags, takes_job_flags
from quarkcli.errors import UsageError

if TYPE_CHECKING:
    from quarkcli.job.options import Options, Prepared
    from quarkcli.job.rates import Rates

QUANTIZE_EXAMPLES = apps.examples(
    "quark quantize --model demo --scheme mxfp4 -o out/demo-mxfp4",
    "quark quantize --model ./my-model --recipe int4_wo_128-gptq --calib-data chats.jsonl --calib-samples 256",
)
PLAN_EXAMPLES = apps.examples(
    "quark plan --model demo --scheme nvfp4 --layer '*down_proj=fp8'",
    "quark plan --model ./my-model --scheme int4_wo_128 --algorithm gptq --ranks 8 --gpu h100",
)
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop. Read no weights.")]


@takes_job_flags
def quantize(flags: JobFlags, *, dry_run: DryRun = False) -> None:
    """Quantize a model and write a checkpoint.

    Checks the model, calibrates if the scheme needs data, writes one layer after the other, and verifies the files.
    Prints the output directory, or with --json the report. Works in <output>.partial; after an interruption the same
    command continues there.
    """
    from quarkcli.job import ranks

    if dry_run:
        if ranks.world()[0] == 0:
            _plan(flags)
        return
    from quarkcli.cli.progress import Progress
    from quarkcli.disk.writer import partial_path
    from quarkcli.evaluation import judge
    from quarkcli.job import run as job

    flags.start()
    options = flags.options()
    first = ranks.world()[0] == 0  # of several ranks, it speaks for all
    with Progress(flags.progress if first else "none") as progress:
        made: list[Prepared] = []
        remarks: list[str] = []

        def planned(prepared: Prepared) -> None:
            made.append(prepared)
            for one in prepared.every:
                one.warnings += flags.idle(plan=False)
            output.session.partial = partial_path(prepared.output)
            remarks.extend(_announce(prepared) if first else [])

        report = job.run(options, progress, planned, judge)
        if not report:  # the first of several ranks has it
            return
        output.session.done = made[0].output
    _conclude(made[0], report, remarks)
    if flags.json:
        output.json_data(report)
    else:
        for one in made[0].every:
            output.data(str(one.checkpoint), whole=True)


CheckModel = Annotated[
    bool,
    typer.Option(
        "--check-model", help="Also build the model's class without weights and check that every tensor fits it."
    ),
]


Ranks = Annotated[
    int | None,
    typer.Option(
        "--ranks",
        min=1,
        max=4096,
        metavar="N",
        help="Forecast the time of N processes with a device each. [default: 1]",
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="Forecast for this device, such as h100. [default: this machine]"),
]
RatesFile = Annotated[
    Path | None,
    typer.Option(
        "--rates",
        metavar="FILE",
        help="Forecast with the speeds that 'quark env --measure' wrote to FILE. [default: this user's, else a guess]",
    ),
]


Modules = Annotated[bool, typer.Option("--modules", help="Show every module and the rule that decided it.")]
Full = Annotated[
    bool,
    typer.Option(
        "--full",
        help="With --json: also list every quantizer (such as up_proj.input_quantizer), weight and kept tensor.",
    ),
]


@takes_job_flags
def plan(
    flags: JobFlags,
    *,
    check_model: CheckModel = False,
    ranks: Ranks = None,
    gpu: Gpu = None,
    rates: RatesFile = None,
    modules: Modules = False,
    full: Full = False,
) -> None:
    """Show what quantize would do.

    Prints every decision, sizes, time, memory and data. Reads only the config and the headers of the weight files.
    Takes all flags of quantize, so you can reuse a command line. Flags about writing and progress have no effect; a
    message says so.
    """
    devices = Devices(ranks or 1, _rates(gpu, rates), shown=ranks is not None or gpu is not None)
    _plan(flags, devices, check_model=check_model, modules=modules, full=full)


@dataclass(frozen=True)
class Devices:
    """The devices that a forecast is for. `shown`: they were asked for, and so every rank is listed."""

    ranks: int
    rates: Rates
    shown: bool = False


def _rates(gpu: str | None, file: Path | None) -> Rates:
    from quarkcli.job import rates

    if gpu is not None and file is not None:
        raise UsageError(
            "--gpu and --rates exclude each other: each names a machine to forecast for",
            hint="leave one of the two out",
            kind="E-FLAG-CONFLICT",
        )
    return rates.of_gpu(gpu) if gpu is not None else rates.of_this_machine(file)


def _plan(
    flags: JobFlags,
    devices: Devices | None = None,
    *,
    check_model: bool = False,
    modules: bool = False,
    full: bool = False,
) -> None:
    from quarkcli.cli import picture, planview, predictview
    from quarkcli.cli.progress import Progress
    from quarkcli.events import Phase
    from quarkcli.job import bulk, idle, predict, preflight
    from quarkcli.job import run as job

    flags.start()
    if full and not flags.json:
        raise UsageError(
            "--full works only with --json",
            hint="add --json, or use --modules for a table of all modules",
            kind="E-FLAG-CONFLICT",
        )
    if modules and flags.json:
        raise UsageError(
            "--modules prints a table and does not work with --json",
            where="--json",
            hint="use --json --full to get every module",
            kind="E-FLAG-CONFLICT",
        )
    devices = devices or Devices(1, _rates(None, None))
    with Progress("lines") as progress:
        prepared = job.prepare(flags.options(), lambda event: None if isinstance(event, Phase) else progress(event))
    prepared.warnings += preflight.misplaced(prepared.output, prepared.source.folder)
    prepared.warnings += [*idle.of_plan(prepared.options), *flags.idle(plan=True)]
    if check_model:
        for line in job.check_model(prepared):
            output.note(line)
    forecast = predict.of_plan(prepared, devices.rates, devices.ranks)
    remarks = bulk.remarks(prepared)
    if flags.json:
        plan = planview.as_json(prepared, full)
        output.json_data({**plan, "remarks": remarks, "forecast": predict.as_json(forecast)})
        return
    if modules:
        planview.show(prepared, output.pairs(predictview.rows(forecast)))
    else:
        for line in [*picture.lines(prepared, forecast, remarks=remarks), picture.NEXT]:
            output.data(line)
    if devices.shown:
        predictview.show(forecast)
    planview.warn(prepared)


def _announce(prepared: Prepared) -> list[str]:
    """Prints the plan before the work. Returns what is to say of it again at the end."""
    from quarkcli.cli import picture, planview, tables
    from quarkcli.job import bulk

    remarks = bulk.remarks(prepared)
    if output.session.format == "json":
        brief = planview.as_json(prepared)
        del brief["entries"]
        output.event("plan", {**brief, "remarks": remarks})
        return remarks
    for line in picture.lines(prepared, None, tables.room("stderr"), remarks):
        output.note(line)
    return remarks


def _conclude(prepared: Prepared, report: dict[str, Any], remarks: Sequence[str]) -> None:
    """Prints the end of a run: the plan's table with what was written, what it has cost, and what to type next."""
    from quarkcli.cli import picture, summary
    from quarkcli.job import directories

    commands = _next(prepared)
    reports = directories.reports(prepared, report)
    for one in reports.values():
        output.summarize(summary.markdown(one))
    if output.session.format == "json":
        output.event("done", {"output": str(prepared.output), "next": commands})
        return
    for line in picture.after(next(iter(reports.values()))):
        output.note(line)
    for line in summary.lines(reports, commands, remarks):
        output.note(line)


def _next(prepared: Prepared) -> list[str]:
    options: Options = prepared.options
    made = shlex.quote(str(prepared.checkpoint))
    accepted = [*again.CODE_AND_PICKLES, *(["on_nonfinite"] if options.on_nonfinite == "keep" else [])]
    commands = [f"quark eval {made} --baseline {shlex.quote(options.model)}{again.flags(options, accepted)}"]
    served = [one for one in prepared.every if "vllm" in one.dialect.loaders(one.plan)]
    return commands + [f"vllm serve {shlex.quote(str(one.checkpoint))}" for one in served]
