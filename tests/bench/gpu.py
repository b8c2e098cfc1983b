"""What a GPU does: kernels against the reference and a copy, whole jobs against the disk, a floor and the forecast.

    make bench-gpu                                                          # into docs/gpu.json and docs/benchmarks.md
    TRITON_INTERPRET=1 python -m tests.bench.gpu --device cpu --small --out FILE    # shows that it runs, no more

Ends within `--seconds`: what there is no time for is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quarkcli import memory
from quarkcli.errors import Stopped
from quarkcli.events import Event, PartDone
from quarkcli.job import predict, rates
from quarkcli.job import run as job
from quarkcli.job.options import Options, Prepared
from quarkcli.numerics.packed import dequantize_packed, quantize_packed
from quarkcli.numerics.quantize import fake_quantize
from tests.bench import kernels
from tests.bench.memory import build
from tests.gpu.record import GPU, keep
from tests.numerics.kernels.cases import SPECS, differing, same

SCHEMA = "quark/gpu/1"
ROOT = Path(__file__).resolve().parents[2]
# Of one H100: FLOP and bytes a second that the floor counts on.
PRODUCTS, PLAIN, FACTORS, LAUNCH = 600e12, 45e12, 20e12, 60e-6
GOAL, MUST = 3, 6  # times the floor


class Shape:
    """Sizes of what is run: of an 8B's blocks, or next to nothing."""

    def __init__(self, small: bool) -> None:
        self.hidden, self.inner, self.blocks = (128, 128, 3) if small else (4096, 14336, 4)
        self.rows, self.seqlen = (4, 64) if small else (32, 2048)
        self.kernel = (2, 64) if small else (8192, 8192)
        self.equal = (4, 128) if small else (1024, 4096)
        self.repeats = 1 if small else 20
        self.names = kernels.NAMES[:2] if small else kernels.NAMES


