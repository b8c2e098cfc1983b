"""GB/s of every kernel and its share of copy bandwidth in the same run.

python -m tests.bench.kernels [--rows 8192] [--cols 8192] [--device cuda]

On a CPU (`TRITON_INTERPRET=1 ... --device cpu --rows 4 --cols 256`) the interpreter runs: that shows only that it
works.
Bandwidth counts every byte read and written once: the source, the packed codes and the scales.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quarkcli.numerics import kernels
from quarkcli.numerics.packed import Packed, dequantize_packed, quantize_packed
from quarkcli.numerics.quantize import fake_quantize
from tests.numerics.kernels.cases import SPECS

NAMES = (
    "mxfp4-even", "nvfp4", "amdfp4", "mxfp6_e2m3-even", "mxfp8_e4m3-even", "fp8-tensor", "fp8-channel", "int4-bf16",
    "uint4-bf16", "int8-channel",
)  # fmt: skip


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """The best of `repeats`; the first call compiles."""
    work()
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def stored_bytes(packed: Packed) -> int:
    parts = (packed.data, packed.params.scale, packed.params.zero_point)
    return sum(part.nbytes for part in parts if part is not None)


def rates(name: str, weight: Tensor, device: str, repeats: int) -> list[float]:
    """Bytes a second moved by quantize + pack, dequantize and fake quantization."""
    spec, shape = SPECS[name], (weight.shape[0], weight.shape[1])
    if kernels.find(spec, weight.device) is None:
        raise SystemExit(f"no kernel runs on {device}: install triton, or set TRITON_INTERPRET=1 for a cpu")
    packed = quantize_packed(weight, spec)
    moved = weight.nbytes + stored_bytes(packed)
    work: list[tuple[int, Callable[[], object]]] = [
        (moved, lambda: quantize_packed(weight, spec)),
        (moved, lambda: dequantize_packed(packed, spec, shape, weight.dtype)),
        (2 * weight.nbytes, lambda: fake_quantize(weight, spec)),
    ]
    return [size / seconds(call, device, repeats) for size, call in work]


def table(rows: int, cols: int, device: str, repeats: int) -> Iterator[str]:
    """The lines of the table."""
    weight = torch.randn(rows, cols).mul_(0.02).bfloat16().to(device)
    into = torch.empty_like(weight)
    copy = 2 * weight.nbytes / seconds(lambda: into.copy_(weight), device, repeats)
    yield f"copy {copy / 1e9:.2f} GB/s, {rows} x {cols} bfloat16, torch {torch.__version__}, {device}"
    yield "| kernel | quantize + pack GB/s | of copy | dequantize GB/s | of copy | fake GB/s | of copy |"
    yield "|---|---|---|---|---|---|---|"
    for name in NAMES:
        cells = [f"{rate / 1e9:.2f} | {rate / copy:.0%}" for rate in rates(name, weight, device, repeats)]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--cols", type=int, default=8192)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    for line in table(args.rows, args.cols, args.device, args.repeats):
        print(line, flush=True)


if __name__ == "__main__":
    main()
