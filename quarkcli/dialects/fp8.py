"""The fp8 dialect: 8-bit floats as DeepSeek-V3 was published, and as transformers and vLLM know them by that name.

A whole model has one scheme: a scale per tensor, or `weight_scale_inv` of tiles, which is a multiplier all the same.
Scales of rows, of any tiles, and of experts in one tensor are read as well. vLLM's loader (0.32) was tried, and that of
transformers 5.23, which knows tiles alone, and none that end within a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects import _sglang as sglang
from quarkcli.dialects import _shared as shared
from quarkcli.dialects._documents import Fp8Config
from quarkcli.dialects._kinds import Kinds
from quarkcli.dialects.base import (
    Classes,
    Decoded,
    Reader,
    StoredAttention,
    StoredTarget,
    StoredView,
    TensorInfo,
    Writer,
)
from quarkcli.documents.shape import check
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike, WeightView
from quarkcli.plan.model import Attention, Plan, QuantizedTarget, Target
from quarkcli.spec import Granularity, PerChannel, PerGroup, PerTensor, PerTile, ScaleSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized

NAME = "fp8"
_CODES = "F8_E4M3"
_FORMATS = (None, "e4m3", "float8_e4m3fn")
_STATIC, _DYNAMIC = "static", "dynamic"

# Under `dynamic` inputs have a scale per token, as vLLM's and transformers' kernels take it.
_TENSOR_STATIC: Kinds = ("fp8 tensor", "fp8 static")
_TENSOR_TOKEN: Kinds = ("fp8 tensor", "fp8 token")
_TILES: Kinds = ("fp8 tile", "fp8 group")
_HOLDS = frozenset({_TENSOR_STATIC, _TENSOR_TOKEN, _TILES})
# Experts with dynamic inputs have one scale for all tokens there.
_VLLM_EXPERTS = frozenset({_TENSOR_STATIC, _TILES})

_SCALES = (".weight_scale_inv", ".weight_scale")
_INPUT_SCALES = ("input_scale", "activation_scale")
_FUSED_SCALE = "_scale_inv"
_CACHE = "kv"
_CACHE_SCALES = (".{kind}_scale", ".{kind}_proj.{kind}_scale", ".{kind}_proj.output_scale")


class Fp8Reader(Reader):
    name = NAME
    quant_method = NAME
    lists = ("ignored_layers", "modules_to_not_convert")
    unlisted = frozenset({"embedding", "head"})

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """Returns the view of a checkpoint. Raises ModelError for tensors that do not fit the config."""
        check(Fp8Config, config, "quantization_config")
        scheme = _Scheme(config)
        left = {*(config.get("ignored_layers") or ()), *(config.get("modules_to_not_convert") or ())}
        targets: dict[str, StoredTarget] = {}
        for name in headers:
            found = next((name.removesuffix(end) for end in _SCALES if name.endswith(end)), None)
            if found is not None:
                if found in left:
                    raise ModelError(
                        "it has a scale, but the quantization config excludes it",
                        where=found,
                        kind="E-SOURCE-CONTRADICTS",
                    )
                targets[found] = _stored(found, name, scheme, headers)
            elif name.endswith(tuple(f".{leaf}{_FUSED_SCALE}" for leaf in shared.FUSED_EXPERTS)):
                targets |= {stored.name: stored for stored in _experts(name, scheme, headers)}
        return StoredView(targets, _stored_attention(headers))

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> Decoded:
        import torch

        from quarkcli.numerics.quantize import QParams, Quantized

        local = stored.own(tensors)
        scale = next(local[name] for name in ("weight_scale_inv", "weight_scale") if name in local)
        scale = scale.contiguous().reshape(shared.scale_shape(stored.weight, stored.shape))
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.view(torch.uint8)
        static = None
        if stored.input is not None and stored.input.is_static:
            static = next(local[name] for name in _INPUT_SCALES if name in local).float().reshape(())
        return Decoded(Quantized(local["weight"].contiguous(), QParams(scale)), static)


READER = Fp8Reader()


def _sglang_faults(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Returns what SGLang does not load besides: scales of tiles, which the loader of Llama renames and passes over."""
    if not config.get("weight_block_size") or plan.architecture not in sglang.RENAMES_TILES:
        return []
    return [f"its class of {plan.architecture} looks for weight_scale, passes over weight_scale_inv and goes on"]


_SGLANG = Classes(_HOLDS, _HOLDS, "Fp8Config, Fp8LinearMethod in layers/quantization/fp8.py", faults=_sglang_faults)


