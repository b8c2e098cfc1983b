"""Forecasts of time and memory against real runs: the machine is measured, jobs are run, and so on in turn.

    python -m tests.bench.predict [--times 5] [--model DIR] [--threads 1]

Seconds are those of processors, since a machine may do other work as well; with one thread they are what a quiet
machine's clock shows. The model is a Llama of 28 blocks and 0.67 GiB, built here unless it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quarkcli.job import predict, probe, rates
from quarkcli.job import run as job
from quarkcli.job.options import Options
from tests.bench.clock import processor_seconds
from tests.bench.memory import build

CHILD = """
import json, sys
from pathlib import Path
from quarkcli.job.run import Options, run
from quarkcli.memory import peak_rss
from tests.bench.clock import processor_seconds
model, out = sys.argv[1:3]
run(Options(model=model, output=Path(out), device="cpu", overwrite=True, **json.loads(sys.argv[3])))
print(json.dumps({"rss": peak_rss(), "seconds": processor_seconds()}))
"""
# Job -> hidden and inner width, blocks, options.
JOBS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "nvfp4 weights, data-free": ((1024, 2560, 28), {"scheme": "nvfp4_weight_only"}),
    "fp8 static, 8 x 128": ((1024, 2560, 28), {"scheme": "fp8", "calib_samples": 8, "calib_seqlen": 128}),
    "int4 gptq, 8 blocks, 32 x 256": (
        (1024, 3072, 8),
        {"scheme": "int4_wo_128", "algorithm": "gptq", "calib_samples": 32, "calib_seqlen": 256},
    ),
}
GOAL = 0.3


def options(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "calib_data": "builtin"} if "calib_samples" in settings else settings


def forecast(model: Path, settings: dict[str, Any], measured: rates.Rates) -> tuple[float, int]:
    """Seconds and bytes of memory."""
    found = predict.of_plan(job.prepare(Options(model=str(model), **options(settings))), measured, 1)
    return found.time, found.ranks[0].host


def real(model: Path, out: Path, settings: dict[str, Any]) -> tuple[float, int]:
    run = [sys.executable, "-c", CHILD, str(model), str(out), json.dumps(options(settings))]
    found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    return found["seconds"], found["rss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a model of the first job's shape that is there already")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    figures: dict[str, list[tuple[float, int, float, int]]] = {name: [] for name in JOBS}
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        models = {JOBS["nvfp4 weights, data-free"][0]: args.model} if args.model else {}
        for shape in {shape for shape, _ in JOBS.values()} - set(models):
            models[shape] = root / "-".join(map(str, shape))
            build(models[shape], shape[2], *shape[:2])
        for number in range(args.times):
            measured = probe.measure("cpu", processor_seconds)
            for name, (shape, settings) in JOBS.items():
                row = (*forecast(models[shape], settings, measured), *real(models[shape], root / "out", settings))
                figures[name].append(row)
                print(f"{number + 1} {name}: forecast {row[0]:.1f} s, {row[2]:.1f} s", file=sys.stderr, flush=True)
    print("| job | forecast s | run s | ratio | forecast MB | run MB | ratio | within 30 % |")
    print("|---|---|---|---|---|---|---|---|")
    for name, rows in figures.items():
        said, bytes_said, took, bytes_taken = (statistics.median(column) for column in zip(*rows, strict=True))
        times, sizes = said / took, bytes_said / bytes_taken
        good = abs(times - 1) <= GOAL and abs(sizes - 1) <= GOAL
        cells = (
            f"{said:.1f} | {took:.1f} | {times:.2f} | {bytes_said / 1e6:.0f} | {bytes_taken / 1e6:.0f} | {sizes:.2f}"
        )
        print(f"| {name} | {cells} | {'yes' if good else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
