"""Builds the model's module tree on the meta device, with its class, config and list of blocks. It reads no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import nn

from quarkcli.documents import text
from quarkcli.documents.model import Config
from quarkcli.documents.shape import check
from quarkcli.errors import ModelError
from quarkcli.model.failures import DATA_FREE_HINT, ModelCode, described
from quarkcli.model.library import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    no_init_weights,
    quiet,
    transformers,
)

# safetensors' dtype texts; a text that is not here is a storage format no model computes in.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_COMPUTABLE = (torch.float32, torch.float16, torch.bfloat16)


class HeaderLike(Protocol):
    """Describes one tensor of a safetensors header: dtype text (`BF16`) and shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    model        the module tree; every parameter on meta, none requires a gradient
    dtype        what the model computes in
    blocks_path  dotted path of the list of decoder blocks
    code         whose code runs in it
    buffers      values of the non-persistent buffers that building the model gave (only models with their own code)
    """

    model: Any
    dtype: torch.dtype
    blocks_path: str
    code: ModelCode
    buffers: dict[str, torch.Tensor]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.get_submodule(self.blocks_path)

    def set_blocks(self, blocks: nn.ModuleList) -> None:
        """Puts another list in the place of the blocks (the recording stubs)."""
        parent, _, leaf = self.blocks_path.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, blocks)


def build_skeleton(
    folder: Path,
    headers: Mapping[str, HeaderLike],
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    eager: bool = False,
) -> Skeleton:
    """Builds the model of `folder`'s config.json on the meta device.

    dtype   None: what config.json says of the model or of its text part, else what most of its values are stored in
    eager   attention in the class's own eager implementation, whose masks and steps are plain tensors
    raises  ModelError: no config.json, unknown model type, custom code without `trust_remote_code`, a class that
            cannot be built
    """
    with quiet():
        config = load_config(folder, trust_remote_code)
        cls = model_class(config, folder, trust_remote_code)
    code = ModelCode(cls, config, folder)
    with code.running("cannot be built from its config"):
        config = _prepared(config, "eager" if eager else None)
        dtype = dtype or _config_dtype(config) or _stored_dtype(headers)
        set_dtype(config, dtype)
        model = _build(cls, config, dtype)
        model.requires_grad_(False)
        blocks_path = find_blocks(model)
    buffers = {name: buffer for name, buffer in model.named_non_persistent_buffers() if not buffer.is_meta}
    return Skeleton(model, dtype, blocks_path, code, buffers)


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """Returns the config object of a local folder.

    Custom code runs only when it is allowed, and only for types that transformers lacks.
    """
    data = _read_config(folder)
    kind, custom = data.get("model_type"), "AutoConfig" in data.get("auto_map", {})
    try:
        if kind in CONFIG_MAPPING:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if (cls := _named_class(data)) is not None:  # kimi_k2: an unknown type that names a known architecture
            data.pop("model_type", None)
            return cls.config_class.from_dict(data)
        if custom and trust_remote_code:
            return AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"transformers {transformers.__version__} cannot read it: {described(error)}",
            where=str(folder / "config.json"),
            hint=DATA_FREE_HINT,
            kind="E-CLASS-UNKNOWN",
        ) from error
    if custom:
        raise _custom_code_refused(folder, data["auto_map"])
    raise ModelError(
        f"transformers {transformers.__version__} does not know the model type {kind!r}",
        where=str(folder / "config.json"),
        hint=DATA_FREE_HINT,
        kind="E-CLASS-UNKNOWN",
    )


def model_class(config: Any, folder: Path, trust_remote_code: bool) -> Any:
    """Returns the class that `architectures` names.

    The automatic classes silently give text-only twins of some families, with other tensor names, so they are only
    asked when transformers does not know the architecture.
    """
    data = {"architectures": getattr(config, "architectures", None)}
    if (cls := _named_class(data)) is not None:
        return cls
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if reference and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        try:
            return get_class_from_dynamic_module(reference, folder, local_files_only=True)
        except Exception as error:
            raise ModelError(
                f"the model's own code fails (transformers {transformers.__version__}): {described(error)}",
                where=str(folder),
                hint=DATA_FREE_HINT,
                kind="E-CLASS-FAILS",
            ) from error
    if reference:
        raise _custom_code_refused(folder, config.auto_map)
    raise ModelError(
        f"transformers {transformers.__version__} has no text model class for {data['architectures']}",
        where=str(folder / "config.json"),
        hint=DATA_FREE_HINT,
        kind="E-CLASS-UNKNOWN",
    )


def set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Sets the dtype on the config and its sub-configs: some classes build inner models from theirs."""
    config.dtype = dtype
    for key in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, key, None)) is not None:
            set_dtype(inner, dtype)


