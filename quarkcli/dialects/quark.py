"""The quark dialect: AMD Quark writes it, vLLM reads it, and our own layout holds what Quark cannot pack.

Layouts as in exports of amd-quark 0.13. The loaders were tried: vLLM 0.32 and transformers 5.23 (which needs
the amd-quark package to read it). See the modules beside it: `_quark_specs` for the dictionaries of a spec,
`_quark_layout` for tensors and bytes, `_quark_config` for the config, `_quark_loaders` for who loads what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.dialects import _quark_loaders as servers
from quarkcli.dialects import _shared as shared
from quarkcli.dialects._documents import QuarkConfig
from quarkcli.dialects._quark_config import (
    IN_ORDER,
    PACK_METHOD,
    SOFTMAX,
    LayerReader,
    Slots,
    config_of,
    is_joined,
    projection,
    unlisted_heads,
)
from quarkcli.dialects._quark_layout import Matrix, layout, matrix_shape, pack, static_layout, unpack
from quarkcli.dialects.base import (
    ANY,
    Bar,
    Classes,
    ConfigCheck,
    Decoded,
    Key,
    Reader,
    StoredAttention,
    StoredTarget,
    StoredView,
    TensorInfo,
    Writer,
)
from quarkcli.documents.shape import check
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike
from quarkcli.plan.model import Attention, Plan, QuantizedTarget
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized


NAME = "quark"
_ZEROS = "weight_zero_point"
_INPUT_SCALES = (".input_scale", ".input_scale_2")
_OUTPUT_SCALES = ("output_scale", "prob_output_scale")


@dataclass(frozen=True)
class InOrder(StoredTarget):
    """A target whose 32-bit words hold their codes in plain order, Quark's other pack_method."""


