"""Defines the shapes of config.json and of the index of a model, as far as they are read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from quarkcli.documents.shape import Shape

# Far beyond any model, and few enough to be listed.
_Count = Annotated[int, Field(ge=0, le=100_000)]


class TextConfig(Shape):
    """Describes a language model, at the top of config.json or in one of its inner objects."""

    dtype: str | None = None
    torch_dtype: str | None = None
    tie_word_embeddings: bool | None = None
    num_hidden_layers: _Count | None = None
    n_layer: _Count | None = None
    n_layers: _Count | None = None
    num_layers: _Count | None = None
    text_config: TextConfig | None = None
    language_config: TextConfig | None = None
    llm_config: TextConfig | None = None
    language_model_config: TextConfig | None = None
    text_model_config: TextConfig | None = None
    thinker_config: TextConfig | None = None


class Quantization(Shape):
    """Names the method, which decides the dialect that reads the rest."""

    quant_method: str | None = None


class Config(TextConfig):
    """config.json. The dialect that reads `quantization_config` checks what is in it."""

    architectures: list[str] | None = None
    model_type: str | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: Quantization | None = None
    compression_config: Quantization | None = None


class Index(Shape):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]
