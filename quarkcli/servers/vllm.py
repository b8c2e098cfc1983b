"""vLLM 0.32: what it loads. The dialects say what its classes take, and which keys it must find in a config.

Read in `vllm/model_executor/layers/quantization/`; most of it was loaded. Its kernels are chosen in
`vllm/model_executor/kernels/linear/__init__.py`: which of them takes which GPU was read there and in the kernels' own
`is_supported`, in the wheel of 0.33.0 for CUDA, and never run. Between 0.32 and 0.33 the classes differ in one thing
that is loaded: experts in mxfp8 in the quark dialect, which 0.32 refuses.
"""

from __future__ import annotations

from quarkcli.servers._kernels import AMD, EVERY, NVIDIA, Kernel
from quarkcli.servers.base import Loader, Written

# Classes that it dropped and for which transformers has none, by the last release that had them: read in
# `_PREVIOUSLY_SUPPORTED_MODELS` in `model_executor/models/registry.py`.
_DROPPED_TEXT = """
    0.9.2 Phi3SmallForCausalLM
    0.10.2 MotifForCausalLM Phi4FlashForCausalLM
    0.22.0 JAISLMHeadModel
    0.23.0 QWenLMHeadModel QwenVLForConditionalGeneration InternLMForCausalLM InternLM2VEForCausalLM XverseForCausalLM
    0.23.0 MiniMaxText01ForCausalLM MiniMaxM1ForCausalLM MiniMaxVL01ForConditionalGeneration BaiChuanForCausalLM
    0.23.0 BaichuanForCausalLM
    0.24.0 AquilaModel AquilaForCausalLM Grok1ModelForCausalLM Grok1ForCausalLM
    0.25.0 TeleChatForCausalLM
    0.26.0 Plamo2ForCausalLM OuroForCausalLM
    0.28.0 ArcticForCausalLM MPTForCausalLM RWForCausalLM StableLMEpochForCausalLM
"""
_DROPPED = {name: row.split()[0] for row in _DROPPED_TEXT.strip().splitlines() for name in row.split()[1:]}
_CACHE = "v1/attention/backends/; which of them takes 8 bits was read near release 0.32"


def _of(name: str) -> str:
    return f"{name} in model_executor/kernels/linear/"


class Vllm(Loader):
    name = "vllm"
    title = "vLLM 0.32"
    kernels_from = "its list of kernels in the source of 0.33.0, which was read; nothing was run on a GPU"
    kernels = (
        Kernel(
            "fp8 *",
            "fp8 *",
            fast="ada hopper blackwell cdna3 cdna4",
            weights="ampere",
            read_in=_of("_POSSIBLE_FP8_KERNELS"),
        ),
        Kernel("fp8 *", "none", weights=NVIDIA, read_in=_of("_POSSIBLE_WFP8A16_KERNELS")),
        # "Int8 not supported on SM100" and later
        Kernel("int8 *", "int8 *", fast=f"ampere ada hopper {AMD}", read_in=_of("_POSSIBLE_INT8_KERNELS")),
        Kernel("int8 *", "none", weights=EVERY, read_in=_of("_POSSIBLE_KERNELS")),
        Kernel("int4 *", "none", weights=EVERY, read_in=_of("_POSSIBLE_KERNELS")),
        Kernel("uint4 *", "none", weights=EVERY, read_in=_of("_POSSIBLE_KERNELS")),
        Kernel("int[23] *", "none", weights=NVIDIA, read_in=_of("HummingLinearKernel")),
        Kernel("int4 group", "int4 group", fast="ampere ada", read_in=_of("HummingLinearKernel")),
        Kernel(
            "mxfp4*",
            "mxfp4*",
            fast="blackwell cdna4",
            weights="ampere ada hopper",
            emulated="cdna2 cdna3",
            read_in=_of("_POSSIBLE_MXFP4_KERNELS"),
        ),
        Kernel("mxfp[46]*", "none", weights=NVIDIA, emulated=AMD, read_in=_of("_POSSIBLE_MXFP6_KERNELS")),
        Kernel(
            "mxfp4*",
            "fp8 static",
            fast="cdna4",
            emulated=f"{NVIDIA} cdna2 cdna3",
            read_in="QuarkW4A8_MXFP4_FP8 in layers/quantization/quark/schemes/quark_w4a8_mxfp4_fp8.py",
        ),
        # Weights stay packed; in how many bits Humming multiplies was not read.
        Kernel("mxfp[46]*", "mxfp6*", weights=NVIDIA, emulated=AMD, read_in=_of("HummingMxFp6LinearKernel")),
        Kernel(
            "mxfp8",
            "mxfp8",
            fast="blackwell cdna4",
            weights="ampere ada hopper",
            emulated="cdna2 cdna3",
            read_in=_of("_POSSIBLE_MXFP8_KERNELS"),
        ),
        Kernel(
            "nvfp4",
            "nvfp4",
            fast="blackwell",
            weights="ampere ada hopper",
            emulated=AMD,
            read_in=_of("_POSSIBLE_NVFP4_KERNELS"),
        ),
        Kernel("nvfp4", "none", weights=NVIDIA, read_in=_of("init_nvfp4_linear_kernel")),
        Kernel("kv-cache", "fp8*", fast="ada hopper blackwell cdna3 cdna4", read_in=_CACHE),
        Kernel("attention", "fp8*", fast="hopper blackwell", read_in=_CACHE),
    )

    def _faults(self, written: Written) -> list[str]:
        last = _DROPPED.get(written.plan.architecture)
        dropped = f"its last release with a class of {written.plan.architecture} is {last}, and transformers has none"
        return [*([dropped] if last else []), *super()._faults(written)]

    def misnamed(self, written: Written) -> list[str]:
        """Its class for Mixtral knows both names; that of gpt-oss, whose biases are one tensor, was tried: not so."""
        return super().misnamed(written) if written.renamed.endswith(".bias") else []


SERVER = Vllm()
