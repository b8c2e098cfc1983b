"""The compressed-tensors dialect: what llm-compressor writes and vLLM and transformers read.

Layouts and config as in compressed-tensors 0.20 (`compressors/*`, `quantization/quant_args.py`). What loads where was
tried with transformers 5.23 and read in vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quarkcli.dialects import _shared as shared
from quarkcli.dialects._ct_arguments import KV_CACHE, read_input, read_weight, scheme_group
from quarkcli.dialects._patterns import exact_patterns, ignored, matches_name
from quarkcli.dialects._shared import Kinds, Pair
from quarkcli.dialects.base import HeaderLike, StoredAttention, StoredTarget, StoredView, TensorInfo
from quarkcli.errors import ModelError
from quarkcli.plan.model import Attention, Plan, Target
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized

# The release whose config this is; readers only show it.
_VERSION = "0.20.0"
_CONFIG_CLASS = "Linear"

_FP8_INPUTS = ("none", "fp8 static", "fp8 token", "fp8 tensor")
_INT8_INPUTS = ("int8 static", "int8 token")
_HOLDS: frozenset[Kinds] = frozenset(
    [(f"fp8 {where}", source) for where in ("tensor", "channel") for source in _FP8_INPUTS]
    + [(f"int8 {where}", source) for where in ("tensor", "channel") for source in ("none", *_INT8_INPUTS)]
    + [("int4 group", "none"), ("int4 channel", "none")]
    + [("mxfp4", source) for source in ("none", "mxfp4", "fp8 token")]
    + [("nvfp4", source) for source in ("none", "nvfp4")]
)
# vLLM reads integers without a quantized input from the packed form only, which has no scale per tensor.
_VLLM = _HOLDS - {("int8 tensor", "none")}
_VLLM_EXPERTS: frozenset[Kinds] = frozenset(
    {("fp8 tensor", "fp8 static"), ("fp8 channel", "fp8 token"), ("int8 channel", "int8 token")}
    | {("int8 channel", "none"), ("int4 group", "none"), ("int4 channel", "none")}
    | {("mxfp4", "none"), ("mxfp4", "mxfp4"), ("mxfp4", "fp8 token"), ("nvfp4", "none"), ("nvfp4", "nvfp4")}
)
# transformers decodes per-expert tensors while it fuses them. It has no place for a static input scale there (an
# unexpected key), forgets the global scale of nvfp4 (silently wrong), and only unpacks `weight_packed`.
_TRANSFORMERS_EXPERTS: frozenset[Kinds] = frozenset(
    [(f"fp8 {where}", source) for where in ("tensor", "channel") for source in ("none", "fp8 token", "fp8 tensor")]
    + [("int4 group", "none"), ("int4 channel", "none"), ("int8 channel", "none")]
    + [("mxfp4", source) for source in ("none", "mxfp4", "fp8 token")]
)


class CompressedTensors:
    """See `quarkcli.dialects.base.Dialect`."""

    name = "compressed-tensors"
    quant_method = "compressed-tensors"

    def refusals(self, plan: Plan) -> list[str]:
        """Why the plan cannot be held. Packed integers fill whole 32-bit words along the input."""
        found = shared.refusals(plan, self.name, _HOLDS)
        for pair, targets in shared.pairs(plan).items():
            if _format(pair) != "pack-quantized":
                continue
            per_word = 32 // pair[0].format.bits
            found += [
                f"{t.name}: {t.shape[1]} input features do not fill 32-bit words of {per_word} {pair[0].element} codes"
                for t in targets
                if t.shape[1] % per_word
            ]
        return found

    def loaders(self, plan: Plan) -> set[str]:
        if self.refusals(plan):
            return set()
        found = set()
        if shared.vllm_loads(plan, _VLLM, _VLLM_EXPERTS):
            found.add("vllm")
        if _transformers_loads(plan):
            found.add("transformers")
        return found

    def infos(self, target: Target) -> list[TensorInfo]:
        assert target.weight is not None
        return _layout(target.name, (target.weight, target.input), target.shape, target.dtype)

    def attention_infos(self, attention: Attention) -> list[TensorInfo]:
        return [TensorInfo(f"{attention.name}.{kind}_scale", "F32", (1,)) for kind in shared.cache_kinds(attention)]

    def tensors(self, target: Target, quantized: Quantized, input_scale: Tensor | None) -> dict[str, Tensor]:
        """Names and layout as in `infos`. Raises ValueError when a static input has no scale."""
        import torch

        assert target.weight is not None
        codes, params = quantized.codes, quantized.params
        pair = (target.weight, target.input)
        out: dict[str, Tensor] = {}
        format_ = _format(pair)
        scale = params.scale.reshape(1) if params.scale.dim() == 0 else params.scale
        out["weight" if _unpacked(format_) else "weight_packed"] = _pack(codes, format_, target.weight)
        out["weight_scale"] = scale.contiguous()
        if format_ == "pack-quantized":
            out["weight_shape"] = torch.tensor(target.shape, dtype=torch.int64)
        if params.global_scale is not None:
            out["weight_global_scale"] = params.global_scale.reshape(1).reciprocal()
        suffix = _input_suffix(target.input)
        if suffix is not None:
            if input_scale is None:
                raise ValueError(f"{target.name} has a static input but no input scale was given")
            stored = input_scale.to(torch.float32).reshape(1)
            out[suffix] = stored.reciprocal() if suffix == "input_global_scale" else stored.clone()
        return {f"{target.name}.{suffix}": tensor for suffix, tensor in out.items()}

    def attention_tensors(self, attention: Attention, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{attention.name}.{kind}_scale": scales[kind].float().reshape(1).clone()
            for kind in shared.cache_kinds(attention)
        }

    def config(self, plan: Plan) -> dict[str, Any]:
        groups = _ordered_groups(plan)
        formats = {_format(pair) for pair in groups}
        universe = [*plan.targets, *shared.tied_head(plan)]
        quantized = [target.name for target in plan.quantized()]
        config: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "quantization_status": "compressed",
            "version": _VERSION,
            "config_groups": {
                f"group_{index}": scheme_group(pair, _format(pair), _targets(targets, universe, alone=len(groups) == 1))
                for index, (pair, targets) in enumerate(groups.items())
            },
            "ignore": [*ignored(shared.unquantized(plan), universe, quantized), *shared.tied_head(plan)],
            "kv_cache_scheme": KV_CACHE if shared.cached(plan) else None,
        }
        return config

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """Raises ModelError for a scheme that is not held here, and for tensors that do not fit the config."""
        found = StoredView()
        ignore = config.get("ignore") or []
        groups = list((config.get("config_groups") or {}).values())
        for module in shared.quantized_modules(headers):
            if matches_name(module, ignore):
                raise ModelError("it has a weight_scale, but the quantization config ignores it", where=module)
            found.targets[module] = _stored(module, _group_of(module, groups), headers)
        if config.get("kv_cache_scheme"):
            found.attention = _stored_attention(config["kv_cache_scheme"], headers)
        return found

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> tuple[Quantized, Tensor | None]:
        from quarkcli.numerics.quantize import QParams, Quantized

        local = {name.removeprefix(stored.name + "."): tensors[name] for name in stored.tensors}
        format_ = _format((stored.weight, stored.input))
        codes = _unpack(local["weight" if _unpacked(format_) else "weight_packed"], format_, stored.weight)
        scale = local["weight_scale"]
        if shared.weight_kind(stored.weight) in ("fp8 tensor", "int8 tensor"):
            scale = scale.reshape(())
        outer = local.get("weight_global_scale")
        params = QParams(scale, None if outer is None else outer.float().reshape(()).reciprocal())
        suffix = _input_suffix(stored.input)
        if suffix is None:
            return Quantized(codes, params), None
        value = local[suffix].float().reshape(())
        return Quantized(codes, params), value.reciprocal() if suffix == "input_global_scale" else value

    def decode_attention(self, stored: StoredAttention, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {kind: tensors[name].float().reshape(()) for kind, name in stored.scales.items()}


# --- tensors -------------------------------------------------------------------------------------------------------


def _format(pair: Pair) -> str:
    """The compressor's name for a pair that is held."""
    kind = shared.weight_kind(pair[0]) or ""
    if kind in ("mxfp4", "nvfp4"):
        return f"{kind}-pack-quantized"
    if kind.startswith("fp8"):
        return "float-quantized"
    if kind == "int8 tensor" or (kind == "int8 channel" and pair[1] is not None):
        return "int-quantized"
    return "pack-quantized"


