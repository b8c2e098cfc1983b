"""Quantize + pack in GB of source weights per second, next to compressed-tensors and a plain copy in the same run.

python -m tests.bench.packing [--rows 4096] [--cols 4096] [--device cpu]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from quarkcli.numerics import packing
from quarkcli.numerics.quantize import quantize
from quarkcli.recipe.attributes.native import to_spec
from quarkcli.recipe.recipe import scheme_model

PACK = {"fp4_e2m1": packing.pack_nibbles, "int4": lambda codes: packing.pack_int32(codes, 4)}
# compressed-tensors' own arguments for the same numbers
PEER = {
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    "int4_wo_128": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
}


def ours(scheme: str) -> Callable[[Tensor], object]:
    spec = to_spec(scheme_model(scheme).weight)
    pack = PACK.get(spec.element, lambda codes: codes)
    return lambda weight: pack(quantize(weight, spec).codes)


def peer(scheme: str) -> Callable[[Tensor], object]:
    """Scales from compressed-tensors' own helpers are outside; what is timed is its compress()."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    name, arguments = PEER[scheme]
    args = QuantizationArgs(symmetric=True, **arguments)
    compressor = BaseCompressor.load_from_registry(name)
    sizes = QuantizationScheme(targets=["Linear"], weights=args)

    def run(weight: Tensor) -> object:
        groups = weight.view(weight.shape[0], -1, arguments["group_size"]) if "group_size" in arguments else weight
        dims = (-1,) if "group_size" in arguments else None
        low = groups.amin(dims) if dims else groups.min()
        high = groups.amax(dims) if dims else groups.max()
        state = {"weight": weight}
        gparam = generate_gparam(weight.min(), weight.max()) if scheme == "nvfp4" else None
        scale, zero = calculate_qparams(low, high, args, **({"global_scale": gparam} if gparam is not None else {}))
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        if gparam is not None:
            state["weight_global_scale"] = gparam
        return compressor.compress(state, sizes)

    return run


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    weight = torch.randn(args.rows, args.cols).mul_(0.02).bfloat16().to(args.device)
    copy = rate(lambda w: w.clone(), weight)
    print(f"copy {copy:.2f} GB/s, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.device}")
    print("| scheme | quark GB/s | compressed-tensors GB/s | ratio | share of copy |\n|---|---|---|---|---|")
    for scheme in PEER:
        mine = rate(ours(scheme), weight)
        try:
            other = rate(peer(scheme), weight, 1)
            compared = f"{other:.3f} | {mine / other:.1f}"
        except Exception as error:  # a peer's private signature may move; the row then says so
            compared = f"failed: {type(error).__name__} {str(error)[:60]} | -"
        print(f"| {scheme} | {mine:.3f} | {compared} | {mine / copy:.1%} |", flush=True)


if __name__ == "__main__":
    main()
