"""Calibrated runs on a CPU: seconds of the whole process and of the work, and peak memory, beside what products take.

    python -m tests.bench.calibrated [--repeat 3] [--growth]

fp8 with static inputs on 28 blocks of width 1024 / 2560 with 8 x 128 tokens, and gptq int4 in groups of 128 on 8 blocks
of width 1024 / 3072 with 32 x 256 tokens: random weights in the shape of a Llama. Work is from the first byte that is
read to the end. The limit beside it are the products of all weights with all tokens, twice, in bfloat16.

`--growth` shows fp8's cost and peak with 12 and 96 blocks of width 256 / 640 instead, on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from tests.bench.datafree import Run, median, run
from tests.bench.memory import build

JOBS = {
    "fp8, static": (28, 1024, 2560, "fp8", (), 8, 128),
    "int4_wo_128 + gptq": (8, 1024, 3072, "int4_wo_128", ("--algorithm", "gptq"), 32, 256),
    "int4_wo_128 + gptq, refine off": (
        8,
        1024,
        3072,
        "int4_wo_128",
        ("--algorithm", "gptq", "--set", "gptq.refine=off"),
        32,
        256,
    ),
}


def products(blocks: int, hidden: int, inter: int, tokens: int) -> float:
    """Returns the seconds that the products of two passes take, with as many threads as torch takes."""
    shapes = [(hidden, hidden)] * 4 + [(inter, hidden)] * 2 + [(hidden, inter)]
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    inputs = {width: torch.randn(tokens, width).bfloat16() for width in (hidden, inter)}

    def block() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    block()
    started = time.perf_counter()
    for _ in range(2 * blocks):
        block()
    return time.perf_counter() - started


def growth(repeat: int) -> None:
    """Prints cost per block and peak by the number of equal blocks."""
    data = ("--calib-data", "builtin", "--calib-samples", "8", "--calib-seqlen", "128", "--no-eval", "--threads", "1")
    print("| blocks | processor s per block | peak MB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for count in (12, 96):
            model = Path(name) / str(count)
            build(model, count, 256, 640)
            one = median([run(model, "fp8", Path(name), *data) for _ in range(repeat)])
            print(f"| {count} | {one.processor / count:.4f} | {one.peak / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    arguments = parser.parse_args()
    repeat = arguments.repeat
    if arguments.growth:
        growth(repeat)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        models = {sizes: work / f"model-{number}" for number, sizes in enumerate({job[:3] for job in JOBS.values()})}
        for sizes, folder in models.items():
            build(folder, *sizes)
        found: dict[str, list[Run]] = {job: [] for job in JOBS}
        limits: dict[str, list[float]] = {job: [] for job in JOBS}
        for _ in range(repeat):
            for job, (blocks, hidden, inter, scheme, steps, rows, seqlen) in JOBS.items():
                limits[job].append(products(blocks, hidden, inter, rows * seqlen))
                data = ("--calib-data", "builtin", "--calib-samples", str(rows), "--calib-seqlen", str(seqlen))
                found[job].append(run(models[blocks, hidden, inter], scheme, work, *steps, *data, "--no-eval"))
        print("| job | whole s | work s | products alone s | processor s | peak MB |\n|---|---|---|---|---|---|")
        for job, runs in found.items():
            one, limit = median(runs), min(limits[job])
            numbers = f"{one.whole:.2f} | {one.work:.2f} | {limit:.2f} | {one.processor:.2f}"
            print(f"| {job} | {numbers} | {one.peak / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
