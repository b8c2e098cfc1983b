"""Defines the flags of a job about the run and its messages."""

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
        Option(
            "--resume",
            help="Continue an interrupted run. auto: if there is one. never: start again. require: "
            "stop if there is none.",
        ),
    ] = "auto"
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an output directory that exists already.")] = False
    strict: Annotated[bool, Option("--strict", help="Stop at a warning about calibration (exit 7).")] = False
    on_nonfinite: Annotated[
        Literal["stop", "skip-algorithm", "keep"],
        Option(
            "--on-nonfinite",
            help="What to do at NaN or inf. stop: end with exit 7. skip-algorithm: if calibration meets it, round the "
            "weights concerned to nearest and warn. keep: accept it in tensors that are not quantized and warn.",
        ),
    ] = "stop"
    time_budget: Annotated[
        float | None,
        Option(
            "--time-budget",
            metavar="TIME",
            parser=seconds,
            help="Stop (exit 75) after this time, such as 3h50m, when the current layer is done. The same command "
            "continues.",
        ),
    ] = None
    max_cpu_mem: Annotated[
        int | None,
        Option(
            "--max-cpu-mem",
            metavar="SIZE",
            parser=size,
            help="Stop (exit 6) before the work if it needs more memory than this, such as 48GB, or after a layer "
            "that took more.",
        ),
    ] = None
    max_gpu_mem: Annotated[
        int | None,
        Option(
            "--max-gpu-mem",
            metavar="SIZE",
            parser=size,
            help="Use at most this much GPU memory, such as 20GB. When it is full, batches shrink, then hidden "
            "states move to RAM.",
        ),
    ] = None
    offload: Annotated[
        Literal["auto", "none", "cpu", "disk"],
        Option(
            "--offload",
            help="Where to keep hidden states, the activations between two layers. auto: on the GPU while they "
            "are small. none: always on the GPU. cpu: in RAM. disk: in files beside the output.",
        ),
    ] = "auto"
    verify: Annotated[
        bool,
        Option(
            "--verify/--no-verify", help="Read the written scales back and check them before the output gets its name."
        ),
    ] = True
    evaluate: Annotated[
        bool | None,
        Option(
            "--eval/--no-eval",
            help="Compare the result with the original model on 4,096 tokens that calibration does not use: KL "
            "divergence, perplexity. [default: after calibration on 40,960 tokens or more]",
            show_default=False,
        ),
    ] = None
    keep_download: Annotated[
        bool,
        Option(
            "--keep-download",
            help="Keep the weights of a hub model in the hub's cache. [default: each file is deleted after use]",
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
        Option(
            "--progress",
            help="How to show progress. auto: a bar on a terminal, else a line for each part of the model.",
        ),
    ] = "auto"
    log_level: LogLevel = "info"
    log_format: LogFormat = None
    debug: Debug = False
