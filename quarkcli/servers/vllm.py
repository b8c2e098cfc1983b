"""vLLM 0.32: what it loads. The dialects say what its classes take, and which keys it must find in a config.

Read in `vllm/model_executor/layers/quantization/`; most of it was loaded. Its kernels are chosen in
`vllm/model_executor/kernels/linear/__init__.py`: which of them takes which GPU was read there and in the kernels' own
`is_supported`, and never run.
"""

from __future__ import annotations

from quarkcli.servers._kernels import AMD, EVERY, NVIDIA, Kernel
from quarkcli.servers.base import Loader, Written


class Vllm(Loader):
    name = "vllm"
    title = "vLLM 0.32"
    kernels_from = "its list of kernels, read in a source near this release; no GPU was tried"
    kernels = (
        Kernel("fp8 *", "fp8 *", fast="ada hopper blackwell cdna3 cdna4", weights="ampere"),
        Kernel("int8 *", "int8 *", fast=f"ampere ada hopper {AMD}"),  # "Int8 not supported on SM100" and later
        Kernel("int4 *", "none", weights=EVERY),
        Kernel("uint4 *", "none", weights=EVERY),
        Kernel("int[23] *", "none", weights=NVIDIA),  # Humming
        Kernel("int4 group", "int4 group", fast="ampere ada"),  # Humming
        Kernel("mxfp4*", "mxfp4*", fast="blackwell cdna4", weights="ampere ada hopper", emulated="cdna2 cdna3"),
        Kernel("mxfp4*", "none", weights=NVIDIA, emulated=AMD),
        Kernel("mxfp4*", "fp8 *", fast="cdna4"),
        Kernel("mxfp[46]*", "mxfp6*", emulated=EVERY),
        Kernel("mxfp8", "mxfp8", fast="blackwell cdna4", weights="ampere ada hopper", emulated="cdna2 cdna3"),
        Kernel("nvfp4", "nvfp4", fast="blackwell", weights="ampere ada hopper", emulated=AMD),
        Kernel("nvfp4", "none", weights=NVIDIA),
        Kernel("kv-cache", "fp8*", fast="ada hopper blackwell cdna3 cdna4"),
        Kernel("attention", "fp8*", fast="hopper blackwell"),
    )

    def misnamed(self, written: Written) -> list[str]:
        """Its class for Mixtral knows both names; that of gpt-oss, whose biases are one tensor, was tried: not so."""
        return super().misnamed(written) if written.renamed.endswith(".bias") else []


SERVER = Vllm()
