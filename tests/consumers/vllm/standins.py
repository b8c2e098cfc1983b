"""Products of matrices in plain torch for those that vLLM's CPU build lacks; runs in vLLM's environment.

Everything before the product stays vLLM's: config, choice of a class, parameters, loading, fusing, what is done to
weights after loading. A stand-in notes its name in `USED` when a model takes it, and the record tells it.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import vllm.model_executor.kernels.linear as linear
import vllm.model_executor.kernels.linear.mixed_precision.cpu as integers
import vllm.model_executor.kernels.linear.mxfp4.emulation as mxfp4
import vllm.model_executor.kernels.linear.mxfp6.emulation as mxfp6
import vllm.model_executor.layers.quantization.utils.quant_utils as keys
from vllm import _custom_ops as ops
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.fused_moe.oracle import mxfp4 as mxfp4_moe
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as nvfp4_moe
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.layers.quantization.utils import mxfp4_utils
from vllm.platforms import PlatformEnum

USED: set[str] = set()
FP8_MAX = 448.0


def install() -> None:
    ops.scaled_fp8_quant = fp8_quantize
    integers.CPUWNA16LinearKernel._process_gptq_weights_w4a16 = expand_integers
    integers.CPUWNA16LinearKernel.apply_weights = expanded_product
    cpu = PlatformEnum.CPU
    linear._POSSIBLE_NVFP4_KERNELS[cpu] = [NvFp4]
    linear.MarlinNvFp4LinearKernel = NvFp4WeightOnly
    linear._POSSIBLE_FP8_BLOCK_KERNELS[cpu] = [Fp8Tiles]
    install_mx()
    linear._POSSIBLE_MXFP8_KERNELS[cpu] = [MxFp8]
    install_experts()
    fused = torch.library.Library("_C", "FRAGMENT")
    fused.define("silu_and_mul_quant(Tensor(a!) result, Tensor input, Tensor scale) -> ()")
    fused.impl("silu_and_mul_quant", silu_and_mul_quantized, "CPU")
    globals()["_KEPT"] = fused  # the registration ends with the object


class Always:
    """A kernel that takes every layer."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, None]:
        return True, None


# --- fp8


