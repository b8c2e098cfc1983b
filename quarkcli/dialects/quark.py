"""The quark dialect: what AMD Quark writes and vLLM reads.

Layouts as in exports of amd-quark 0.13; what loads where as tried with vLLM 0.32 and transformers 5.23 (which needs
the amd-quark package to read it).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quarkcli.dialects import _shared as shared
from quarkcli.dialects._quark_specs import layer, read_input, read_weight
from quarkcli.dialects._shared import Kinds, Pair
from quarkcli.dialects.base import HeaderLike, StoredAttention, StoredTarget, StoredView, TensorInfo
from quarkcli.errors import ModelError
from quarkcli.plan.model import Attention, Plan, Target
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized

# The release whose layout this is; readers only show it.
_VERSION = "0.13"
_PACK_METHOD = "reorder"
_KV_NAMES = {"k": "k_proj", "v": "v_proj"}

_FP8_INPUTS = ("none", "fp8 static", "fp8 token", "fp8 tensor")
_HOLDS: frozenset[Kinds] = frozenset(
    [(f"fp8 {where}", source) for where in ("tensor", "channel") for source in _FP8_INPUTS]
    + [(f"int8 {where}", source) for where in ("tensor", "channel") for source in ("none", "int8 static", "int8 token")]
    + [("int4 group", "none")]
    + [("mxfp4", source) for source in ("none", "mxfp4", "fp8 static")]
    + [("nvfp4", source) for source in ("none", "nvfp4")]
)
# vLLM has no weight-only class for fp8, int8 and nvfp4 in this dialect.
_WEIGHT_ONLY = ("int4 group", "mxfp4")
_VLLM: frozenset[Kinds] = frozenset(kinds for kinds in _HOLDS if kinds[1] != "none" or kinds[0] in _WEIGHT_ONLY)
_VLLM_EXPERTS = _VLLM - {
    ("fp8 channel", "fp8 static"),
    ("fp8 channel", "fp8 tensor"),
    ("fp8 tensor", "fp8 token"),
}


class Quark:
    """See `quarkcli.dialects.base.Dialect`."""

    name = "quark"
    quant_method = "quark"

    def refusals(self, plan: Plan) -> list[str]:
        """Why the plan cannot be held. Integers are packed eight to a word along the output."""
        found = shared.refusals(plan, self.name, _HOLDS)
        found += [
            f"{target.name}: {target.shape[0]} output features are not a multiple of 8, and {self.name} packs "
            f"eight int4 codes of them into a word ({target.weight.describe()})"
            for target in plan.quantized()
            if target.weight is not None and _is_int4(target.weight) and target.shape[0] % 8
        ]
        for attention in shared.cached(plan):
            found += [
                f"{attention.name}: {self.name} stores the cache scale of {kind} on a {leaf}; here it is {module}"
                for kind, leaf, module in (("k", "k_proj", attention.k_proj), ("v", "v_proj", attention.v_proj))
                if module.rsplit(".", 1)[-1] != leaf
            ]
        return found

    def loaders(self, plan: Plan) -> set[str]:
        if self.refusals(plan):
            return set()
        found = set()
        # vLLM's head is never a quantized one here.
        head = any(target.role == "head" for target in plan.quantized())
        if not head and shared.vllm_loads(plan, _VLLM, _VLLM_EXPERTS):
            found.add("vllm")
        if _transformers_loads(plan):
            found.add("transformers")
        return found

    def infos(self, target: Target) -> list[TensorInfo]:
        assert target.weight is not None
        return _layout(target.name, (target.weight, target.input), target.shape, target.dtype)

    def attention_infos(self, attention: Attention) -> list[TensorInfo]:
        return [TensorInfo(name, "F32", ()) for name in _scale_names(attention).values()]

    def tensors(self, target: Target, quantized: Quantized, input_scale: Tensor | None) -> dict[str, Tensor]:
        """Names and layout as in `infos`. Raises ValueError when a static input has no scale."""
        import torch

        assert target.weight is not None
        kind = shared.weight_kind(target.weight) or ""
        params = quantized.params
        out = {"weight": _pack(quantized.codes, kind), "weight_scale": _stored_scale(params.scale, kind)}
        if kind.startswith("int4"):
            rows, columns = out["weight_scale"].shape
            out["weight_zero_point"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
        if kind.startswith("int8"):
            out["weight_zero_point"] = torch.zeros(out["weight_scale"].shape, dtype=torch.int8)
        if params.global_scale is not None:
            out["weight_scale_2"] = params.global_scale.clone()
        suffix = _input_suffix(target.input)
        if suffix is not None:
            if input_scale is None:
                raise ValueError(f"{target.name} has a static input but no input scale was given")
            out[suffix] = input_scale.to(torch.float32).reshape(()).clone()
        if suffix == "input_scale" and kind.startswith("int8"):
            out["input_zero_point"] = torch.zeros((), dtype=torch.int8)
        return {f"{target.name}.{suffix}": tensor for suffix, tensor in out.items()}

    def attention_tensors(self, attention: Attention, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: scales[kind].float().reshape(()).clone() for kind, name in _scale_names(attention).items()}

    def config(self, plan: Plan) -> dict[str, Any]:
        cache = _cache_spec(plan)
        layers, everywhere = _layers(plan, cache)
        kv = {f"*{leaf}": layers[f"*{leaf}"] for leaf in _KV_NAMES.values()} if cache else {}
        return {
            "quant_method": self.quant_method,
            "quant_mode": "eager_mode",
            "version": _VERSION,
            "global_quant_config": layer(everywhere),
            "layer_quant_config": layers,
            "layer_type_quant_config": {},
            "kv_cache_quant_config": kv,
            # The scales are measured where the cache is written, after the rotary embedding.
            "kv_cache_post_rope": bool(cache),
            "softmax_quant_spec": None,
            "algo_config": None,
            "exclude": [*_excluded(plan), *shared.tied_head(plan)],
            "export": {
                "kv_cache_group": list(kv),
                "min_kv_scale": 0.0,
                "pack_method": _PACK_METHOD,
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
        }

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """Raises ModelError for a scheme that is not held here, and for tensors that do not fit the config."""
        export = config.get("export") or {}
        if export.get("weight_format", "real_quantized") != "real_quantized":
            raise ModelError(f"weight_format {export['weight_format']!r} holds no codes", where="quantization_config")
        found = StoredView()
        for module in shared.quantized_modules(headers):
            found.targets[module] = _stored(module, config, headers)
            packed = _is_int4(found.targets[module].weight)
            if packed and export.get("pack_method", _PACK_METHOD) != _PACK_METHOD:
                raise ModelError(f"pack_method {export['pack_method']!r} is not read by this version", where=module)
        found.attention = _stored_attention(config, headers)
        return found

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> tuple[Quantized, Tensor | None]:
        from quarkcli.numerics.quantize import QParams, Quantized

        local = {name.removeprefix(stored.name + "."): tensors[name] for name in stored.tensors}
        kind = shared.weight_kind(stored.weight) or ""
        outer = local.get("weight_scale_2")
        params = QParams(_real_scale(local["weight_scale"], kind), None if outer is None else outer.float().reshape(()))
        suffix = _input_suffix(stored.input)
        source = None if suffix is None else local[suffix].float().reshape(())
        return Quantized(_unpack(local["weight"], kind), params), source

    def decode_attention(self, stored: StoredAttention, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {kind: tensors[name].float().reshape(()) for kind, name in stored.scales.items()}


# --- tensors -------------------------------------------------------------------------------------------------------


def _is_int4(spec: TensorSpec) -> bool:
    return (shared.weight_kind(spec) or "").startswith("int4")


def _pack(codes: Tensor, kind: str) -> Tensor:
    from quarkcli.numerics.packing import pack_awq, pack_nibbles

    if kind.startswith("int4"):
        return pack_awq(codes.T.contiguous())
    return pack_nibbles(codes) if kind in ("mxfp4", "nvfp4") else codes.contiguous()


def _unpack(packed: Tensor, kind: str) -> Tensor:
    from quarkcli.numerics.packing import unpack_awq, unpack_nibbles

    if kind.startswith("int4"):
        return unpack_awq(packed).T.contiguous()
    return unpack_nibbles(packed) if kind in ("mxfp4", "nvfp4") else packed


def _stored_scale(scale: Tensor, kind: str) -> Tensor:
    """int4: transposed like the weight; channels: one dimension."""
    if kind.startswith("int4"):
        return scale.T.contiguous()
    return scale.reshape(-1).contiguous() if kind.endswith("channel") else scale.contiguous()


def _real_scale(stored: Tensor, kind: str) -> Tensor:
    if kind.startswith("int4"):
        return stored.T.contiguous()
    if kind.endswith("channel"):
        return stored.reshape(-1, 1)
    return stored.reshape(()) if kind.endswith("tensor") else stored


def _layout(name: str, pair: Pair, shape: tuple[int, int], model: str) -> list[TensorInfo]:
    """The tensors of a module of `shape` [out, in]; `model` is the dtype that a scale in the model's dtype has."""
    spec, source = pair
    kind = shared.weight_kind(spec) or ""
    suffix = _input_suffix(source)
    found = list(_weight_layout(kind, spec, shape, model))
    if suffix is not None:
        found.append((suffix, "F32", ()))
    if suffix == "input_scale" and kind.startswith("int8"):
        found.append(("input_zero_point", "I8", ()))
    return [TensorInfo(f"{name}.{local}", dtype, dimensions) for local, dtype, dimensions in found]


