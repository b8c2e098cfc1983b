"""Flags of a job: how it runs, and what is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from quarkcli.cli.amounts import seconds, size
from quarkcli.cli.flags import Debug, Device, Json, Offline, Option, Pickle, Quiet, Revision, Threads, Trust
from quarkcli.cli.flags_calibration import CalibrationFlags
from quarkcli.cli.logflags import LogFormat, LogLevel


@dataclass
class RunFlags(CalibrationFlags):
    device: Device = "auto"
    threads: Threads = None
    resume: Annotated[
        Literal["auto", "never", "require"],
        Option("--resume", help="Go on with an interrupted run: where there is one, never, or it is an error."),
    ] = "auto"
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an output directory that exists.")] = False
    strict: Annotated[bool, Option("--strict", help="Warnings about calibration become errors.")] = False
    on_nonfinite: Annotated[
        Literal["stop", "skip-algorithm", "keep"],
        Option(
            "--on-nonfinite",
            help="NaN or inf: an error; skip-algorithm: in calibration, what it touches is rounded to nearest instead, "
            "with a warning; keep: in tensors that stay as they are, a warning.",
        ),
    ] = "stop"
    time_budget: Annotated[
        float | None,
        Option(
            "--time-budget", metavar="TIME", parser=seconds, help="Stop after a part (exit 75) when 3h50m are used up."
        ),
    ] = None
    max_cpu_mem: Annotated[
        int | None,
        Option(
            "--max-cpu-mem",
            metavar="SIZE",
            parser=size,
            help="Stop (exit 6) before the work where more memory is forecast, and after a part that took more: 48GB.",
        ),
    ] = None
    max_gpu_mem: Annotated[
        int | None,
        Option(
            "--max-gpu-mem",
            metavar="SIZE",
            parser=size,
            help="Take no more of the device's memory: 20GB. Out of it, batches shrink, then hidden states go to the "
            "host.",
        ),
    ] = None
    offload: Annotated[
        Literal["auto", "none", "cpu", "disk"],
        Option(
            "--offload",
            help="Where hidden states wait between blocks; auto: on the device while they are small there; none: on "
            "the device, always; cpu: in the host's memory; disk: in files beside the output.",
        ),
    ] = "auto"
    verify: Annotated[
        bool, Option("--verify/--no-verify", help="Read the written scales back before the output gets its name.")
    ] = True
    evaluate: Annotated[
        bool | None,
        Option(
            "--eval/--no-eval",
            help="Score what was written against the model, on 4,096 tokens that calibration does not use: KL, "
            "perplexity. [default: after calibration on 40,960 tokens or more]",
            show_default=False,
        ),
    ] = None
    keep_download: Annotated[
        bool,
        Option(
            "--keep-download",
            help="Weights of a hub id go to the hub's cache and stay there. [default: each file is dropped after use]",
        ),
    ] = False
    trust_remote_code: Trust = False
    allow_pickle: Pickle = False
    revision: Revision = "main"
    offline: Offline = False
    json: Json = False
    quiet: Quiet = False
    progress: Annotated[
        Literal["auto", "bar", "lines", "none"],
        Option("--progress", help="auto: a bar on a terminal, else a line per part."),
    ] = "auto"
    log_level: LogLevel = "info"
    log_format: LogFormat = None
    debug: Debug = False