class QuarkReader(Reader):
    name = NAME
    quant_method = NAME
    lists = ("exclude",)
    lists_tied = False  # transformers alone would look for its scales, and is asked as a server

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """Returns the view of a checkpoint.

        Raises ModelError for a scheme that the dialect does not hold, and for tensors that do not fit the config.
        """
        check(QuarkConfig, config, "quantization_config")
        export = config.get("export") or {}
        if export.get("weight_format", "real_quantized") != "real_quantized":
            raise ModelError(
                f"weight_format {export['weight_format']!r} holds no codes",
                where="quantization_config",
                kind="E-SOURCE-FORMAT",
            )
        method = export.get("pack_method", PACK_METHOD)
        if method not in (PACK_METHOD, IN_ORDER):
            raise ModelError(
                f"this version cannot read pack_method {method!r}",
                where="quantization_config",
                kind="E-SOURCE-FORMAT",
            )
        layers = LayerReader(config)
        kind = InOrder if method == IN_ORDER else StoredTarget
        modules, calibrated = list(_modules(layers, headers)), any(name.endswith(_INPUT_SCALES) for name in headers)
        targets = {module: _stored(kind, module, layers.slots(module), headers, calibrated) for module in modules}
        wanted = {module: static_layout("input", layers.slots(module).input)[:1] for module in modules}
        absent = () if calibrated else tuple(f"{module}.{info.name}" for module in modules for info in wanted[module])
        view = StoredView(targets, _stored_attention(layers, headers), absent=absent)
        _check_outputs(view, layers, headers)
        return view

    def untouched(self, config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
        layers = LayerReader(config)
        return {module for module in modules if not layers.speaks_of(module)}

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> Decoded:
        local = stored.own(tensors)
        in_order = isinstance(stored, InOrder)
        decoded = Decoded(unpack(Matrix("weight", stored.weight, stored.shape), local, in_order=in_order))
        if stored.bias is not None:
            matrix = Matrix("bias", stored.bias, (1, stored.shape[0]))
            decoded.bias = unpack(matrix, local, in_order=in_order)
        for slot, spec in (("input", stored.input), ("output", stored.output)):
            for info in static_layout(slot, spec)[:1]:
                setattr(decoded, slot, local[info.name].float().reshape(()))
        return decoded


READER = QuarkReader()


class Quark(Writer):
    name = NAME
    reader = READER
    preferences: ClassVar[Mapping[str, int]] = {ANY: 10}
    demands: ClassVar[Mapping[str, tuple[Key, ...]]] = {"vllm": servers.VLLM_KEYS}
    no_globs: ClassVar[Mapping[str, str]] = {"vllm": "exclude"}
    faults: ClassVar[Mapping[str, ConfigCheck]] = {"transformers": unlisted_heads}
    classes: ClassVar[Mapping[str, Classes]] = {"sglang": servers.SGLANG, "tensorrt-llm": shared.TENSORRT_LLM_NONE}
    bars: ClassVar[Mapping[str, tuple[Bar, ...]]] = servers.BARS

    def refusals(self, plan: Plan) -> list[str]:
        return servers.refusals(plan)

    def loaders(self, plan: Plan) -> set[str]:
        return set() if self.refusals(plan) else servers.loaders(plan)

    def cache_fault(self, plan: Plan, server: str) -> str:
        module = next((module for module in shared.cached(plan) if is_joined(module)), None)
        if module is None or server != "vllm":
            return ""
        return f"it looks for scales of the KV cache on k_proj and v_proj, and here one is on {module.k_proj}"

    def infos(self, target: QuantizedTarget) -> list[TensorInfo]:
        found = [info for matrix in _matrices(target) for info in layout(matrix, target.dtype)]
        return _of(target.name, [*found, *_static_infos(target)])

    def joined(self, attention: Attention) -> frozenset[str]:
        """Returns k and v where one linear makes both; and q, which comes out of it too unless a latent goes in."""
        if not is_joined(attention) or not {"k", "v"} & set(attention.specs):
            return frozenset()
        return frozenset("kv" if attention.latent else "qkv")

    def attention_infos(self, attention: Attention) -> list[TensorInfo]:
        found = (info for kind, spec in attention.specs.items() for info in _attention_layout(attention, kind, spec))
        return list(dict.fromkeys(found))

    def tensors(
        self, target: QuantizedTarget, quantized: Quantized, static: Mapping[str, Tensor], bias: Quantized | None = None
    ) -> dict[str, Tensor]:
        """Returns packed tensors with the names and layout of `infos`.

        Raises ValueError when a static scale or a quantized bias is missing.
        """
        import torch

        out: dict[str, Tensor] = {}
        for matrix in _matrices(target):
            codes = quantized if matrix.slot == "weight" else bias
            if codes is None:
                raise ValueError(f"{target.name} has a quantized bias, but no codes of it were given")
            out |= pack(matrix, codes)
        for slot, spec in _activations(target).items():
            for info, value in zip(static_layout(slot, spec), (static.get(slot), torch.zeros(())), strict=False):
                if value is None:
                    raise ValueError(f"{target.name} has a static {slot}, but no scale was given for it")
                dtype = {"F32": torch.float32, "I32": torch.int32, "I8": torch.int8}[info.dtype]
                out[info.name] = value.to(dtype).reshape(()).clone()
        return {f"{target.name}.{local}": tensor for local, tensor in out.items()}

    def attention_tensors(self, attention: Attention, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            info.name: scales[kind].float().reshape(()).clone()
            for kind, spec in attention.specs.items()
            for info in _attention_layout(attention, kind, spec)
        }

    def config(self, plan: Plan) -> dict[str, Any]:
        return config_of(plan, NAME)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _matrices(target: QuantizedTarget) -> Iterator[Matrix]:
    yield Matrix("weight", target.weight, target.shape)
    if target.bias_spec is not None:
        yield Matrix("bias", target.bias_spec, (1, target.shape[0]))


def _activations(target: QuantizedTarget) -> dict[str, TensorSpec | None]:
    return {"input": target.input, "output": target.output}


def _static_infos(target: QuantizedTarget) -> list[TensorInfo]:
    return [info for slot, spec in _activations(target).items() for info in static_layout(slot, spec)]


def _of(module: str, infos: list[TensorInfo]) -> list[TensorInfo]:
    return [TensorInfo(f"{module}.{info.name}", info.dtype, info.shape) for info in infos]


def _attention_layout(attention: Attention, kind: str, spec: TensorSpec) -> list[TensorInfo]:
    """Returns the scale of a slot alone: zero points of integers would say nothing."""
    if kind == SOFTMAX:
        return _of(attention.name, static_layout("prob_output", spec)[:1])
    return _of(projection(attention, kind), static_layout("output", spec)[:1])


# --- reading ---------------------------------------------------------------------------------------------------------


def _modules(layers: LayerReader, headers: Mapping[str, HeaderLike]) -> Iterator[str]:
    """Yields the modules with a weight scale, and those that the config casts, in file order."""
    scale, weight = ".weight_scale", ".weight"
    for name, header in headers.items():
        module = name.removesuffix(weight)
        if name.endswith(scale):
            yield name.removesuffix(scale)
        elif module != name and len(header.shape) == 2 and name + "_scale" not in headers and layers.casts(module):
            yield module


def _stored(
    kind: type[StoredTarget], module: str, slots: Slots, headers: Mapping[str, HeaderLike], calibrated: bool
) -> StoredTarget:
    """Returns a weight; its input as it is read where the files hold no scale of any.

    That is what AMD Quark writes file by file, and then no zero points of symmetric codes either.
    """
    source = slots.input if calibrated or not static_layout("input", slots.input) else None
    assert slots.weight is not None
    weight = shared.header(headers, f"{module}.weight")
    shape = matrix_shape(slots.weight, shared.rows_and_columns(module, weight))
    wanted = layout(Matrix("weight", slots.weight, shape), "BF16")
    if slots.weight.symmetric:
        wanted = [each for each in wanted if each.name != _ZEROS or f"{module}.{_ZEROS}" in headers]
    bias = slots.bias if f"{module}.bias" in headers else None  # one entry may speak for modules without a bias
    if bias is not None:
        wanted += layout(Matrix("bias", bias, (1, shape[0])), "BF16")
    wanted += static_layout("input", source) + static_layout("output", slots.output)
    names = shared.check_headers(_of(module, wanted), headers)
    return kind(module, slots.weight, source, shape, names, slots.output, bias)


def _stored_attention(layers: LayerReader, headers: Mapping[str, HeaderLike]) -> dict[str, StoredAttention]:
    """Returns the attention modules by their stored scales.

    A softmax output whose scale is in no file is cast, as servers do by a scale of one: AMD Quark writes none where the
    model ran without a softmax of its own.
    """
    found: dict[str, StoredAttention] = {}
    for kind, (leaf, spec) in layers.attention().items():
        infos = static_layout("prob_output" if kind == SOFTMAX else f"{leaf}.output", spec)
        if not infos:
            raise ModelError(
                f"no scale of {spec.describe()} is stored", where=f"attention {kind}", kind="E-SOURCE-CONTRADICTS"
            )
        for name in headers:
            parent = name.removesuffix(f".{infos[0].name}")
            if parent != name:
                shared.check_headers([TensorInfo(name, infos[0].dtype, infos[0].shape)], headers)
                entry = found.setdefault(parent, StoredAttention(parent, {}, {}))
                entry.specs[kind], entry.scales[kind] = spec, name
        if any(kind in entry.specs for entry in found.values()):
            continue
        if kind != SOFTMAX or not found:
            raise ModelError(
                f"it is quantized, but no file holds {infos[0].name}",
                where=f"attention {kind}",
                kind="E-SOURCE-CONTRADICTS",
            )
        for entry in found.values():
            entry.specs[kind] = _cast(spec)
    return found


def _cast(spec: TensorSpec) -> TensorSpec:
    """Returns the same with a scale of one."""
    assert spec.scale is not None
    return replace(spec, scale=replace(spec.scale, constant_amax=spec.format.maximum))


def _check_outputs(view: StoredView, layers: LayerReader, headers: Mapping[str, HeaderLike]) -> None:
    """Raises ModelError when an output scale is left over. Gemma 3n has tensors whose names only end alike."""
    taken = {name for stored in view.targets.values() for name in stored.tensors}
    taken |= {name for attention in view.attention.values() for name in attention.scales.values()}
    for name in headers:
        module, _, leaf = name.rpartition(".")
        if leaf in _OUTPUT_SCALES and name not in taken and not layers.is_cached(module):
            raise ModelError(
                "the quantization config has no output that this scale belongs to",
                where=name,
                kind="E-SOURCE-CONTRADICTS",
            )


WRITER = Quark()