def find_blocks(model: Any) -> str:
    """Returns the dotted path of the list of decoder blocks.

    It is the outermost ModuleList of the right length in the decoder.

    Configs of models with their own code may name the count as they like; then it is the outermost, longest list.
    """
    decoder = _decoder(model)
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        (name.count("."), -len(module), module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == (count or len(module))
    ]
    if not lists:
        wanted = f"{count} decoder blocks" if count else "decoder blocks"
        raise ModelError(f"{type(model).__name__} has no list of {wanted}", hint=DATA_FREE_HINT, kind="E-CLASS-FOLLOW")
    found = min(lists, key=lambda row: row[:2])[2]
    return next(name for name, module in model.named_modules() if module is found)


def text_modules(model: Any) -> Iterable[tuple[str, Any]]:
    """Yields (path, submodel) of the submodels that running text needs.

    They are those that contain the decoder, and its parts.
    """
    decoder = _decoder(model)
    inside = set(decoder.modules())
    for name, module in model.named_modules():
        is_model = isinstance(module, PreTrainedModel)
        if is_model and (module in inside or any(child is decoder for child in module.modules())):
            yield name, module


def _decoder(model: Any) -> Any:
    """Returns the submodel of the text; ModernBERT calls its head the decoder."""
    found = model.get_decoder()
    return model.base_model if isinstance(found, nn.Linear) else found


def _build(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    arguments = {"is_quantized": False, "_is_ds_init_called": False, "allow_all_kernels": None}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        contexts = cls.get_init_context(dtype, **arguments)
        if not cls.__module__.startswith("transformers."):
            contexts = [context for context in contexts if not isinstance(context, torch.device)]
            contexts.append(_meta_parameters())
        else:
            contexts.append(no_init_weights())  # on meta there is nothing to draw
        for context in contexts:
            stack.enter_context(context)
        model = cls(config)
    return model.eval()


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Parameters go to the meta device as soon as a module has them; buffers keep the values they are built with.

    For models with their own code, which mostly compute buffers while being built and nowhere else.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    with mock.patch.object(nn.Module, "register_parameter", register_on_meta):
        yield


def _prepared(config: Any, attention: str | None) -> Any:
    """Returns the config without settings that disturb a plain text forward, and with an attention (None: default)."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for flag in ("output_attentions", "output_hidden_states", "output_router_logits"):
            if getattr(part, flag, False):
                setattr(part, flag, False)
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    # A config saved with flash attention would ask for a package and change the masks.
    config._attn_implementation = attention
    _spread_rope_theta(config)
    return config


def _spread_rope_theta(config: Any) -> None:
    """dbrx keeps its rotary base in attn_config, where transformers' rotary embedding does not look."""
    theta = getattr(getattr(config, "attn_config", None), "rope_theta", None)
    rope = getattr(config, "rope_parameters", None)
    if theta is not None and isinstance(rope, dict):
        rope["rope_theta"] = theta


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(
            "there is no such file, so it is unknown which model this is", where=str(path), kind="E-MODEL-SIDE-FILE"
        ) from None
    except OSError as error:
        raise ModelError(f"cannot be read: {error}", where=str(path), kind="E-MODEL-SIDE-FILE") from error
    data = text.parse_object(content, str(path))
    check(Config, data, str(path))
    data.pop("quantization_config", None)
    return data


def _named_class(data: Mapping[str, Any]) -> Any:
    names = data.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def _custom_code_refused(folder: Path, auto_map: Mapping[str, Any]) -> ModelError:
    texts = [text for value in auto_map.values() for text in (value if isinstance(value, list) else [value]) if text]
    files = sorted({text.rpartition(".")[0].rpartition("--")[2] + ".py" for text in texts})
    return ModelError(
        f"calibration must run code that comes with the model ({', '.join(files)})",
        where=str(folder),
        hint="read that code, then allow it with --trust-remote-code, or " + DATA_FREE_HINT,
        kind="E-CODE-TRUST",
    )


def _as_dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), None)
    return value if isinstance(value, torch.dtype) else None


def _config_dtype(config: Any) -> torch.dtype | None:
    found = (_as_dtype(getattr(part, "dtype", None)) for part in (config, config.get_text_config()))
    return next((dtype for dtype in found if dtype in _COMPUTABLE), None)


def _stored_dtype(headers: Mapping[str, HeaderLike]) -> torch.dtype:
    """Returns the floating-point dtype of most values: a router's bias in float32 does not make a float32 model."""
    values: Counter[torch.dtype] = Counter()
    for header in headers.values():
        if (dtype := DTYPES.get(header.dtype)) in _COMPUTABLE:
            values[dtype] += prod(header.shape)
    return values.most_common(1)[0][0] if values else torch.float32
