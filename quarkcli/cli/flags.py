"""The flags of `quantize` and `plan`, said once. Field names are those of `options.Options` and `Overrides`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from quarkcli.cli import output
from quarkcli.cli.amounts import seconds, size
from quarkcli.cli.completion import names, targets
from quarkcli.cli.logflags import LogFormat, LogLevel

if TYPE_CHECKING:
    from quarkcli.job.options import Options

Option = typer.Option

Model = Annotated[
    str, Option("--model", metavar="DIR_OR_ID", help="Model directory, hub id, or 'demo' for the embedded model.")
]
Json = Annotated[
    bool, Option("--json", help="The answer as one JSON object on stdout; every line on stderr is a JSON object.")
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Only warnings and errors on stderr.")]
Debug = Annotated[bool, Option("--debug", help="Show tracebacks (also QUARK_DEBUG=1).")]
Device = Annotated[Literal["auto", "cpu", "cuda"], Option("--device", help="auto: the GPU where there is one.")]
Threads = Annotated[
    int | None,
    Option(
        "--threads",
        min=1,
        metavar="N",
        help="Threads that compute on the CPU; data-free, each does a weight of its own; the bytes are the same. "
        "[default: OMP_NUM_THREADS, else the cores that this process may use]",
    ),
]
Trust = Annotated[
    bool, Option("--trust-remote-code", help="Run Python code that the model's directory brings: it is foreign code.")
]
Pickle = Annotated[
    bool,
    Option(
        "--allow-pickle",
        help="Read pytorch_model.bin files where there are no safetensors files: tensors alone, no code of theirs.",
    ),
]
Bos = Annotated[
    Literal["auto", "on", "off"],
    Option("--bos", help="Whether rows begin with the tokenizer's BOS token; auto: as the tokenizer begins a text."),
]
Nonfinite = Annotated[
    Literal["stop", "keep"],
    Option("--on-nonfinite", help="NaN or inf in tensors that stay as they are: an error, or a warning."),
]
Revision = Annotated[str, Option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")]
Offline = Annotated[
    bool, Option("--offline", envvar="HF_HUB_OFFLINE", help="Use only what is local or in the hub cache.")
]
Servers = Annotated[
    str,
    Option(
        "--target",
        metavar="SERVER",
        autocompletion=targets,
        help="The server that must load it, such as vllm; auto: any, so that weights which they fuse have one scheme; "
        "none: nothing in particular.",
    ),
]
_Many = list[str] | None


@dataclass
class JobFlags:
    """One field per flag; None and empty mean not given."""

    model: Model
    scheme: Annotated[
        str | None,
        Option("--scheme", metavar="NAME", autocompletion=names("schemes"), help="See 'quark schemes list'."),
    ] = None
    recipe: Annotated[
        str | None,
        Option(
            "--recipe",
            metavar="NAME_OR_FILE",
            autocompletion=names("ptq"),
            help="Instead of --scheme; see 'quark recipes list'.",
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the recipe, calibration.samples=64, or a parameter of an algorithm, gptq.damp=0.05. "
            "Repeatable.",
        ),
    ] = None
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="DIR", help="Where to write. [default: ./<model>-<scheme>]")
    ] = None
    dialect: Annotated[
        str | None,
        Option(
            "--dialect",
            "--format",
            metavar="NAMES",
            help="On-disk convention, or auto: one that most servers load. Of a comma list, each gets a directory of "
            "its name in the output, all from one run. [default: the recipe's, else auto]",
        ),
    ] = None
    target: Servers = "auto"
    tp: Annotated[
        int | None,
        Option(
            "--tp",
            min=1,
            metavar="N",
            help="Servers must be able to split it over N devices (tensor parallel); else stop before the work.",
        ),
    ] = None
    exclude: Annotated[
        _Many,
        Option("--exclude", metavar="PATTERN", help="Keep these modules as they are: glob, or re:REGEX. Repeatable."),
    ] = None
    include: Annotated[
        _Many, Option("--include", metavar="PATTERN", help="Quantize these although excluded by default. Repeatable.")
    ] = None
    layers: Annotated[
        _Many,
        Option("--layer", metavar="PATTERN=SCHEME", help="Another scheme for these modules; later wins. Repeatable."),
    ] = None
    layer_types: Annotated[
        _Many,
        Option("--layer-type", metavar="CLASS=SCHEME", help="The same by class: Linear or Embedding. Repeatable."),
    ] = None
    unprotect: Annotated[
        _Many,
        Option(
            "--unprotect", metavar="ROLE", help="Drop the default exclusion of a role: head, embedding, ... Repeatable."
        ),
    ] = None
    on_indivisible: Annotated[
        Literal["error", "keep", "pad"],
        Option(
            "--on-indivisible",
            help="Modules whose width is no multiple of the scheme's group: an error; keep: they stay as they are; "
            "pad: the last group of a row is shorter, which no server loads.",
        ),
    ] = "error"
    allow_unmatched: Annotated[
        bool, Option("--allow-unmatched", help="A pattern that matches no module is not an error.")
    ] = False
    kv_cache: Annotated[
        str | None,
        Option(
            "--kv-cache",
            metavar="NAME",
            autocompletion=names("kv_cache"),
            help="Quantize the KV cache: fp8, nvfp4, or none.",
        ),
    ] = None
    attention: Annotated[
        str | None,
        Option(
            "--attention",
            metavar="NAME",
            autocompletion=names("attention"),
            help="Quantize queries, keys, values and softmax outputs: fp8, or none.",
        ),
    ] = None
    min_kv_scale: Annotated[
        float | None, Option("--min-kv-scale", metavar="F", help="Scales of the KV cache are at least this.")
    ] = None
    algorithm: Annotated[
        str | None,
        Option(
            "--algorithm",
            metavar="NAMES",
            help="Comma list in order, such as smoothquant,gptq, or auto: the default advice for each format. "
            "See 'quark algorithms list'. [default: the recipe's]",
        ),
    ] = None
    calib_data: Annotated[
        str | None,
        Option(
            "--calib-data",
            metavar="SOURCE",
            help="File (.jsonl, .json, .parquet, .txt, .md; .gz as well), directory, hub data set, 'builtin', or "
            "'self': text that the model writes; rows that cannot be used are skipped and counted. [default: the "
            "recipe's, else a hub set when it can be reached, else builtin with a warning]",
        ),
    ] = None
    calib_samples: Annotated[
        int | None, Option("--calib-samples", min=1, metavar="N", help="Rows. [default: the recipe's, else 512]")
    ] = None
    calib_seqlen: Annotated[
        int | None, Option("--calib-seqlen", min=2, metavar="N", help="Tokens per row. [default: recipe's, else 512]")
    ] = None
    calib_batch: Annotated[
        int | None, Option("--calib-batch", min=1, metavar="N", help="Rows that run together on a GPU. [default: auto]")
    ] = None
    calib_column: Annotated[
        str | None,
        Option(
            "--calib-column",
            metavar="NAME",
            help="Column with text or messages. [default: messages, conversations, text, or prompt and response]",
        ),
    ] = None
    chat_template: Annotated[
        Path | None,
        Option(
            "--chat-template",
            metavar="FILE",
            help="Jinja template that turns conversations into rows, instead of the tokenizer's own; the checkpoint's "
            "stays as it is.",
        ),
    ] = None
    bos: Annotated[
        Literal["auto", "on", "off"] | None,
        Option(
            "--bos",
            help="Whether rows begin with the tokenizer's BOS token; auto: as the tokenizer, or the chat template, "
            "begins a text.",
            show_default="recipe's, else auto",
        ),
    ] = None
    allow_short: Annotated[bool, Option("--allow-short", help="Fewer rows than asked for are used, not an error.")] = (
        False
    )
    moe_calibration: Annotated[
        Literal["routed", "all"] | None,
        Option(
            "--moe-calibration",
            help="Tokens an expert is calibrated on: those routed to it, or all.",
            show_default="routed",
        ),
    ] = None
    min_expert_tokens: Annotated[
        int | None,
        Option(
            "--min-expert-tokens",
            min=1,
            metavar="N",
            help="Experts that see fewer tokens take the statistics of their layer.",
            show_default="1",
        ),
    ] = None
    device: Device = "auto"
    threads: Threads = None
    seed: Annotated[
        int | None, Option("--seed", metavar="N", help="Seed of the choice of calibration rows.", show_default="0")
    ] = None
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

    def options(self) -> Options:
        """Returns the options of the job."""
        from quarkcli.job.options import Options
        from quarkcli.plan.compose import Overrides

        return Options(
            **self._of(Options),
            overrides=Overrides(**self._of(Overrides)),
            command=("quark", *output.session.arguments),
        )

    def start(self) -> None:
        """Sets up the screen for this command."""
        output.start(
            json=self.json, debug=self.debug, quiet=self.quiet, log_format=self.log_format, log_level=self.log_level
        )

    def idle(self, *, plan: bool) -> list[str]:
        """Returns lines for the flags about the screen that have no effect."""
        from quarkcli.job import idle

        return idle.screen(
            progress=self.progress,
            log_level=self.log_level,
            log_format=output.session.format,
            quiet=self.quiet,
            plan=plan,
        )

    def _of(self, record: type[Any]) -> dict[str, Any]:
        """Returns the given flags that are fields of `record`."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {field.name: given[field.name] for field in fields(record) if field.name in given}


def takes_job_flags(body: Callable[..., None], *, without: Collection[str] = ()) -> Callable[..., None]:
    """Returns a Typer command with the flags of `JobFlags`, before whatever keyword parameters `body` adds.

    without   fields that the command has no flag for
    """

    def command(**values: Any) -> None:
        own = {name: values.pop(name) for name in added}
        body(JobFlags(**values), **own)

    flags = {name: flag for name, flag in _parameters(JobFlags, skip=0).items() if name not in without}
    added = _parameters(body, skip=1)
    signature = inspect.Signature([*flags.values(), *added.values()])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__doc__ = body.__doc__
    return command


def _parameters(of: Callable[..., Any], skip: int) -> Mapping[str, inspect.Parameter]:
    hints = get_type_hints(of, include_extras=True)
    found = list(inspect.signature(of).parameters.values())[skip:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return {p.name: p.replace(annotation=hints[p.name], kind=keyword) for p in found}
