"""Data-free runs on a CPU: seconds of the whole process and of the work, peak memory, growth, contention.

    python -m tests.bench.datafree [--model DIR] [--blocks 12 48] [--schemes nvfp4_weight_only ...] [--repeat 3]

Work is from the first byte that is read to the end, without start-up. Every round makes a copy of the model's files,
durable as ours, which is what a run that computes nothing takes; then the runs one after the other. Medians are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.bench.memory import build

CHILD = """
import json, resource, sys, time
from quarkcli.cli import main
from quarkcli.disk.source import Source
begun, real = [], Source.read_many
def noted(self, names):
    begun.append((time.perf_counter(), time.process_time()))
    return real(self, names)
Source.read_many = noted
facts_file, sys.argv = sys.argv[1], ["quark", *sys.argv[2:]]
try:
    code = main.run()  # as the command does it, to the end of its process
except SystemExit as end:
    code = end.code
now = time.perf_counter(), time.process_time()
from quarkcli.memory import peak_rss
facts = {"work": now[0] - begun[0][0], "processor": now[1] - begun[0][1], "peak": peak_rss()}
open(facts_file, "w").write(json.dumps(facts))
sys.exit(code)
"""
SCHEMES = ("nvfp4_weight_only", "mxfp4", "fp8_block128", "ptpc_fp8", "int8_dynamic", "int4_wo_128")
BUSY = "while True: pass"


class Run(NamedTuple):
    """Seconds of the whole process, of the work, and of processors at it; peak bytes."""

    whole: float
    work: float
    processor: float
    peak: float


NOT_FOR_RUNS = {"OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE"}


def run(model: Path, scheme: str, work: Path, *flags: str) -> Run:
    """Quantizes in a process of its own, with the threads that are the default."""
    out, facts = work / "out", work / "facts.json"
    shutil.rmtree(out, ignore_errors=True)
    # Modules are compiled once, as pip does for those that it installs.
    environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_RUNS}
    command = ["quantize", "--model", str(model), "--scheme", scheme, "-o", str(out), "--quiet", "--device", "cpu"]
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", CHILD, str(facts), *command, *flags],
        check=True, stdout=subprocess.DEVNULL, env={**environment, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    whole = time.perf_counter() - started
    return Run(whole, **json.loads(facts.read_text()))


def copied(model: Path, work: Path) -> float:
    """Returns the seconds that a durable copy of the weight files takes."""
    started = time.perf_counter()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as source, (work / "copy").open("wb") as to:
            shutil.copyfileobj(source, to, 1 << 22)
            to.flush()
            os.fsync(to.fileno())
    (work / "copy").unlink()
    return time.perf_counter() - started


@contextmanager
def other_work(count: int = 2) -> Iterator[None]:
    """Keeps `count` processors busy inside."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def median(runs: list[Run]) -> Run:
    return Run(*(statistics.median(column) for column in zip(*runs, strict=True)))


def weights(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def schemes(model: Path, names: list[str], work: Path, repeat: int) -> None:
    """Prints what each scheme takes, beside a copy of the files."""
    found: dict[str, list[Run]] = {name: [] for name in names}
    copies = []
    for _ in range(repeat):
        copies.append(copied(model, work))
        for name in names:
            found[name].append(run(model, name, work))
    copy = statistics.median(copies)
    print(f"{weights(model) / 2**30:.2f} GiB; a copy of it takes {copy:.2f} s\n")
    print("| scheme | whole s | work s | of a copy | processor s | peak MB |\n|---|---|---|---|---|---|")
    for name, runs in found.items():
        one = median(runs)
        numbers = f"{one.whole:.2f} | {one.work:.2f} | {one.work / copy:.1f} | {one.processor:.2f}"
        print(f"| {name} | {numbers} | {one.peak / 1e6:.0f} |", flush=True)


def growth(scheme: str, blocks: list[int], work: Path, repeat: int) -> None:
    """Prints cost and peak by the number of equal blocks. The processor's seconds do not depend on other work."""
    models = {}
    for count in blocks:
        models[count] = work / f"blocks-{count}"
        build(models[count], count, 1024, 2560)
    found = {count: median([run(model, scheme, work) for _ in range(repeat)]) for count, model in models.items()}
    print("\n| blocks | processor s per GB | work s per GB | peak MB |\n|---|---|---|---|")
    for count, one in found.items():
        size = weights(models[count]) / 1e9
        print(f"| {count} | {one.processor / size:.2f} | {one.work / size:.2f} | {one.peak / 1e6:.0f} |")
        shutil.rmtree(models[count])


def experts(scheme: str, work: Path, repeat: int) -> None:
    """Prints cost and peak by the number of experts that one amount of weights is divided among."""
    print("\n| experts of a block, 4 blocks | processor s per GB | peak MB |\n|---|---|---|")
    for count in (8, 32, 128):
        model = work / f"experts-{count}"
        build(model, 4, 1024, 16384 // count, count)
        one = median([run(model, scheme, work) for _ in range(repeat)])
        print(f"| {count} | {one.processor / (weights(model) / 1e9):.2f} | {one.peak / 1e6:.0f} |", flush=True)
        shutil.rmtree(model)


def contention(model: Path, scheme: str, work: Path, repeat: int) -> None:
    """Prints how much longer the work takes beside two busy loops."""
    alone, beside = [], []
    for _ in range(repeat):
        alone.append(run(model, scheme, work).work)
        with other_work():
            beside.append(run(model, scheme, work).work)
    ratio = statistics.median(beside) / statistics.median(alone)
    print(f"\nbeside two busy loops: {statistics.median(beside):.2f} s of work, {ratio:.1f} times as long as alone")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--blocks", type=int, nargs="*", default=[12, 48])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-contention", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = arguments.model or work / "model"
        if arguments.model is None:
            build(model, 28, 1024, 2560)
        schemes(model, arguments.schemes, work, arguments.repeat)
        if not arguments.no_contention:
            contention(model, arguments.schemes[0], work, arguments.repeat)
        growth(arguments.schemes[0], arguments.blocks, work, arguments.repeat)
        experts(arguments.schemes[0], work, arguments.repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
