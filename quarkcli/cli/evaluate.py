"""`quark eval`: measures the written files, with limits for CI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from quarkcli.cli import apps, github, output, verdict
from quarkcli.cli.amounts import amount
from quarkcli.cli.flags import (
    Bos,
    Debug,
    Device,
    Json,
    Nonfinite,
    Offline,
    Pickle,
    Quiet,
    Threads,
    Trust,
)
from quarkcli.cli.logflags import LogFormat, LogLevel

EXAMPLES = apps.examples(
    "quark eval out/demo-mxfp4 --baseline demo",
    "quark eval out/demo-mxfp4 --baseline demo --max-kl 0.1 --max-ppl-increase 3% --json",
)

Window = Annotated[
    int | None,
    typer.Option(
        "--window", min=2, metavar="N", help="Tokens in each window; windows do not overlap.", show_default="256"
    ),
]


def percent(text: str) -> float:
    """Returns `3%` as 0.03."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1.0
    if not text.endswith("%") or not 0 <= number < float("inf"):
        raise typer.BadParameter(f"'{text}' is not a percentage; write 3%")
    return number / 100


Divergence = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        parser=amount,
        metavar="X",
        help="Fail (exit 8) if the KL divergence from the baseline is above X nats per token; 0 means equal "
        "predictions.",
    ),
]
Increase = Annotated[
    float | None,
    typer.Option(
        "--max-ppl-increase",
        metavar="P%",
        parser=percent,
        help="Fail (exit 8) if perplexity is more than P% above the baseline's.",
    ),
]
WeightsOnly = Annotated[
    bool,
    typer.Option(
        "--weights-only", help="Measure quantized weights only; leave activations and the KV cache unquantized."
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option("--dtype", help="Number format of the computation. auto: float32 on a CPU, bfloat16 on a GPU."),
]

Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="DIR_OR_ID", help="Original model to compare with; 'demo' is the embedded one."),
]


def evaluate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, quantized or not.")],
    baseline: Baseline = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Text file to measure on. [default: the built-in text]")
    ] = None,
    window: Window = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, metavar="N", help="Measure at most N tokens of the text.")
    ] = None,
    bos: Bos = "auto",
    max_kl: Divergence = None,
    max_ppl_increase: Increase = None,
    weights_only: WeightsOnly = False,
    dtype: Dtype = "auto",
    on_nonfinite: Nonfinite = "stop",
    device: Device = "auto",
    threads: Threads = None,
    trust_remote_code: Trust = False,
    offline: Offline = False,
    allow_pickle: Pickle = False,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = None,
    debug: Debug = False,
) -> None:
    """Measure how well a checkpoint predicts text.

    Prints perplexity, which is lower for a better model. Limits make it a check for CI. With --baseline also prints how
    far the predictions are from the original model's: KL divergence and top-1 agreement (how often both predict the
    same token).
    """
    output.start(json=json, debug=debug, quiet=quiet, log_format=log_format, log_level=log_level)
    from quarkcli.api import evaluation
    from quarkcli.cli.progress import Progress

    def measured() -> dict[str, Any]:
        with Progress() as progress:
            return evaluation.evaluate(
                directory, baseline=baseline, text=text, window=window, tokens=tokens, bos=bos, max_kl=max_kl,
                max_ppl_increase=max_ppl_increase, weights_only=weights_only, dtype=dtype, on_nonfinite=on_nonfinite,
                device=device, threads=threads, trust_remote_code=trust_remote_code, offline=offline,
                allow_pickle=allow_pickle, listener=progress,
            )  # fmt: skip

    verdict.shown(measured, lambda result: _show(result, json))


def _show(result: dict[str, Any], json: bool) -> None:
    rows = _rows(result)
    output.summarize(github.section(f"quark eval {result['directory']}", github.table(rows)))
    if json:
        output.json_data(result)
        return
    for line in output.pairs(rows):
        output.data(line)
    output.note(f"{result['seconds']:.1f} s")


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("perplexity", f"{result['perplexity']:.4f}")]
    if result["baseline_perplexity"] is not None:
        rows += [
            ("baseline", f"{result['baseline_perplexity']:.4f} ({result['perplexity_increase']:+.2%} increase)"),
            ("kl", f"{result['kl']:.6f} nats per token"),
            ("top-1", f"{result['top1_agreement']:.2%} agreement"),
        ]
    rows += [
        ("tokens", f"{result['tokens']:,} in windows of {result['window']}, {result['text']}"),
        ("dtype", str(result["dtype"])),
    ]
    return rows + output.listed("limit", [_limit(limit) for limit in result["limits"]])


def _limit(asked: dict[str, Any]) -> str:
    shown = "{:.2%}" if asked["name"] == "max_ppl_increase" else "{:g}"
    word = "passed" if asked["passed"] else "failed"
    return f"--{asked['name'].replace('_', '-')} {shown.format(asked['limit'])}: {word}"
