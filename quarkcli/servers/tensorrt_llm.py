"""TensorRT-LLM, its PyTorch backend: rules read in its source, never run here.

https://github.com/NVIDIA/TensorRT-LLM. Files, with the commits at which they were read:
- `tensorrt_llm/_torch/model_config.py` 008e0af8: `ModelConfig._build_modelopt_quant_config`, `load_hf_quant_config`
- `tensorrt_llm/quantization/modelopt_config.py` 2edf354d: both forms of ModelOpt's config, `hf_quant_config.json` first
- `tensorrt_llm/_torch/modules/linear.py` 00bbf71e: `get_quant_method` and its classes, which tensors they take
- `tensorrt_llm/models/modeling_utils.py`: `QuantConfig.is_module_excluded_from_quantization`
- `docs/source/features/quantization.md` 09d4c79b: its table of hardware
- `tensorrt_llm/_torch/models/_arch_index.py` 065ff9e9: the models that it has classes for
They are of 2026 and newer than release 1.2.1; of which release is not known.
"""

from __future__ import annotations

from quarkcli.servers._kernels import Kernel
from quarkcli.servers.base import Read

_LINEAR = "in tensorrt_llm/_torch/modules/linear.py; the hardware table in docs/source/features/quantization.md"

# What stands before the last words of the architectures that it has classes for.
_CAUSAL = """
    Afmoe Cohere2 DeciLM DeepseekV3 DeepseekV32 DeepseekV4 Exaone4 ExaoneMoE Gemma3 Gemma4 Glm4Moe GlmMoeDsa
    GptOss HCXVision HunYuanDenseV1 HunYuanMoEV1 KimiLinear Laguna Llama MiniMaxM2 MiniMaxM3Sparse Mistral
    MistralLarge3 Mixtral Nemotron NemotronH NemotronHPuzzle Phi3 Phi4MM Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next
    Qwen3_5 Qwen3_5Moe SeedOss Starcoder2 Step3p5
"""
_CONDITIONAL = """
    Bart Cosmos3 Exaone4_5_ Gemma3 Gemma4 Gemma4Unified KimiK25 KimiK3 Llama4 LlavaNext MBart MiniCPMV4_6
    MiniMaxM3Sparse Mistral3 Mllama Pixtral Qwen2VL Qwen2_5_VL Qwen3VL Qwen3VLMoe Qwen3_5 Qwen3_5Moe
    QwenImageBench Step3p7 T5 Whisper
"""


class TensorRtLlm(Read):
    name = "tensorrt-llm"
    title = "TensorRT-LLM"
    models = frozenset(
        [f"{name}ForCausalLM" for name in _CAUSAL.split()]
        + [f"{name}ForConditionalGeneration" for name in _CONDITIONAL.split()]
        + ["NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Nano_VL_V2", "LlavaLlamaModel"]
    )
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