def _weight_layout(
    kind: str, spec: TensorSpec, shape: tuple[int, int], model: str
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    rows, cols = shape
    size = spec.group_size or cols
    scale = shared.scale_text(spec, model)
    if kind.startswith("int4"):
        yield "weight", "I32", (cols, rows // 8)
        yield "weight_scale", scale, (cols // size, rows)
        yield "weight_zero_point", "I32", (cols // size, rows // 8)
    elif kind in ("mxfp4", "nvfp4"):
        yield "weight", "U8", (rows, cols // 2)
        yield "weight_scale", scale, (rows, cols // size)
    else:
        dimensions = (rows,) if kind.endswith("channel") else ()
        yield "weight", "I8" if kind.startswith("int8") else "F8_E4M3", (rows, cols)
        yield "weight_scale", scale, dimensions
        if kind.startswith("int8"):
            yield "weight_zero_point", "I8", dimensions
    if kind == "nvfp4":
        yield "weight_scale_2", "F32", ()


def _input_suffix(source: TensorSpec | None) -> str | None:
    kind = shared.input_kind(source) or ""
    return "input_scale_2" if kind == "nvfp4" else "input_scale" if kind.endswith("static") else None


def _scale_names(attention: Attention) -> dict[str, str]:
    modules = {"k": attention.k_proj, "v": attention.v_proj}
    return {kind: f"{modules[kind]}.output_scale" for kind in shared.cache_kinds(attention)}


# --- config --------------------------------------------------------------------------------------------------------


def _cache_spec(plan: Plan) -> TensorSpec | None:
    return next((shared.enabled(attention.slots)["k"] for attention in shared.cached(plan)), None)


def _layers(plan: Plan, cache: TensorSpec | None) -> tuple[dict[str, Any], Pair | None]:
    """(`layer_quant_config`, the pair of `global_quant_config`): the most frequent pair holds everywhere else.

    vLLM takes the first key that fits, so full names stand before the cache's patterns; and it wants the same
    output in every entry of a k or v projection.
    """
    found = shared.pairs(plan)
    everywhere = max(found, key=lambda pair: len(found[pair]), default=None)
    on_kv = {module for a in shared.cached(plan) for module in (a.k_proj, a.v_proj)} if cache else set()
    usual_kv = _most_common([t for t in plan.quantized() if t.name in on_kv])
    layers: dict[str, Any] = {}
    for pair, targets in found.items():
        dense = [target for target in targets if target.expert is None]
        for target in dense:
            if target.name in on_kv and pair != usual_kv:
                layers[target.name] = layer(pair, cache)
            elif target.name not in on_kv and pair != everywhere:
                layers[target.name] = layer(pair)
        if pair != everywhere:
            layers.update(dict.fromkeys(_expert_keys(targets, plan), layer(pair)))
    if cache is not None:
        layers.update({f"*{leaf}": layer(usual_kv, cache) for leaf in _KV_NAMES.values()})
    return layers, everywhere


def _most_common(targets: list[Target]) -> Pair | None:
    counts: dict[Pair, int] = {}
    for target in targets:
        pair = shared.pair_of(target)
        if pair is not None:
            counts[pair] = counts.get(pair, 0) + 1
    return max(counts, key=lambda pair: counts[pair], default=None)


def _expert_keys(targets: list[Target], plan: Plan) -> list[str]:
    """`<prefix>.*` hides the prefix itself from vLLM's glob, so the key of a layer of experts is `<prefix>*`."""
    everyone = shared.experts_by_layer(plan.targets.values())
    keys = []
    for prefix, members in shared.experts_by_layer(targets).items():
        alone = {name for name in plan.targets if name.startswith(prefix)} == {member.name for member in members}
        whole = len(members) == len(everyone[prefix])
        keys += [f"{prefix}*"] if whole and alone else [member.name for member in members]
    return keys


def _excluded(plan: Plan) -> list[str]:
    """Full names; the prefix stands for the routed experts of a layer when none is quantized."""
    everyone = shared.experts_by_layer(plan.targets.values())
    left = shared.unquantized(plan)
    whole = {
        prefix for prefix, members in shared.experts_by_layer(left).items() if len(members) == len(everyone[prefix])
    }
    names = [target.expert[0] if target.expert and target.expert[0] in whole else target.name for target in left]
    return list(dict.fromkeys(names))


# --- what loads it -------------------------------------------------------------------------------------------------


def _transformers_loads(plan: Plan) -> bool:
    """True when transformers 5.23 with amd-quark loads it; its name map ends at one scale per tensor.

    Routed experts are one fused parameter in memory, for which amd-quark has no quantized module.
    """
    for pair, targets in shared.pairs(plan).items():
        if shared.weight_kind(pair[0]) == "nvfp4" or any(target.expert for target in targets):
            return False
    return not shared.quantizes_routers(plan)


# --- reading -------------------------------------------------------------------------------------------------------


def _layer_of(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The layer dictionary of a module: by name or glob in order, else by class, else the global one."""
    layers = config.get("layer_quant_config") or {}
    for key, found in layers.items():
        if key == module or ("*" in key and fnmatch.fnmatchcase(module, key)):
            return dict(found)
    by_class = (config.get("layer_type_quant_config") or {}).get("Linear")
    return dict(by_class or config.get("global_quant_config") or {})


def _stored(module: str, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredTarget:
    found = _layer_of(module, config)
    scale = shared.header(headers, f"{module}.weight_scale")
    weight = shared.header(headers, f"{module}.weight")
    spec = read_weight(module, found.get("weight"), scale.dtype)
    source = read_input(module, found.get("input_tensors"))
    if len(weight.shape) != 2:
        raise ModelError(f"a quantized weight of shape {list(weight.shape)} is not a matrix", where=module)
    kind = shared.weight_kind(spec) or ""
    rows, cols = weight.shape
    shape = (cols * 8, rows) if _is_int4(spec) else (rows, cols * 2 if kind in ("mxfp4", "nvfp4") else cols)
    names = shared.check_headers(_layout(module, (spec, source), shape, scale.dtype), headers)
    return StoredTarget(module, spec, source, shape, names)


def _stored_attention(config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> dict[str, StoredAttention]:
    found: dict[str, StoredAttention] = {}
    for name in headers:
        module = name.removesuffix(".output_scale")
        parent, _, leaf = module.rpartition(".")
        kind = next((kind for kind, own in _KV_NAMES.items() if own == leaf), None)
        if module == name or kind is None:
            continue
        spec = read_input(module, _layer_of(module, config).get("output_tensors"))
        if spec is None:
            raise ModelError("it has an output_scale, but the quantization config quantizes no output", where=module)
        (checked,) = shared.check_headers([TensorInfo(name, "F32", ())], headers)
        entry = found.setdefault(parent, StoredAttention(parent, {}, {}))
        entry.specs[kind] = spec
        entry.scales[kind] = checked
    return found


DIALECT = Quark()
