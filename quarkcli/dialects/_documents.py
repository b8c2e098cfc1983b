"""Defines the shape of each dialect's `quantization_config`, as far as its reader looks."""

from __future__ import annotations

from typing import Any

from quarkcli.documents.shape import Shape

_Specs = dict[str, Any] | list[dict[str, Any]] | None


class Arguments(Shape):
    """QuantizationArgs of compressed-tensors."""

    num_bits: int | None = None
    type: str | None = None
    strategy: str | None = None
    group_size: int | None = None
    block_structure: list[int] | str | None = None
    symmetric: bool | None = None
    dynamic: bool | str | None = None


class Group(Shape):
    """A config group of compressed-tensors."""

    targets: list[str] | None = None
    weights: Arguments | None = None
    input_activations: Arguments | None = None
    output_activations: Arguments | None = None
    format: str | None = None


class Application(Shape):
    """A place where compressed-tensors applies a transform."""

    targets: list[str] | None = None
    location: str | None = None
    ignore: list[str] | None = None


class TransformGroup(Shape):
    """A group of the `transform_config` of compressed-tensors."""

    type: str | None = None
    apply: list[Application] | None = None
    randomize: bool | None = None
    head_dim: int | None = None


class TransformConfig(Shape):
    """The `transform_config` of compressed-tensors."""

    config_groups: dict[str, TransformGroup] | None = None


class CompressedTensorsConfig(Shape):
    """The `quantization_config` of compressed-tensors."""

    config_groups: dict[str, Group] | None = None
    ignore: list[str] | None = None
    format: str | None = None
    kv_cache_scheme: Arguments | None = None
    transform_config: TransformConfig | None = None


class _Export(Shape):
    weight_format: str | None = None
    pack_method: str | None = None


class _Layer(Shape):
    weight: _Specs = None
    input_tensors: _Specs = None
    output_tensors: _Specs = None
    bias: _Specs = None


class QuarkConfig(Shape):
    """The `quantization_config` of AMD Quark; the dictionaries of a spec are read key by key."""

    global_quant_config: _Layer | None = None
    layer_type_quant_config: dict[str, _Layer | None] | None = None
    layer_quant_config: dict[str, _Layer | None] | None = None
    exclude: list[str] | None = None
    export: _Export | None = None
    softmax_quant_spec: _Specs = None


class ModelOptLayer(Shape):
    """The algorithm of one module, in ModelOpt's `quantized_layers`."""

    quant_algo: str | None = None
    group_size: int | None = None


class _ModelOptNested(Shape):
    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int | None = None
    exclude_modules: list[str] | None = None
    quantized_layers: dict[str, ModelOptLayer] | None = None


class _Producer(Shape):
    name: str | None = None


class _ModelOptGroup(Shape):
    input_activations: dict[str, Any] | None = None


class ModelOptConfig(Shape):
    """The `quantization_config` of NVIDIA ModelOpt, or the nested one of its `hf_quant_config.json`."""

    quant_algo: str | None = None
    group_size: int | None = None
    ignore: list[str] | None = None
    exclude_modules: list[str] | None = None
    kv_cache_scheme: dict[str, Any] | str | None = None
    quantized_layers: dict[str, ModelOptLayer] | None = None
    config_groups: dict[str, _ModelOptGroup] | None = None
    producer: _Producer | None = None
    quantization: _ModelOptNested | None = None


class Fp8Config(Shape):
    """The `quantization_config` of 8-bit floats as DeepSeek, transformers and vLLM have it."""

    activation_scheme: str | None = None
    weight_block_size: list[int] | None = None
    fmt: str | None = None
    ignored_layers: list[str] | None = None
    modules_to_not_convert: list[str] | None = None


class AwqConfig(Shape):
    """The `quantization_config` of AutoAWQ, in its two sets of names."""

    version: str | None = None
    checkpoint_format: str | None = None
    format: str | None = None
    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    zero_point: bool | None = None


class Mxfp4Config(Shape):
    """The `quantization_config` of gpt-oss."""

    modules_to_not_convert: list[str] | None = None


class _Override(Shape):
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None


class GptqConfig(_Override):
    """The `quantization_config` of GPTQModel."""

    checkpoint_format: str | None = None
    format: str | None = None
    dynamic: dict[str, _Override] | None = None
    is_marlin_format: bool | None = None
    modules_in_block_to_quantize: list[str | list[str]] | None = None
