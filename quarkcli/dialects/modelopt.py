"""The modelopt dialect: NVIDIA ModelOpt writes it; vLLM and TensorRT-LLM read it.

Tensors as in exports of nvidia-modelopt 0.47. The loader of vLLM 0.32 was tried. transformers passes over the method,
takes codes for weights and runs: it is never one of the loaders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects import _shared as shared
from quarkcli.dialects._documents import ModelOptConfig
from quarkcli.dialects._kinds import Pair
from quarkcli.dialects._modelopt_config import (
    ALGOS,
    BARS,
    CLASSES,
    HOLDS,
    NAME,
    NESTED_FILE,
    Algo,
    LayerReader,
    cache_of,
    config_of,
    flat,
    is_modelopt,
    nested,
)
from quarkcli.dialects.base import (
    CONFIG_FILE,
    CONFIG_KEY,
    Bar,
    Classes,
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
from quarkcli.spec import E4M3_MAX, PerChannel, PerGroup, PerTensor, PerTile, ScaleSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized

_TILE = 128
_CACHE = "kv"
# A cache without stored scales: servers take one, which is that of this range.
_CAST_CACHE = TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32", constant_amax=E4M3_MAX))
# Classes of experts in vLLM. Modules beside the language model it takes for unquantized, by parts of their names.
_VLLM_EXPERTS = frozenset(ALGOS[name].kinds for name in ("FP8", "NVFP4", "W4A16_NVFP4", "MXFP8"))
_VLLM_PASSES_OVER = ("vision_tower", "vision_model", "vit_large_projector")
# Leaves that mean nothing unless the model is quantized; without them a file beside it is of another checkpoint.
_SCALES = (".weight_scale", ".weight_scale_inv")
_COLUMNS = "pre_quant_scale"
_REWRITTEN = (".svdquant_lora_a", ".svdquant_lora_b", "_proj.k_bias", "_proj.v_bias")


class ModelOptReader(Reader):
    name = NAME
    quant_method = NAME
    beside = (NESTED_FILE,)
    lists = ("ignore", "exclude_modules")

    def matches(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> bool:
        return is_modelopt(config)

    def packs(self, headers: Mapping[str, HeaderLike]) -> bool:
        return any(name.endswith(_SCALES) for name in headers)

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """Returns the view of a checkpoint, from the flat or the nested config.

        Raises ModelError for an algorithm that is not read, and for tensors that do not fit the config.
        """
        check(ModelOptConfig, config, "quantization_config")
        config = flat(config)
        for name in headers:
            if name.endswith(_REWRITTEN):
                raise ModelError(
                    "this version cannot read values that are multiplied or added while the model runs",
                    where=name,
                    kind="E-SOURCE-FORMAT",
                )
        layers, modules = LayerReader(config), shared.quantized_modules(headers)
        static = any(f"{module}.input_scale" in headers for module in modules)
        targets = {module: _stored(module, layers.algo(module), headers, static) for module in modules}
        return StoredView(targets, dict(_stored_attention(headers)) if cache_of(config) else {})

    def left_out(self, config: Mapping[str, Any]) -> dict[str, list[str]]:
        return super().left_out(config.get("quantization") or config)

    def untouched(self, config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
        layers = LayerReader(flat(config))
        return {module for module in modules if not layers.names(module)}

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> Decoded:
        from quarkcli.numerics.packed import Packed, Streamed
        from quarkcli.numerics.packing import unpack_bits
        from quarkcli.numerics.quantize import QParams, Quantized

        local, spec = stored.own(tensors), stored.weight
        codes = local["weight"]
        over = local.get("weight_scale_2") if spec.is_two_level else None
        params = QParams(
            local["weight_scale"].reshape(shared.scale_shape(spec, stored.shape)),
            None if over is None else over.float().reshape(()),
        )
        source = stored.input
        static = local["input_scale"].float().reshape(()) if source is not None and source.is_static else None
        if _is_fp4(spec):
            return Decoded(Streamed(Packed(codes, params), spec, stored.shape[1]), static)
        if spec.format.bits == 4:  # two rows in one
            codes = unpack_bits(codes.T.contiguous(), 4, stored.shape[0], signed=True).T.contiguous()
        return Decoded(Quantized(codes, params), static)


READER = ModelOptReader()


class ModelOpt(Writer):
    name = NAME
    reader = READER
    demands: ClassVar[Mapping[str, tuple[Key, ...]]] = {"vllm": (Key("quant_algo", str, "the algorithm is not known"),)}
    classes: ClassVar[Mapping[str, Classes]] = CLASSES
    bars: ClassVar[Mapping[str, tuple[Bar, ...]]] = BARS

    def refusals(self, plan: Plan) -> list[str]:
        found = shared.refusals(plan, NAME, HOLDS)
        reasons: dict[str, list[str]] = {}
        for attention in shared.cached(plan):
            for kind, module in _projections(attention).items():
                if not module.endswith(f".{kind}_proj"):
                    what = f"{NAME} stores the scale of attention {kind} on a {kind}_proj, not on {module}"
                    reasons.setdefault(what, []).append(attention.name)
        if not any(True for _ in plan.quantized()):
            found.append(f"{NAME} has no algorithm for a model without quantized weights")
        return [*found, *shared.sentences(reasons)]

    def loaders(self, plan: Plan) -> set[str]:
        if self.refusals(plan) or not shared.vllm_loads(plan, HOLDS, _VLLM_EXPERTS) or not shared.tiles_fit(plan):
            return set()
        for run in plan.quantized_alike():
            tiles = isinstance(run[0].weight.granularity, PerTile)
            if tiles and run[0].shape[1] % _TILE:
                return set()
            if any(part in target.name for target in run for part in _VLLM_PASSES_OVER):
                return set()
        return {"vllm"}

    def infos(self, target: QuantizedTarget) -> list[TensorInfo]:
        return _layout(target.name, shared.pair_of(target), target.shape, target.dtype)

    def attention_infos(self, attention: Attention) -> list[TensorInfo]:
        modules = _projections(attention).items()
        return [TensorInfo(f"{module}.{kind}_scale", "F32", ()) for kind, module in modules]

    def tensors(
        self, target: QuantizedTarget, quantized: Quantized, static: Mapping[str, Tensor], bias: Quantized | None = None
    ) -> dict[str, Tensor]:
        """Returns packed tensors with the names and layout of `infos`.

        Raises ValueError when a static input has no scale.
        """
        params = quantized.params
        assert params.scale is not None
        codes = quantized.stream(4) if _is_fp4(target.weight) else quantized.codes
        local = {"weight": codes, "weight_scale": params.scale}
        if params.global_scale is not None:
            local["weight_scale_2"] = params.global_scale
        if target.input is not None and target.input.is_static:
            local["input_scale"] = shared.static_scale(target, "input", static)
        infos = self.infos(target)
        return {
            info.name: local[info.name.removeprefix(f"{target.name}.")].reshape(info.shape).contiguous()
            for info in infos
        }

    def attention_tensors(self, attention: Attention, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        modules = _projections(attention).items()
        return {f"{module}.{kind}_scale": scales[kind].float().reshape(()).clone() for kind, module in modules}

    def config(self, plan: Plan) -> dict[str, Any]:
        return config_of(plan)

    def files(self, plan: Plan) -> dict[str, dict[str, Any]]:
        config = config_of(plan)
        return {CONFIG_FILE: {CONFIG_KEY: config}, NESTED_FILE: nested(config)}


# --- tensors -------------------------------------------------------------------------------------------------------


def _is_fp4(spec: TensorSpec) -> bool:
    return spec.format.kind == "float" and spec.format.bits == 4


def _codes(spec: TensorSpec, rows: int, cols: int) -> TensorInfo:
    if spec.format.kind == "integer":
        return TensorInfo("weight", "I8", (rows, cols)) if spec.format.bits == 8 else _of_bytes(rows // 2, cols)
    return _of_bytes(rows, cols // 2) if _is_fp4(spec) else TensorInfo("weight", "F8_E4M3", (rows, cols))


def _of_bytes(rows: int, cols: int) -> TensorInfo:
    return TensorInfo("weight", "U8", (rows, cols))


def _layout(module: str, pair: Pair, shape: tuple[int, int], model: str) -> list[TensorInfo]:
    """Returns the tensors of a weight of `shape`; `model` is the dtype of a scale in the model's dtype."""
    spec, source = pair
    found = [
        _codes(spec, *shape),
        TensorInfo("weight_scale", kinds.scale_text(spec, model), _stored_shapes(spec, shape)[0]),
    ]
    if spec.is_two_level:
        found.append(TensorInfo("weight_scale_2", "F32", ()))
    if source is not None and source.is_static:
        found.append(TensorInfo("input_scale", "F32", ()))
    return [TensorInfo(f"{module}.{info.name}", info.dtype, info.shape) for info in found]


