"""TensorRT-LLM, its PyTorch backend: rules read in its source, never run here.

https://github.com/NVIDIA/TensorRT-LLM. Files, with the commits at which they were read:
- `tensorrt_llm/_torch/model_config.py` 008e0af8: `ModelConfig._build_modelopt_quant_config`, `load_hf_quant_config`
- `tensorrt_llm/quantization/modelopt_config.py` 2edf354d: both forms of ModelOpt's config, `hf_quant_config.json` first
- `tensorrt_llm/_torch/modules/linear.py` 00bbf71e: `get_quant_method` and its classes, which tensors they take
- `tensorrt_llm/models/modeling_utils.py`: `QuantConfig.is_module_excluded_from_quantization`
- `docs/source/features/quantization.md` 09d4c79b: its table of hardware
They are of 2026 and newer than release 1.2.1; of which release is not known. Whether it has a class for a model was
not read.
"""

from __future__ import annotations

from quarkcli.servers._kernels import Kernel
from quarkcli.servers.base import Read

_LINEAR = "in tensorrt_llm/_torch/modules/linear.py; the hardware table in docs/source/features/quantization.md"


class TensorRtLlm(Read):
    name = "tensorrt-llm"
    title = "TensorRT-LLM"
    kernels_from = "its source of 2026 and the table of hardware in its documentation; nothing was run on a GPU"
    kernels = (
        Kernel("fp8 tensor", "fp8 static", fast="ada hopper blackwell", read_in=f"FP8QDQLinearMethod {_LINEAR}"),
        Kernel("fp8 channel", "fp8 token", fast="hopper", read_in=f"FP8RowwiseLinearMethod {_LINEAR}"),
        Kernel("fp8 tile", "fp8 group", fast="hopper blackwell", read_in=f"FP8BlockScalesLinearMethod {_LINEAR}"),
        Kernel("nvfp4", "nvfp4", fast="blackwell", read_in=f"NVFP4LinearMethod {_LINEAR}"),
        Kernel(
            "mxfp4*",
            "none",
            weights="hopper blackwell",
            read_in="get_mxfp4_quant_algo, resolve_moe_backend in tensorrt_llm/_torch/model_config.py",
        ),
        Kernel(
            "kv-cache",
            "fp8*",
            fast="ampere ada hopper blackwell",
            read_in="the hardware table in docs/source/features/quantization.md",
        ),
    )


SERVER = TensorRtLlm()
