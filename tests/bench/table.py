"""The loss table of docs/benchmarks.md for one model: KL(source || quantized) per token for every scheme.

    python -m tests.bench.table MODEL --calib FILE --text FILE [--tokens 30720] [--window 256]

Without files the built-in text is used for both, so that the command runs anywhere.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from quarkcli.evaluate.run import evaluate
from quarkcli.events import silent
from quarkcli.job.run import EMBEDDED, Options, run

# (scheme, algorithm): every row is measured on its weights alone and, where it has them, with quantized activations.
ROWS = [
    ("int4_wo_128", None),
    ("int4_wo_128", "gptq"),
    ("fp8", None),
    ("nvfp4", None),
    ("mxfp4", None),
    ("nvfp4", "gptq"),
    ("mxfp4", "gptq"),
]


def measure(model: str, scheme: str, algorithm: str | None, args: argparse.Namespace) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        started = time.perf_counter()
        report = run(
            Options(
                model=model,
                scheme=scheme,
                algorithm=algorithm,
                output=out,
                calib_data=args.calib or "builtin",
                calib_samples=128,
                calib_seqlen=256,
                allow_short=True,
                device=args.device,
            )
        )
        seconds = time.perf_counter() - started

        def score(weights_only: bool) -> dict[str, float]:
            return evaluate(
                str(out),
                baseline=model,
                text=args.text,
                window=args.window,
                max_tokens=args.tokens,
                weights_only=weights_only,
                dtype="float32",
                device=args.device,
                tell=silent,
            )

        weights = score(True)
        served = score(False) if any("inputs fp" in key for key in report["modules_by_scheme"]) else weights
    name = scheme + (f" + {algorithm}" if algorithm else "")
    return (
        f"| {name} | {report['size']['effective_bits']:.3f} | {weights['kl']:.5f} | {served['kl']:.5f} "
        f"| {served['baseline_perplexity']:.3f} -> {served['perplexity']:.3f} | {served['top1_agreement']:.4f} "
        f"| {seconds:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calib")
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=30720)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    model = str(EMBEDDED) if args.model == "demo" else args.model
    print("| scheme | bits | KL, weights | KL, as served | perplexity, as served | top-1 | job s |")
    print("|---|---|---|---|---|---|---|")
    for scheme, algorithm in ROWS:
        print(measure(model, scheme, algorithm, args), flush=True)


if __name__ == "__main__":
    main()