def fp8_quantize(
    x: torch.Tensor, scale: torch.Tensor | None = None, *_: Any, output: torch.Tensor | None = None, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    USED.add("fp8: quantization with a scale per tensor")
    if scale is None:
        scale = (x.float().abs().amax() / FP8_MAX).clamp(min=1e-12).reshape(1)
    codes = (x.float() / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if output is None:
        return codes, scale
    output.copy_(codes)
    return output, scale


def silu_and_mul_quantized(result: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    USED.add("fp8: activation function and quantization in one")
    gate, up = x.chunk(2, -1)
    product = (torch.nn.functional.silu(gate.float()).to(x.dtype) * up).float()
    result.copy_((product / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn))


class Fp8Tiles(Always, Fp8BlockScaledMMLinearKernel):
    """The build's products need AMX tiles. vLLM's own code rounds the inputs."""

    def apply_block_scaled_mm(
        self,
        A: torch.Tensor,  # noqa: N803  vLLM's names
        B: torch.Tensor,  # noqa: N803
        As: torch.Tensor,  # noqa: N803
        Bs: torch.Tensor,  # noqa: N803
    ) -> torch.Tensor:
        USED.add("fp8 in tiles: torch")
        rows, cols = self.weight_group_shape
        weight = (
            B.float() * Bs.float().repeat_interleave(rows, 0)[: B.shape[0]].repeat_interleave(cols, 1)[:, : B.shape[1]]
        )
        inputs = A.float() * As.float().repeat_interleave(cols, 1)[:, : A.shape[1]]
        return torch.nn.functional.linear(inputs, weight)


class MxFp8(Always, linear.EmulationMxfp8LinearKernel):
    """vLLM's own emulation, which leaves inputs as they are."""

    def __init__(self, config: Any) -> None:
        USED.add("mxfp8: vLLM's emulation, inputs not quantized")
        super().__init__(config)


# --- fp4 and fp6


class Element:
    """Small floats: values by magnitude, and what OCP's even rounding of a block's exponent needs."""

    def __init__(self, exponent: int, mantissa: int) -> None:
        bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
        codes = range(2 ** (exponent + mantissa))
        self.values = torch.tensor([
            code % steps / steps * 2.0 ** (1 - bias)
            if code < steps
            else (1 + code % steps / steps) * 2.0 ** (code // steps - bias)
            for code in codes
        ])  # fmt: skip
        self.sign = 1 << (exponent + mantissa)
        self.largest_exponent = 2**exponent - 1 - bias
        self.half = 1 << (22 - mantissa)

    def of_codes(self, codes: torch.Tensor) -> torch.Tensor:
        return self.values[(codes & (self.sign - 1)).long()] * torch.where(codes >= self.sign, -1.0, 1.0)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Ties go to the even code."""
        size = values.abs().clamp(max=float(self.values[-1]))
        index = torch.zeros_like(values, dtype=torch.long)
        for code, middle in enumerate(((self.values[1:] + self.values[:-1]) / 2).tolist()):
            index += (size > middle) | ((size == middle) & bool(code % 2))
        return self.values[index] * torch.sign(values)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Blocks of 32 with a shared power of two."""
        blocks = x.float().unflatten(-1, (-1, 32))
        bits = blocks.abs().amax(-1, keepdim=True).view(torch.int32)
        exponent = (((bits + self.half) & 0x7F800000) >> 23) - 127 - self.largest_exponent
        scale = torch.exp2(exponent.clamp(-127, 127).float())
        return (self.nearest(blocks / scale) * scale).flatten(-2).to(x.dtype)


E2M1, E2M3, E3M2 = Element(2, 1), Element(2, 3), Element(3, 2)
SIX_BITS = {"fp6_e2m3": E2M3, "fp6_e3m2": E3M2}


def halves(packed: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, the low half of a byte first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def scaled(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    powers = torch.exp2(scale.view(torch.uint8).float() - 127)
    return (values.unflatten(-1, (-1, 32)) * powers[..., None]).flatten(-2).to(dtype)


def dequantized_fp4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    USED.add("mxfp4: what vLLM takes from amd-quark, in torch")
    return scaled(E2M1.of_codes(halves(packed)), scale, dtype)


def dequantized_fp6(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, quant_dtype: str) -> torch.Tensor:
    """Four codes in three bytes, low bits first."""
    USED.add("mxfp6: what vLLM takes from amd-quark, in torch")
    parts = packed.int().unflatten(-1, (-1, 3))
    word = parts[..., 0] | (parts[..., 1] << 8) | (parts[..., 2] << 16)
    codes = torch.stack([(word >> shift) & 63 for shift in (0, 6, 12, 18)], -1).flatten(-2)
    return scaled(SIX_BITS[quant_dtype].of_codes(codes), scale, dtype)


def install_mx() -> None:
    mxfp4_utils.dequant_mxfp4 = mxfp4.dequant_mxfp4 = dequantized_fp4
    rounding = {keys.kMxfp4Dynamic: E2M1, keys.kMxfp6E2M3Dynamic: E2M3, keys.kMxfp6E3M2Dynamic: E3M2}
    stored = {keys.kMxfp6E2M3Static: "fp6_e2m3", keys.kMxfp6E3M2Static: "fp6_e3m2"}
    for module in (mxfp4, mxfp6):
        module._ACTIVATION_QUANT_DEQUANT_FUNCS.update({key: element.rounded for key, element in rounding.items()})
    mxfp6._WEIGHT_DEQUANT_FUNCS.update(
        {key: partial(dequantized_fp6, quant_dtype=name) for key, name in stored.items()}
    )
    linear._POSSIBLE_MXFP4_KERNELS[PlatformEnum.CPU] = [MxFp4]
    linear._POSSIBLE_MXFP6_KERNELS[PlatformEnum.CPU] = [linear.EmulationMxfp6LinearKernel]


class MxFp4(Always, linear.EmulationMxfp4LinearKernel):
    """vLLM's own emulation, which asks for amd-quark."""


class NvFp4(Always, linear.EmulationNvFp4LinearKernel):
    """vLLM's own emulation."""

    def __init__(self, config: Any) -> None:
        USED.add("nvfp4: vLLM's emulation")
        super().__init__(config)


class NvFp4WeightOnly(Always, linear.MarlinNvFp4LinearKernel):
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        USED.add("nvfp4 weights: torch")
        scale = layer.weight_scale.float() * layer.weight_global_scale.float()
        weight = E2M1.of_codes(halves(layer.weight.data)).unflatten(-1, (-1, 16)) * scale[..., None]
        layer.weight = torch.nn.Parameter(weight.flatten(-2), requires_grad=False)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight.to(x.dtype), bias)


# --- integers


def expand_integers(self: Any, layer: torch.nn.Module) -> None:
    """The build's product with 16-bit inputs ends with an illegal instruction on some machines."""
    USED.add("4-bit integers: torch")
    kind = self.config.weight_type
    scale = getattr(layer, self.w_s_name).data.float()
    codes = integers.unpack_quantized_values_into_int32(getattr(layer, self.w_q_name).data, kind, 0).float()
    repeats = codes.shape[0] // scale.shape[0]
    zero: Any = 8.0
    if self.config.zero_points:
        zeros = integers.unpack_quantized_values_into_int32(getattr(layer, self.w_zp_name).data, kind, 1)
        zero = zeros.float().repeat_interleave(repeats, 0)
    weight = (codes - zero) * scale.repeat_interleave(repeats, 0)
    layer.expanded = torch.nn.Parameter(weight.t().contiguous(), requires_grad=False)


def expanded_product(
    self: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.expanded.to(x.dtype), bias)


# --- experts


class Int8Experts(cpu_moe.CPUExpertsInt8):
    """The build's product needs AMX tiles."""

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leaves them as they were loaded."""

    def apply(
        self, output: torch.Tensor, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor,
        topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_: Any, **__: Any,
    ) -> None:  # fmt: skip
        USED.add("experts in int8: torch")
        output.zero_()
        for expert in topk_ids.unique().tolist():
            rows, places = torch.where(topk_ids == expert)
            both = int8_product(hidden_states[rows], w1[expert], self.w1_scale[expert])
            gate, up = both.chunk(2, -1)
            inner = (torch.nn.functional.silu(gate) * up).to(hidden_states.dtype)
            out = int8_product(inner, w2[expert], self.w2_scale[expert])
            output.index_add_(0, rows, (out * topk_weights[rows, places, None]).to(output.dtype))


def int8_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inputs are rounded per token."""
    step = (x.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return torch.nn.functional.linear((x.float() / step).round() * step, codes.float() * scale.reshape(-1, 1))


def install_experts() -> None:
    """Where no kernel of this build takes experts, the class of GPUs is chosen, so that tensors are loaded into it."""
    cpu_moe.CPUExpertsInt8 = Int8Experts
    wna16 = int_wna16.WNA16MoEBackend
    fallbacks = {
        int_wna16: lambda named: wna16.TRITON if isinstance(named.get("quant_config"), QuarkConfig) else wna16.MARLIN,
        mxfp4_moe: lambda named: mxfp4_moe.Mxfp4MoeBackend.MARLIN,
        nvfp4_moe: lambda named: nvfp4_moe.NvFp4MoeBackend.MARLIN,
    }
    for oracle, fallback in fallbacks.items():
        for name in [name for name in vars(oracle) if name.startswith("select_") and name.endswith("_moe_backend")]:
            replace_everywhere(getattr(oracle, name), chosen(getattr(oracle, name), oracle, fallback))


def chosen(select: Any, oracle: Any, fallback: Any) -> Any:
    def selected(*given: Any, **named: Any) -> Any:
        try:
            return select(*given, **named)
        except (NotImplementedError, ValueError):
            backend = fallback(named)
            return backend, oracle.backend_to_kernel_cls(backend)[0]

    return selected


def replace_everywhere(old: Any, new: Any) -> None:
    """Modules that import it later get it from the one that defines it."""
    for module in [module for name, module in sys.modules.items() if name.startswith("vllm.")]:
        for name in [name for name, value in vars(module).items() if value is old]:
            setattr(module, name, new)
