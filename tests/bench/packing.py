"""Quantize + pack in GB of source weights per second, next to other tools and a plain copy in the same run.

python -m tests.bench.packing [NAME ...] [--rows 4096] [--cols 4096] [--device cpu]

Every built-in scheme, once for each weight spec. torchao is compared with where it is installed; the project does not
need it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from quarkcli.numerics import packing
from quarkcli.numerics.quantize import quantize
from quarkcli.recipe import catalog
from quarkcli.recipe.attributes.native import to_spec
from quarkcli.spec import Element, TensorSpec

from . import peers

PEERS = {"compressed-tensors": peers.compressed_tensors, "torchao": peers.torchao}
# The goal: this many times as fast as the faster of the peers.
GOAL = {"nvfp4": 3.0, "mxfp4": 3.0, "int4_wo_128": 3.0}


def weights() -> dict[str, TensorSpec]:
    """The weight spec of every scheme, each once; among equal ones under the shortest name."""
    found: dict[TensorSpec, str] = {}
    for name, path in sorted(catalog.files("schemes").items(), key=lambda item: (len(item[0]), item[0])):
        found.setdefault(to_spec(catalog.document(path).data["weight"]), name)
    return {name: spec for spec, name in sorted(found.items(), key=lambda item: item[1])}


def packer(element: Element) -> Callable[[Tensor], Tensor]:
    """Codes -> the bytes of a checkpoint."""
    if element.bits == 8:
        return lambda codes: codes
    if element.kind == "float" or element.fraction:
        return lambda codes: packing.pack_bits(codes, element.bits)
    return lambda codes: packing.pack_int32(codes, element.bits)


def ours(spec: TensorSpec) -> Callable[[Tensor], object]:
    pack = packer(spec.codes.format)
    return lambda weight: pack(quantize(weight, spec).codes)


def rate(work: Callable[[Tensor], object], weight: Tensor, repeats: int = 3) -> float:
    """GB of `weight` per second, best of `repeats`."""
    work(weight)
    best = float("inf")
    for _ in range(repeats):
        _synchronize(weight)
        started = time.perf_counter()
        work(weight)
        _synchronize(weight)
        best = min(best, time.perf_counter() - started)
    return weight.nbytes / best / 1e9


def _synchronize(weight: Tensor) -> None:
    if weight.device.type == "cuda":
        torch.cuda.synchronize()


def peer_rates(scheme: str, weight: Tensor) -> dict[str, float | str]:
    """GB/s of every peer; `-` where it does not have the scheme, the error where it fails."""
    rates: dict[str, float | str] = {}
    for name, make in PEERS.items():
        try:
            work = make(scheme)
            rates[name] = "-" if work is None else rate(work, weight, 2)
        except Exception as error:  # missing, or a private signature has moved: the row then says so
            rates[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:50]}" if str(error) else repr(error)
    return rates


def line(scheme: str, mine: float, others: dict[str, float | str], copy: float) -> str:
    numbers = [value for value in others.values() if isinstance(value, float)]
    texts = [f"{value:.3f}" if isinstance(value, float) else value for value in others.values()]
    ratio = f"{mine / max(numbers):.1f}" if numbers else "-"
    goal = "" if scheme not in GOAL or not numbers else " (goal 3)"
    return f"| {scheme} | {mine:.3f} | {' | '.join(texts)} | {ratio}{goal} | {mine / copy:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schemes", nargs="*", help="only these")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    weight = torch.randn(args.rows, args.cols).mul_(0.02).bfloat16().to(args.device)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.device}")
    print(f"| scheme | quark GB/s | {' | '.join(PEERS)} | ratio to the faster | share of copy |")
    print(f"|---|---|{'---|' * len(PEERS)}---|---|")
    copies = []
    for scheme, spec in weights().items():
        if args.schemes and scheme not in args.schemes:
            continue
        copies.append(rate(lambda w: w.clone(), weight, 5))  # next to its scheme: machines vary
        mine = rate(ours(spec), weight, 5)
        print(line(scheme, mine, peer_rates(scheme, weight), copies[-1]), flush=True)
    print(f"copy {min(copies):.2f} to {max(copies):.2f} GB/s")


if __name__ == "__main__":
    main()
