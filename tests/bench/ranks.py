"""One rank with as many threads against as many ranks of one thread: the same job in turn, data-free by default.

    python -m tests.bench.ranks [--model DIR] [--ranks 2] [--rounds 5] [flags of quantize ...]

Work is the report's time: without imports, and without what processes wait for each other at the start. Processor
seconds are those of all processes, imports included, for the machine may have other work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.bench.memory import build


class Taken(NamedTuple):
    """Seconds of one run."""

    work: float
    whole: float
    processor: float


def once(model: Path, out: Path, ranks: int, threads: int, flags: list[str]) -> tuple[Taken, str]:
    """Returns the seconds of one run, and a digest of its weight files."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*(start if ranks > 1 else [sys.executable, "-m"]), "quarkcli", "quantize", "--model", str(model)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "-o", str(out), "-q", *flags], check=True, capture_output=True, env=env)
    whole, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    work = json.loads((out / "quark" / "report.json").read_text())["seconds"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(out.glob("*.safetensors")))).hexdigest()
    return Taken(work, whole, used), digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args, flags = parser.parse_known_args()
    flags = flags or ["--scheme", "nvfp4_weight_only"]
    taken: dict[str, list[Taken]] = {}
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = Path(folder) / "model"
            build(model, 28, 1024, 2560)
        for number in range(args.rounds):
            for ranks, threads in ((1, args.ranks), (args.ranks, 1)):
                out = Path(folder) / f"{number}-{ranks}"
                found, digest = once(model, out, ranks, threads, [*flags, "--device", "cpu"])
                taken.setdefault(f"{ranks} x {threads} thread", []).append(found)
                digests.add(digest)
                subprocess.run(["rm", "-r", str(out)], check=True)
    print(f"{' '.join(flags)}; the same bytes: {len(digests) == 1}")
    print("| ranks x threads | work s | whole s | processor s |\n|---|---|---|---|")
    for name, rows in taken.items():
        middle = [statistics.median(column) for column in zip(*rows, strict=True)]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in middle) + " |")


if __name__ == "__main__":
    main()