def _stored_shapes(spec: TensorSpec, shape: tuple[int, int]) -> list[tuple[int, ...]]:
    """Returns the shapes that a stored scale may have; the first is what ModelOpt writes."""
    usual = shared.scale_shape(spec, shape)
    match spec.granularity:
        case PerChannel():
            return [usual[:1], usual]
        case PerTile():
            return [(usual[0], 1, usual[1], 1), usual, *([()] if usual == (1, 1) else [])]
    return [usual]


def _projections(attention: Attention) -> dict[str, str]:
    """Returns the modules that the scales of a cache stand beside, by kind."""
    both = {"k": attention.k_proj, "v": attention.v_proj}
    return {kind: module for kind, module in both.items() if kind in attention.specs}


# --- reading -------------------------------------------------------------------------------------------------------


def _stored(module: str, algo: Algo, headers: Mapping[str, HeaderLike], static: bool) -> StoredTarget:
    """Returns a weight; `static`: the checkpoint holds scales of inputs, so that this one needs its own."""
    weight, scale = shared.header(headers, f"{module}.weight"), shared.header(headers, f"{module}.weight_scale")
    stored = shared.rows_and_columns(module, weight)
    of_weight, of_input = algo.kinds
    spec = kinds.weight_spec(of_weight, kinds.scale_dtype("float", scale.dtype), algo.group)
    source = kinds.input_spec(of_input, group=algo.group)
    if source is not None and source.is_static and not static:
        source = None
    if algo.group is not None and spec.group_size != algo.group:
        spec = replace(spec, granularity=PerGroup(algo.group))
    shape = _shape(spec, *stored)
    others = _stored_shapes(spec, shape)
    wanted = _layout(module, (spec, source), shape, scale.dtype)
    if tuple(scale.shape) in others:
        wanted[1] = wanted[1]._replace(shape=tuple(scale.shape))
    names = shared.check_headers(wanted, headers)
    # Older exports store the one where weights alone are quantized; the other is no factor of whole numbers.
    passed = (f"{module}.{leaf}" for leaf in ("input_scale", "weight_scale_2"))
    names = (*names, *(name for name in passed if name in headers and name not in names))
    columns = f"{module}.{_COLUMNS}"
    if columns not in headers:
        return StoredTarget(module, spec, source, shape, names)
    shared.check_headers([TensorInfo(columns, "BF16", shape[1:])], headers)
    return StoredTarget(module, spec, source, shape, (*names, columns), columns=columns)


def _shape(spec: TensorSpec, rows: int, cols: int) -> tuple[int, int]:
    """Returns the shape of a weight from that of its codes."""
    if spec.format.bits == 8:
        return rows, cols
    return (rows, cols * 2) if _is_fp4(spec) else (rows * 2, cols)


def _stored_attention(headers: Mapping[str, HeaderLike]) -> Iterator[tuple[str, StoredAttention]]:
    """Yields the attention modules by their k projections. A cache without any scale is cast, by a scale of one."""
    modules = [name.removesuffix(".k_proj.weight") for name in headers if name.endswith(".k_proj.weight")]
    static = kinds.input_spec("fp8 static")
    assert static is not None
    calibrated = any(name.endswith(".k_proj.k_scale") for name in headers)
    for module in modules:
        if not calibrated:
            yield module, StoredAttention(module, dict.fromkeys(_CACHE, _CAST_CACHE), {})
            continue
        infos = [TensorInfo(f"{module}.{kind}_proj.{kind}_scale", "F32", ()) for kind in _CACHE]
        names = shared.check_headers(infos, headers)
        yield module, StoredAttention(module, dict.fromkeys(_CACHE, static), dict(zip(_CACHE, names, strict=True)))


WRITER = ModelOpt()
