"""A process that compiles the kernels for a device that is not there, through the launches of the package.

Triton's compilers need no device. What is launched is only compiled, so the results are whatever the memory held.

python -m tests.numerics.kernels.compiler TARGET    prints JSON: [[kernel, assembly], ...]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from quarkcli.numerics.kernels import launch

from .cases import SPECS

TARGETS = {
    "sm_90": (GPUTarget("cuda", 90, 32), ("ptx",)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), ("llir", "amdgcn")),
}
NAMES = ("nvfp4", "mxfp4-even", "uint4-bf16", "mxfp6_e2m3-rceil", "fp8-channel")


class Absent:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(name: str) -> list[tuple[str, str]]:
    """Every launch of our three functions for the specs in NAMES: kernel and assembly."""
    target, kinds = TARGETS[name]
    driver.set_active(Absent(target))
    done: list[tuple[str, str]] = []

    def compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            result = kernel.run(*arguments, grid=grid, warmup=True, **options)
            done.append((kernel.fn.__name__, "\n".join(result.asm[kind] for kind in kinds)))

        return call

    JITFunction.__getitem__ = compile_only  # type: ignore[method-assign]
    launch._refuse_non_finite = lambda peaks, matrix: None
    weight = torch.zeros(64, 4096, dtype=torch.bfloat16)
    for spec in (SPECS[name] for name in NAMES):
        data, params = launch.quantize_packed(weight, spec, None)
        launch.dequantize_packed(data, params, spec, (64, 4096), torch.bfloat16)
        launch.fake_quantize(weight, spec, None)
    return done


if __name__ == "__main__":
    json.dump(compiled(sys.argv[1]), sys.stdout)