def _unpacked(format_: str) -> bool:
    return format_ in ("float-quantized", "int-quantized")


def _pack(codes: Tensor, format_: str, spec: TensorSpec) -> Tensor:
    from quarkcli.numerics.packing import pack_int32, pack_nibbles

    if _unpacked(format_):
        return codes.contiguous()
    return pack_int32(codes, spec.format.bits) if format_ == "pack-quantized" else pack_nibbles(codes)


def _unpack(packed: Tensor, format_: str, spec: TensorSpec) -> Tensor:
    from quarkcli.numerics.packing import unpack_int32, unpack_nibbles

    if _unpacked(format_):
        return packed
    return unpack_int32(packed, spec.format.bits) if format_ == "pack-quantized" else unpack_nibbles(packed)


def _layout(name: str, pair: Pair, shape: tuple[int, int], model: str) -> list[TensorInfo]:
    """The tensors of a module of `shape` [out, in]; `model` is the dtype that a scale in the model's dtype has."""
    spec, source = pair
    rows, cols = shape
    format_ = _format(pair)
    weight = {
        "float-quantized": ("weight", "F8_E4M3", cols),
        "int-quantized": ("weight", "I8", cols),
        "pack-quantized": ("weight_packed", "I32", cols * spec.format.bits // 32),
    }.get(format_, ("weight_packed", "U8", cols // 2))
    found = [
        TensorInfo(weight[0], weight[1], (rows, weight[2])),
        TensorInfo("weight_scale", shared.scale_text(spec, model), _scale_shape(spec, rows, cols)),
    ]
    if format_ == "pack-quantized":
        found.append(TensorInfo("weight_shape", "I64", (2,)))
    if spec.scale.over is not None:
        found.append(TensorInfo("weight_global_scale", "F32", (1,)))
    suffix = _input_suffix(source)
    if suffix is not None:
        found.append(TensorInfo(suffix, "F32", (1,)))
    return [TensorInfo(f"{name}.{info.name}", info.dtype, info.shape) for info in found]


def _scale_shape(spec: TensorSpec, rows: int, cols: int) -> tuple[int, ...]:
    kind = shared.weight_kind(spec) or ""
    if kind.endswith("tensor"):
        return (1,)
    return (rows, cols // spec.group_size if spec.group_size else 1)


def _input_suffix(source: TensorSpec | None) -> str | None:
    """The name of the stored input scale; global scales are stored as divisors."""
    kind = shared.input_kind(source) or ""
    return "input_global_scale" if kind == "nvfp4" else "input_scale" if kind.endswith("static") else None


# --- config --------------------------------------------------------------------------------------------------------


def _ordered_groups(plan: Plan) -> dict[Pair, list[Target]]:
    """Pairs with their targets. The one transformers must take for the experts' comes first.

    It takes the first group with a `re:` target about experts, else the first with another target. Unquantized
    experts survive only under an fp8 scheme, which leaves weights without a scale alone; other schemes drop them.
    """
    found = shared.pairs(plan)

    def rank(pair: Pair) -> int:
        if any(target.expert for target in found[pair]):
            return 0
        return 1 if (shared.weight_kind(pair[0]) or "").startswith("fp8") else 2

    return {pair: found[pair] for pair in sorted(found, key=rank)}


def _targets(targets: list[Target], universe: Iterable[str], *, alone: bool) -> list[str]:
    """`Linear` when one group covers everything; else names, with patterns for experts only.

    vLLM renames full names for models whose modules it calls otherwise, so names are kept where they are few. Its
    head is not a `Linear`, so it is named.
    """
    if alone:
        return [_CONFIG_CLASS, *(target.name for target in targets if target.role == "head")]
    return exact_patterns(targets, universe)


# --- what loads it -------------------------------------------------------------------------------------------------


def _transformers_loads(plan: Plan) -> bool:
    """True when transformers 5.23 loads the checkpoint with no missing and no unexpected keys.

    Linears load in every scheme. Experts are fused in memory by conversions that know one scheme for all of them, and
    that exist for families whose published files have one tensor per expert.
    """
    experts = [target for target in plan.targets.values() if target.expert is not None]
    quantized = [target for target in experts if target.weight is not None]
    if shared.quantizes_routers(plan) or any(target.view.expert is not None for target in quantized):
        return False
    kinds = {shared.kinds_of(pair) for target in quantized if (pair := shared.pair_of(target))}
    left = [target for target in experts if target.weight is None and target.view.expert is None]
    if not quantized:
        return not left or _first_is_fp8(plan)
    if len({shared.pair_of(target) for target in quantized}) > 1 or not kinds <= _TRANSFORMERS_EXPERTS:
        return False
    return not left or _first_is_fp8(plan)


def _first_is_fp8(plan: Plan) -> bool:
    """True when nothing but the cache is quantized, or the first config group is an fp8 one."""
    first = next(iter(_ordered_groups(plan)), None)
    return first is None or (shared.weight_kind(first[0]) or "").startswith("fp8")


# --- reading -------------------------------------------------------------------------------------------------------


def _group_of(module: str, groups: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The group of a module: by full name, else by pattern, else by class."""

    def patterns(targets: list[str]) -> list[str]:
        return [target for target in targets if target.startswith("re:")]

    for fits in (
        lambda targets: module in targets,
        lambda targets: matches_name(module, patterns(targets)),
        lambda targets: _CONFIG_CLASS in targets,
    ):
        for group in groups:
            if fits(group.get("targets") or []):
                return group
    raise ModelError("it has a weight_scale, but no group of the quantization config targets it", where=module)


def _stored(module: str, group: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredTarget:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    scale = shared.header(headers, f"{module}.weight_scale")
    spec = read_weight(module, weights, scale.dtype)
    source = shared.input_spec(read_input(module, inputs)) if inputs else None
    packed = f"{module}.weight_packed" in headers
    weight = shared.header(headers, f"{module}.weight_packed" if packed else f"{module}.weight")
    if len(weight.shape) != 2:
        raise ModelError(f"a quantized weight of shape {list(weight.shape)} is not a matrix", where=module)
    codes_per_cell = 1 if not packed else 2 if weight.dtype == "U8" else 32 // spec.format.bits
    shape = (weight.shape[0], weight.shape[1] * codes_per_cell)
    names = shared.check_headers(_layout(module, (spec, source), shape, scale.dtype), headers)
    return StoredTarget(module, spec, source, shape, names)


def _stored_attention(scheme: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> dict[str, StoredAttention]:
    if (scheme.get("type"), scheme.get("num_bits"), scheme.get("strategy") or "tensor") != ("float", 8, "tensor"):
        raise ModelError("only a cache of 8-bit floats with one scale per tensor is read", where="kv_cache_scheme")
    spec = shared.input_spec("fp8 static")
    assert spec is not None
    found = {}
    for name in headers:
        module = name.removesuffix(".k_scale")
        if module == name:
            continue
        wanted = [TensorInfo(f"{module}.{kind}_scale", "F32", (1,)) for kind in ("k", "v")]
        names = shared.check_headers(wanted, headers)
        found[module] = StoredAttention(module, {"k": spec, "v": spec}, dict(zip("kv", names, strict=True)))
    return found


DIALECT = CompressedTensors()
