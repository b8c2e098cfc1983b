"""SGLang 0.5.23: rules read in the source of its wheel (`sglang/srt/`), never run here.

The dialects say what its classes for them take, where that was read, and on which GPUs it refuses them
(`Writer.classes`, `Writer.bars`). Below: how it runs a format. Kernels of int8 are in its package sgl-kernel, whose
source was read on GitHub.
"""

from __future__ import annotations

from quarkcli.servers._kernels import AMD, NVIDIA, Kernel
from quarkcli.servers.base import Read

_SCHEMES = "layers/quantization/compressed_tensors/schemes"
_PARTS = (
    "CompressedTensorsConfig._get_scheme_from_parts in layers/quantization/compressed_tensors/compressed_tensors.py"
)


class Sglang(Read):
    name = "sglang"
    title = "SGLang 0.5.23"
    # Its fallback to transformers does not take Falcon; what it does with the others, quantized, was not read.
    without = frozenset(
        {
            "FalconForCausalLM",
            "HCXVisionV2ForCausalLM",
            "HyperCLOVAXForCausalLM",
            "HyperCLOVAXVisionV2ForConditionalGeneration",
            "Idefics3ForConditionalGeneration",
            "InternVLForConditionalGeneration",
            "JambaForCausalLM",
            "LlavaNextForConditionalGeneration",
            "LlavaOnevisionForConditionalGeneration",
            "SmolVLMForConditionalGeneration",
        }
    )
    kernels_from = "the source of release 0.5.23, which was read; nothing was run on a GPU"
    kernels = (
        Kernel(
            "fp8 *",
            "fp8 *",
            fast="ada hopper blackwell cdna3 cdna4",
            weights="ampere",
            read_in="can_auto_enable_marlin_fp8 and apply_fp8_linear in layers/quantization/fp8_utils.py",
        ),
        Kernel(
            "fp8 *",
            "none",
            weights=NVIDIA,
            read_in=f"CompressedTensorsW8A16Fp8 in {_SCHEMES}/compressed_tensors_w8a16_fp8.py",
        ),
        # Its kernel is built for compute capabilities 7.5 to 9.0, and wants a scale for every row.
        Kernel(
            "int8 channel",
            "int8 *",
            fast="ampere ada hopper",
            read_in=f"CompressedTensorsW8A8Int8 in {_SCHEMES}/compressed_tensors_w8a8_int8.py; int8_scaled_mm of "
            "sgl-kernel",
        ),
        Kernel(
            "uint4 *",
            "none",
            weights=NVIDIA,
            emulated=AMD,
            read_in="AWQMarlinLinearKernel, AWQLinearKernel in hardware_backend/gpu/quantization/awq_kernels.py",
        ),
        Kernel(
            "int[48] *",
            "none",
            weights=NVIDIA,
            read_in=f"CompressedTensorsWNA16 in {_SCHEMES}/compressed_tensors_wNa16.py",
        ),
        Kernel(
            "mxfp4*",
            "mxfp4*",
            fast="cdna4",
            read_in="QuarkW4A4MXFP4 in layers/quantization/quark/schemes/quark_w4a4_mxfp4.py",
        ),
        Kernel(
            "mxfp4*",
            "fp8 static",
            fast="cdna4",
            read_in="QuarkW4A8MXFp4MoE in layers/quantization/quark/schemes/quark_w4a8_mxfp4_moe.py",
        ),
        Kernel(
            "mxfp4*",
            "none",
            weights=f"{NVIDIA} cdna4",
            read_in="Mxfp4Config, Mxfp4MoEMethod in layers/quantization/mxfp4.py",
        ),
        Kernel("nvfp4", "nvfp4", fast="blackwell", weights="ampere ada hopper", read_in=_PARTS),
        Kernel("nvfp4", "none", weights=NVIDIA, read_in=_PARTS),
        Kernel(
            "kv-cache",
            "fp8*",
            fast="ada hopper blackwell cdna3 cdna4",
            read_in="configure_kv_cache_dtype in mem_cache/kv_cache_dtype.py; BaseKVCacheMethod in "
            "layers/quantization/kv_cache.py",
        ),
    )


SERVER = Sglang()