class Fp8(Writer):
    name = NAME
    reader = READER
    classes: ClassVar[Mapping[str, Classes]] = {
        sglang.NAME: _SGLANG,
        # It takes a scale per tensor for tiles, and quantizes inputs in groups whatever the config says.
        "tensorrt-llm": Classes(
            frozenset({_TILES}),
            frozenset({_TILES}),
            "ModelConfig.load_hf_quant_config in tensorrt_llm/_torch/model_config.py",
        ),
    }

    def refusals(self, plan: Plan) -> list[str]:
        found = shared.refusals(plan, NAME, _HOLDS)
        runs = list(plan.quantized_alike())
        if not runs:
            return [*found, f"{NAME} has no scheme for a model without quantized weights"]
        first = kinds.kinds_of(shared.pair_of(runs[0][0]))
        what = f"{NAME} has one scheme for all weights, and {runs[0][0].name} has another one"
        others = [run for run in runs if kinds.kinds_of(shared.pair_of(run[0])) != first]
        names = [target.name for run in others for target in run]
        return [*found, *shared.sentences({what: names} if names else {})]

    def loaders(self, plan: Plan) -> set[str]:
        if self.refusals(plan):
            return set()
        found = set()
        runs = [run[0] for run in plan.quantized_alike()]
        heads = any(target.role == "head" for target in runs)
        if shared.vllm_loads(plan, _HOLDS, _VLLM_EXPERTS) and shared.tiles_fit(plan) and not heads:
            found.add("vllm")
        foreign = bool(shared.cached(plan)) or shared.own_code(plan) or bool(shared.joined(plan))
        if not foreign and not heads and all(map(_transformers_decodes, runs)):
            found.add("transformers")
        return found

    def infos(self, target: QuantizedTarget) -> list[TensorInfo]:
        tiles = isinstance(target.weight.granularity, PerTile)
        scale = f"{target.name}.{'weight_scale_inv' if tiles else 'weight_scale'}"
        shape = shared.scale_shape(target.weight, target.shape)
        found = [
            TensorInfo(f"{target.name}.weight", _CODES, target.shape),
            TensorInfo(scale, kinds.scale_text(target.weight, target.dtype), shape),
        ]
        if target.input is not None and target.input.is_static:
            found.append(TensorInfo(f"{target.name}.input_scale", "F32", ()))
        return found

    def attention_infos(self, attention: Attention) -> list[TensorInfo]:
        return [TensorInfo(f"{attention.name}.{kind}_scale", "F32", ()) for kind in _CACHE if kind in attention.specs]

    def tensors(
        self, target: QuantizedTarget, quantized: Quantized, static: Mapping[str, Tensor], bias: Quantized | None = None
    ) -> dict[str, Tensor]:
        """Returns tensors with the names and layout of `infos`. Raises ValueError when a static input has no scale."""
        assert quantized.params.scale is not None
        found = [quantized.codes.contiguous(), quantized.params.scale.contiguous()]
        if target.input is not None and target.input.is_static:
            found.append(shared.static_scale(target, "input", static).reshape(()).clone())
        return {info.name: tensor for info, tensor in zip(self.infos(target), found, strict=True)}

    def attention_tensors(self, attention: Attention, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kinds_ = [kind for kind in _CACHE if kind in attention.specs]
        return {f"{attention.name}.{kind}_scale": scales[kind].float().reshape(()).clone() for kind in kinds_}

    def config(self, plan: Plan) -> dict[str, Any]:
        first = next(plan.quantized())
        static = first.input is not None and first.input.is_static
        where = first.weight.granularity
        return {
            "quant_method": NAME,
            "fmt": "e4m3",
            "activation_scheme": _STATIC if static else _DYNAMIC,
            # transformers takes a key that is absent for tiles of 128.
            "weight_block_size": [where.rows, where.cols] if isinstance(where, PerTile) else None,
            "modules_to_not_convert": _left_out(plan),
        }


def _left_out(plan: Plan) -> list[str]:
    """Returns names of unquantized linears; that of the list where none of a layer's experts is quantized."""
    left = shared.unquantized(plan)
    whole = shared.whole_layers(plan, left)
    return [*dict.fromkeys(whole.get(target.name, target.name) for target in left), *shared.further(plan)]


def _transformers_decodes(target: Target) -> bool:
    """True for a linear of whole tiles; it tells their size from the shape of the scales."""
    where = target.weight.granularity if target.weight is not None else None
    whole = isinstance(where, PerTile) and not (target.shape[0] % where.rows or target.shape[1] % where.cols)
    return whole and target.expert is None and target.role != "router"


# --- reading -------------------------------------------------------------------------------------------------------


class _Scheme:
    """The scheme of a checkpoint, from its config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        form, activations = config.get("fmt"), config.get("activation_scheme") or _DYNAMIC
        if form not in _FORMATS:
            raise ModelError(
                f"this version cannot read fmt {form!r}", where="quantization_config", kind="E-SOURCE-FORMAT"
            )
        if activations not in (_STATIC, _DYNAMIC):
            raise ModelError(
                f"activation_scheme {activations!r} is unknown", where="quantization_config", kind="E-SOURCE-CONFIG"
            )
        block = config.get("weight_block_size")
        if block is not None and (len(block) != 2 or min(block) < 1):
            what = f"weight_block_size must be two sizes, not {block}"
            raise ModelError(what, where="quantization_config", kind="E-SOURCE-CONFIG")
        self.tile = None if block is None else PerTile(*block)
        self.static = activations == _STATIC

    def granularity(self, shape: tuple[int, int], scale: HeaderLike) -> Granularity:
        """Returns what a scale of a weight of `shape` is for. Without a tile, its shape says it."""
        if self.tile is not None:
            return self.tile
        if tuple(scale.shape) in ((), (1,)):
            return PerTensor()
        usual = kinds.TILE
        grid = (-(-shape[0] // usual.rows), -(-shape[1] // usual.cols))
        rows = tuple(scale.shape) in ((shape[0],), (shape[0], 1))
        return PerChannel(0) if rows or tuple(scale.shape) != grid else usual

    def specs(self, where: Granularity, scale: HeaderLike) -> tuple[TensorSpec, TensorSpec | None]:
        """Returns the specs of weight and input."""
        powers = scale.dtype in ("F8_E8M0", "U8")
        dtype = ScaleSpec("e8m0", "rceil") if powers else ScaleSpec(kinds.scale_dtype("float", scale.dtype))
        weight = TensorSpec("fp8_e4m3", where, dtype)
        if isinstance(where, PerTile):
            given = ScaleSpec("f32", "absmax", "dynamic")
            return weight, TensorSpec("fp8_e4m3", PerGroup(where.cols), given)
        return weight, kinds.input_spec("fp8 static" if self.static else "fp8 token")


def _stored(module: str, scale_name: str, scheme: _Scheme, headers: Mapping[str, HeaderLike]) -> StoredTarget:
    weight, scale = shared.header(headers, f"{module}.weight"), shared.header(headers, scale_name)
    shape = shared.rows_and_columns(module, weight)
    where = scheme.granularity(shape, scale)
    spec, source = scheme.specs(where, scale)
    wanted = [TensorInfo(f"{module}.weight", _CODES, shape), _scale_info(scale_name, spec, shape, scale)]
    if source is not None and source.is_static:
        names = [f"{module}.{name}" for name in _INPUT_SCALES]
        wanted.append(TensorInfo(next((name for name in names if name in headers), names[0]), "F32", ()))
    return StoredTarget(module, spec, source, shape, shared.check_headers(wanted, headers))


def _scale_info(name: str, spec: TensorSpec, shape: tuple[int, int], found: HeaderLike) -> TensorInfo:
    """Returns the scale that a weight needs. Those of rows may be stored with one axis."""
    usual = shared.scale_shape(spec, shape)
    flat = isinstance(spec.granularity, PerChannel) and tuple(found.shape) == usual[:1]
    return TensorInfo(name, found.dtype, usual[:1] if flat else usual)


def _experts(scale_name: str, scheme: _Scheme, headers: Mapping[str, HeaderLike]) -> Iterator[StoredTarget]:
    """Yields the weights of the experts of one tensor [experts, out, in] with tiles."""
    tensor = scale_name.removesuffix(_FUSED_SCALE)
    prefix, _, leaf = tensor.rpartition(".")
    weight, scale = shared.header(headers, tensor), shared.header(headers, scale_name)
    if len(weight.shape) != 3 or scheme.tile is None:
        raise ModelError(
            "this version can read experts in one tensor only with weight_block_size",
            where=tensor,
            kind="E-SOURCE-FORMAT",
        )
    count, rows, cols = weight.shape
    projections = shared.FUSED_EXPERTS[leaf]  # one after the other along the output
    shape = (rows // len(projections), cols)
    spec, source = scheme.specs(scheme.tile, scale)
    grid = shared.scale_shape(spec, shape)
    if rows % len(projections) or (len(projections) > 1 and shape[0] % scheme.tile.rows):
        what = f"the {len(projections)} projections of {rows} rows do not end with tiles of {scheme.tile.rows} rows"
        raise ModelError(what, where=tensor, kind="E-SOURCE-CONTRADICTS")
    names = shared.check_headers(
        [
            TensorInfo(tensor, _CODES, (count, rows, cols)),
            TensorInfo(scale_name, scale.dtype, (count, grid[0] * len(projections), grid[1])),
        ],
        headers,
    )
    for expert in range(count):
        for index, projection in enumerate(projections):
            name = f"{prefix}.{expert}.{projection}"
            places = {
                "weight": WeightView(tensor, expert, rows=(index * shape[0], (index + 1) * shape[0], 1)),
                "weight_scale_inv": WeightView(scale_name, expert, rows=(index * grid[0], (index + 1) * grid[0], 1)),
            }
            yield StoredTarget(name, spec, source, shape, names, places=places)


def _stored_attention(headers: Mapping[str, HeaderLike]) -> dict[str, StoredAttention]:
    """Returns the attention modules that scales of a cache stand in or under."""
    static = kinds.input_spec("fp8 static")
    assert static is not None
    found: dict[str, StoredAttention] = {}
    for end in _CACHE_SCALES:
        first = end.format(kind="k")
        for name in headers:
            module = name.removesuffix(first)
            if module == name or module in found or name.endswith(f"_proj{first}"):
                continue
            infos = [TensorInfo(module + end.format(kind=kind), "F32", ()) for kind in _CACHE]
            names = shared.check_headers(infos, headers)
            scales = dict(zip(_CACHE, names, strict=True))
            found[module] = StoredAttention(module, dict.fromkeys(_CACHE, static), scales)
    return found


WRITER = Fp8()
