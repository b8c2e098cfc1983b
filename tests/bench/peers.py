"""What compressed-tensors and torchao make of a scheme's weights: quantize and pack, for the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Work = Callable[[Tensor], object]
_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group"}
_MX = {"strategy": "group", "group_size": 32, "type": "float", "scale_dtype": torch.uint8}
# Scheme -> compressor, and the arguments of a scheme with the same numbers.
_COMPRESSED_TENSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, **_MX}),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, **_MX}),
    "int2_wo_128": ("pack-quantized", {**_GROUPS, "num_bits": 2, "group_size": 128}),
    "int3_wo_128": ("pack-quantized", {**_GROUPS, "num_bits": 3, "group_size": 128}),
    "int4_wo_32": ("pack-quantized", {**_GROUPS, "group_size": 32}),
    "int4_wa_64": ("pack-quantized", {**_GROUPS, "group_size": 64}),
    "int4_wo_128": ("pack-quantized", {**_GROUPS, "group_size": 128}),
    "int4_wo_per_channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "uint4_wo_32": ("pack-quantized", {**_GROUPS, "group_size": 32, "symmetric": False}),
    "uint4_wo_64": ("pack-quantized", {**_GROUPS, "group_size": 64, "symmetric": False}),
    "uint4_wo_128": ("pack-quantized", {**_GROUPS, "group_size": 128, "symmetric": False}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "ptpc_fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}),
    "int8_dynamic": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
}


def compressed_tensors(scheme: str) -> Work | None:
    """Its own helpers for the scales, then its compress(); None for a scheme it does not have."""
    if scheme not in _COMPRESSED_TENSORS:
        return None
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    name, arguments = _COMPRESSED_TENSORS[scheme]
    args = QuantizationArgs(**{"symmetric": True, **arguments})
    compressor = BaseCompressor.load_from_registry(name)
    sizes = QuantizationScheme(targets=["Linear"], weights=args)

    def run(weight: Tensor) -> object:
        low, high = _ends(weight, arguments)
        more = {"global_scale": generate_gparam(weight.min(), weight.max())} if scheme == "nvfp4" else {}
        scale, zero = calculate_qparams(low, high, args, **more)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        return compressor.compress(state | {f"weight_{key}": value for key, value in more.items()}, sizes)

    return run


def _ends(weight: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value behind every scale."""
    if arguments["strategy"] == "tensor":
        return weight.min(), weight.max()
    keep = arguments["strategy"] == "channel"
    runs = weight if keep else weight.unflatten(1, (-1, arguments["group_size"]))
    return runs.amin(-1, keepdim=keep), runs.amax(-1, keepdim=keep)


def torchao(scheme: str) -> Work | None:
    """Its tensor classes, that of NVFP4 with a global scale, of 4-bit integers the one for CPUs."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, PerTensor

    def mx(element: Any, mode: Any = ScaleCalculationMode.EVEN) -> Work:
        return lambda weight: MXTensor.to_mx(weight, element, 32, mode)

    def int4(size: int) -> Work:
        return lambda weight: Int4OpaqueTensor.from_hp(weight, [1, size])

    def nvfp4(weight: Tensor) -> object:
        return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))

    return {
        "nvfp4": nvfp4,
        "mxfp4": mx(torch.float4_e2m1fn_x2),
        "mxfp6_e2m3": mx("fp6_e2m3"),
        "mxfp6_e3m2": mx("fp6_e3m2"),
        "mxfp8": mx(torch.float8_e4m3fn, ScaleCalculationMode.RCEIL),
        "int4_wo_32": int4(32),
        "int4_wa_64": int4(64),
        "int4_wo_128": int4(128),
        "fp8": lambda weight: Float8Tensor.from_hp(weight, granularity=PerTensor()),
        "ptpc_fp8": lambda weight: Float8Tensor.from_hp(weight, granularity=PerRow()),
        "int8": lambda weight: Int8Tensor.from_hp(weight, PerTensor()),
        "int8_dynamic": lambda weight: Int8Tensor.from_hp(weight, PerRow()),
    }.get(scheme)