def equal_to_reference(shape: Shape, device: str) -> dict[str, bool]:
    """Whether quantizing, decoding and fake-quantizing give the bits of the reference on a CPU, by kernel."""
    weight = torch.randn(shape.equal, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    found = {}
    for name in shape.names:
        spec = SPECS[name]
        with reference():
            want = quantize_packed(weight, spec)
            values = dequantize_packed(want, spec, shape.equal, torch.bfloat16)
            fake = fake_quantize(weight, spec)
        here = quantize_packed(weight.to(device), spec)
        decoded = dequantize_packed(here, spec, shape.equal, torch.bfloat16)
        found[name] = (
            not differing(here, want) and same(decoded, values) and same(fake_quantize(weight.to(device), spec), fake)
        )
    return found


class reference:  # noqa: N801 - a context manager
    """Turns kernels off inside: on a CPU the interpreter would answer."""

    def __enter__(self) -> None:
        from unittest import mock

        from quarkcli.numerics import kernels as found

        self._patch = mock.patch.object(found, "find", lambda spec, device: None)
        self._patch.start()

    def __exit__(self, *error: object) -> None:
        self._patch.stop()


def bandwidth(shape: Shape, device: str) -> dict[str, Any]:
    """GB/s of a copy, and each kernel's share of it: quantize and pack, decode, fake quantization."""
    weight = torch.randn(shape.kernel).mul_(0.02).bfloat16().to(device)
    into = torch.empty_like(weight)
    copy = 2 * weight.nbytes / kernels.seconds(lambda: into.copy_(weight), device, shape.repeats)
    shares = {}
    for name in shape.names:
        found = kernels.rates(name, weight, device, shape.repeats)
        shares[name] = dict(zip(("quantize", "decode", "fake"), (rate / copy for rate in found), strict=True))
    return {"copy": copy, "shares": shares}


def run_job(model: Path, device: str, seconds: float, **options: Any) -> dict[str, Any]:
    """Runs a job, no longer than so many seconds. Returns times, bytes, and the peak of the device's memory."""
    times: list[float] = []
    made: list[Prepared] = []

    def listen(event: Event) -> None:
        if isinstance(event, PartDone):
            times.append(time.perf_counter())

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        given = Options(str(model), output=Path(folder) / "out", device=device, time_budget=seconds, **options)
        try:
            job.run(given, listen, made.append)
            whole = True
        except Stopped:
            whole = False
    taken = time.perf_counter() - started
    blocks = [part.index for part in made[0].plan.parts if part.block is not None][1:-1]
    apart = [times[index] - times[index - 1] for index in blocks if index < len(times)]
    ahead = predict.of_plan(made[0], rates.of_gpu("h100"), 1).ranks[0]
    return {
        "whole": whole, "seconds": taken, "source_bytes": made[0].forecast.source_bytes,
        "block_seconds": statistics.median(apart) if apart else None, "peak_device": memory.peak_gpu(device),
        "forecast_device": ahead.device,
    }  # fmt: skip


def data_free(model: Path, shape: Shape, device: str, seconds: float) -> dict[str, Any]:
    found = run_job(model, device, seconds, scheme="nvfp4_weight_only")
    return {**found, "rate": found["source_bytes"] / found["seconds"] if found["whole"] else None}


def gptq(model: Path, shape: Shape, device: str, seconds: float) -> dict[str, Any]:
    found = run_job(
        model, device, seconds, scheme="int4_wo_128" if shape.hidden % 128 == 0 else "int4_wo_32", algorithm="gptq",
        calib_data="builtin", calib_samples=shape.rows, calib_seqlen=shape.seqlen, allow_short=True,
    )  # fmt: skip
    least = floor(shape)
    taken = found["block_seconds"]
    return {**found, "floor": least, "times_the_floor": taken / least if taken is not None else None}


def floor(shape: Shape) -> float:
    """Seconds of a block on one H100 in which nothing is done that need not be.

    A pass that stops before the last product, and one that goes on; second moments in 10 of 16 tiles; one factor and
    inverse for each activation; the updates of the loop over columns, its launches, and two sweeps of refinement.
    """
    hidden, inner, tokens = shape.hidden, shape.inner, shape.rows * shape.seqlen
    problems = [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    product = sum(2 * rows * width for rows, width in problems) + 2 * hidden * shape.seqlen
    passes = (2 - 2 * hidden * inner / product) * tokens * product / PRODUCTS
    moments = sum(2 * tokens * width**2 for _, width in problems) * 10 / 16 / PRODUCTS
    factors = sum(2 / 3 * width**3 for _, width in problems) / FACTORS
    updates = sum(5 * rows * width**2 for rows, width in problems) / PLAIN  # one of the loop, four of two sweeps
    return passes + moments + factors + updates + LAUNCH * sum(-(-width // 128) for _, width in problems)


def measure(device: str, small: bool, seconds: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures step by step, and saves what there is after each: one that fails, or is killed, takes no other along."""
    shape, started = Shape(small), time.monotonic()
    found: dict[str, Any] = {
        "schema": SCHEMA, "device": torch.cuda.get_device_name() if device != "cpu" else "cpu (interpreter)",
        "small": small, "torch": torch.__version__, "date": time.strftime("%d %B %Y"), "commit": commit(),
        "left_out": [], "errors": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"

        def built() -> Path:
            if not model.exists():
                build(model, shape.blocks, shape.hidden, shape.inner)
            return model

        steps: dict[str, Callable[[float], Any]] = {
            "equal": lambda left: equal_to_reference(shape, device),
            "bandwidth": lambda left: bandwidth(shape, device),
            "data_free": lambda left: data_free(built(), shape, device, left),
            "gptq": lambda left: gptq(built(), shape, device, left),
        }
        for name, step in steps.items():
            left = seconds - (time.monotonic() - started)
            if left < seconds / 10:
                found["left_out"].append(name)
                continue
            print(f"{name} ({left:.0f} s left)", flush=True)
            try:
                found[name] = step(0.9 * left)
            except Exception as error:
                found["errors"][name] = f"{type(error).__name__}: {error}"
            save(found)
    return found


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that measure nothing")
    parser.add_argument("--out", type=Path, default=GPU)
    parser.add_argument("--seconds", type=float, default=440)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --small shows that the script runs (TRITON_INTERPRET=1)")
    found = measure(args.device, args.small, args.seconds, lambda found: keep(args.out, "bench", found))
    print(json.dumps(found, indent=1))
    raise SystemExit(1 if found["errors"] else 0)


if __name__ == "__main__":
    main()
