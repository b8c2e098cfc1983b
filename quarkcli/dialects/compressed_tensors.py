"""The compressed-tensors dialect: llm-compressor writes it, vLLM and transformers read it.

Layouts and config as in compressed-tensors 0.20 (`compressors/*`, `quantization/quant_args.py`). The loaders
of transformers 5.22 to 5.24 were tried, those of vLLM 0.32 were read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.dialects import _ct_kinds as known
from quarkcli.dialects import _ct_online as online
from quarkcli.dialects import _ct_reading as reading
from quarkcli.dialects import _shared as shared
from quarkcli.dialects._ct_arguments import arguments, scheme_group
from quarkcli.dialects._ct_layout import (
    format_of,
    keeps_shape,
    layout,
    pack,
    pack_zero_points,
    static_suffix,
    unpack,
    unpack_zero_points,
)
from quarkcli.dialects._ct_reading import ATTENTION
from quarkcli.dialects._documents import CompressedTensorsConfig
from quarkcli.dialects._patterns import WrittenNames, exact_patterns, ignored, in_memory, linear_patterns
from quarkcli.dialects.base import (
    ANY,
    Bar,
    Classes,
    ConfigCheck,
    Decoded,
    Key,
    Reader,
    StoredTarget,
    StoredView,
    TensorInfo,
    Writer,
)
from quarkcli.documents.shape import check
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike
from quarkcli.plan.model import Attention, Plan, QuantizedTarget, Target, is_quantized
from quarkcli.spec import PerChannel, PerTensor, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.numerics.quantize import Quantized

NAME = "compressed-tensors"
# The release whose config this is; readers only show it.
_VERSION = "0.20.0"
_PLACES = shared.Places(known.HOLDS, frozenset(known.OUTPUTS), ATTENTION, embeddings=True)
# (weight, input, output) of a config group.
Scheme = tuple[TensorSpec, TensorSpec | None, TensorSpec | None]


class CompressedTensorsReader(Reader):
    name = NAME
    quant_method = NAME
    lists = ("ignore",)
    divisors = frozenset({"weight_global_scale", "input_global_scale"})

    def view(self, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> StoredView:
        """Returns the view of a checkpoint.

        Raises ModelError for a scheme that the dialect does not hold, and for tensors that do not fit the config.
        """
        check(CompressedTensorsConfig, config, "quantization_config")
        found = StoredView()
        ignore = config.get("ignore") or []
        groups = list((config.get("config_groups") or {}).values())
        modules = list(shared.quantized_modules(headers))
        names = WrittenNames([*ignore, *(text for group in groups for text in group.get("targets") or [])], modules)
        for module in modules:
            if names.named(module, ignore):
                raise ModelError(
                    "it has a weight_scale, but the quantization config ignores it",
                    where=module,
                    kind="E-SOURCE-CONTRADICTS",
                )
            group = reading.group_of(module, groups, names)
            found.targets[module] = reading.stored(module, group, headers, config.get("format"))
        found.online, found.matrices = online.read_online(config, modules, headers)
        if config.get("kv_cache_scheme"):
            found.attention = reading.stored_attention(config["kv_cache_scheme"], headers)
        return found

    def untouched(self, config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
        groups = list((config.get("config_groups") or {}).values())
        modules = list(modules)
        names = WrittenNames([text for group in groups for text in group.get("targets") or []], modules)
        return {module for module in modules if reading.find_group(module, groups, names) is None}

    def decode(self, stored: StoredTarget, tensors: Mapping[str, Tensor]) -> Decoded:
        from quarkcli.numerics.quantize import QParams

        local = stored.own(tensors)
        spec, (rows, cols) = stored.weight, stored.shape
        packed = local["weight_packed"] if "weight_packed" in local else local["weight"]
        scale, outer, zeros = (local.get(f"weight_{name}") for name in ("scale", "global_scale", "zero_point"))
        assert scale is not None
        form = known.UNPACKED if isinstance(stored, reading.InBytes) else format_of((spec, stored.input))
        params = QParams(
            scale.reshape(()) if isinstance(spec.granularity, PerTensor) else scale,
            None if outer is None else outer.float().reshape(()).reciprocal(),
            None if zeros is None else unpack_zero_points(zeros, form, spec.format.bits, rows),
        )
        weight = unpack(packed, form, spec, cols, params)
        static = {
            "input": _real_scale("input", stored.input, local),
            "output": _real_scale("output", stored.output, local),
        }
        return Decoded(weight, static["input"], static["output"])


READER = CompressedTensorsReader()


class CompressedTensors(Writer):
    name = NAME
    reader = READER
    # vLLM and transformers share no other dialect as widely.
    preferences: ClassVar[Mapping[str, int]] = {ANY: 20}
    demands: ClassVar[Mapping[str, tuple[Key, ...]]] = {"vllm": known.VLLM_KEYS}
    no_globs: ClassVar[Mapping[str, str]] = {"vllm": "ignore"}
    faults: ClassVar[Mapping[str, ConfigCheck]] = {
        "vllm": known.vllm_faults, "transformers": known.transformers_faults,
    }  # fmt: skip
    classes: ClassVar[Mapping[str, Classes]] = {"sglang": known.SGLANG, "tensorrt-llm": known.TENSORRT_LLM}
    bars: ClassVar[Mapping[str, tuple[Bar, ...]]] = {"sglang": known.SGLANG_BARS}

    def refusals(self, plan: Plan) -> list[str]:
        """Returns the reasons the plan cannot be held.

        The width of packed channels is told from their 32-bit words alone.
        """
        found = shared.refusals(plan, self.name, _PLACES)
        for run in plan.quantized_alike():
            weight, width = run[0].weight, run[0].shape[1]
            if not isinstance(weight.granularity, PerChannel) or keeps_shape(shared.pair_of(run[0])):
                continue
            if width * weight.format.bits % known.WORD_BITS:
                what = f"{width} input features do not fill 32-bit words of {weight.element} codes"
                found += [f"{target.name}: {what}" for target in run]
        return found

    def loaders(self, plan: Plan) -> set[str]:
        if self.refusals(plan):
            return set()
        found = set()
        if known.vllm_loads(plan) and online.vllm_turns(plan):
            found.add("vllm")
        if _transformers_loads(plan) and not plan.online:  # it passes over the transform config
            found.add("transformers")
        return found

    def caveat(self, plan: Plan) -> str:
        """Returns a sentence about the scales of a cache, which transformers 5.24 passes over, or about turned inputs.

        compressed-tensors knows attention with a cache by the name of an argument that transformers 5.24 changed.
        """
        if plan.online:
            return f"{online.VLLM}; transformers does not rotate them"
        if "transformers" in self.loaders(plan) and any(shared.cached(plan)):
            return "transformers 5.24 with compressed-tensors 0.20 ignores the scales of the KV cache"
        return ""

    def online_refusals(self, plan: Plan) -> list[str]:
        return []

    def online_infos(self, plan: Plan, part: int) -> list[TensorInfo]:
        return [info for info, _ in online.matrices(plan, part)]

    def online_tensors(self, plan: Plan, part: int) -> dict[str, Tensor]:
        return {info.name: online.matrix(block) for info, block in online.matrices(plan, part)}

    def infos(self, target: QuantizedTarget) -> list[TensorInfo]:
        return layout(target)

    def attention_infos(self, attention: Attention) -> list[TensorInfo]:
        return [TensorInfo(f"{attention.name}.{kind}_scale", "F32", (1,)) for kind in _scaled(attention)]

    def tensors(
        self, target: QuantizedTarget, quantized: Quantized, static: Mapping[str, Tensor], bias: Quantized | None = None
    ) -> dict[str, Tensor]:
        """Returns packed tensors with the names and layout of `infos`.

        Raises ValueError when a static input or output has no scale.
        """
        import torch

        spec, params = target.weight, quantized.params
        assert params.scale is not None
        local = {
            "weight_scale": params.scale.reshape(1) if params.scale.dim() == 0 else params.scale.contiguous(),
            "weight_shape": torch.tensor(target.shape, dtype=torch.int64),
        }
        local["weight"] = local["weight_packed"] = pack(quantized, format_of((spec, target.input)), spec)
        if params.zero_point is not None:
            local["weight_zero_point"] = pack_zero_points(params.zero_point, spec.format.bits)
        if params.global_scale is not None:
            local["weight_global_scale"] = params.global_scale.reshape(1).reciprocal()
        for side, activation in (("input", target.input), ("output", target.output)):
            suffix = static_suffix(side, activation)
            if suffix is None or activation is None:
                continue
            local[suffix] = _stored_scale(shared.static_scale(target, side, static), activation)
        return {info.name: local[info.name.removeprefix(f"{target.name}.")] for info in self.infos(target)}

    def attention_tensors(self, attention: Attention, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{attention.name}.{kind}_scale": scales[kind].float().reshape(1).clone() for kind in _scaled(attention)
        }

    def config(self, plan: Plan) -> dict[str, Any]:
        groups = _ordered_groups(plan)
        formats = {format_of(scheme[:2]) for scheme in groups}
        universe = [*plan.targets, *shared.tied_head(plan)]
        quantized = [target.name for target in plan.quantized()]
        family = plan.rewrites.family
        left = [*ignored(shared.unquantized(plan), universe, quantized, family), *shared.tied_head(plan)]
        left += linear_patterns(plan.matrices, [*universe, *plan.matrices])
        cache = next((attention.specs["k"] for attention in shared.cached(plan)), None)
        return {
            "quant_method": NAME,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "quantization_status": "compressed",
            "version": _VERSION,
            "config_groups": {
                f"group_{index}": scheme_group(
                    *scheme,
                    format_of(scheme[:2]),
                    in_memory(_targets(targets, universe, alone=len(groups) == 1), family),
                )
                for index, (scheme, targets) in enumerate(groups.items())
            },
            "ignore": list(dict.fromkeys([*in_memory(left, family), *shared.vllm_names.left_out(plan)])),
            "kv_cache_scheme": None if cache is None else arguments(cache, weight=False),
            **({"transform_config": online.transform_config(plan, universe)} if plan.online else {}),
        }


# --- tensors -------------------------------------------------------------------------------------------------------


def _scaled(attention: Attention) -> list[str]:
    """Returns the slots of an attention module that have a scale."""
    return [kind for kind in sorted(ATTENTION) if kind in attention.specs]


def _stored_scale(scale: Tensor, spec: TensorSpec) -> Tensor:
    """Returns a static scale as it is stored: a divisor where it is a global one."""
    import torch

    flat = scale.to(torch.float32).reshape(1)
    return flat.clone() if spec.scale is None or spec.scale.global_scale is None else flat.reciprocal()


def _real_scale(side: str, spec: TensorSpec | None, local: Mapping[str, Tensor]) -> Tensor | None:
    """Returns the multiplier (float32 []) of a static input or output."""
    suffix = static_suffix(side, spec)
    if suffix is None or spec is None:
        return None
    return _stored_scale(local[suffix], spec).reshape(())


# --- config --------------------------------------------------------------------------------------------------------


def _ordered_groups(plan: Plan) -> dict[Scheme, list[QuantizedTarget]]:
    """Returns the schemes with their targets. The one transformers must take for the experts' comes first.

    It takes the first group with a `re:` target about experts, else the first with another target. Unquantized
    experts survive only under an fp8 scheme, which leaves weights without a scale alone; other schemes drop them.
    """
    found: dict[Scheme, list[QuantizedTarget]] = {}
    for run in plan.quantized_alike():
        target = run[0]
        found.setdefault((target.weight, target.input, target.output), []).extend(run)

    def rank(scheme: Scheme) -> int:
        if any(target.expert for target in found[scheme]):
            return 0
        return 1 if _leaves_others_alone(scheme) else 2

    return {scheme: found[scheme] for scheme in sorted(found, key=rank)}


def _leaves_others_alone(scheme: Scheme) -> bool:
    """True for the 8-bit floats, whose weights without a scale transformers takes as they are."""
    spec = scheme[0]
    return spec.format.kind == "float" and spec.format.bits == 8


def _targets(targets: Sequence[Target], universe: Iterable[str], *, alone: bool) -> list[str]:
    """Returns `Linear` when one group covers everything; else names, with patterns for experts only.

    vLLM renames full names for models whose modules it calls otherwise, so names are kept where they are few. Its
    head is not a `Linear`, so it is named; so is an embedding.
    """
    named = [target.name for target in targets if target.role in ("head", "embedding")]
    if alone and len(named) < len(targets):
        return [known.CONFIG_CLASS, *named]
    return exact_patterns(targets, universe)


# --- what loads it -------------------------------------------------------------------------------------------------


def _transformers_loads(plan: Plan) -> bool:
    """True when transformers 5.22 to 5.24 load the checkpoint with no missing and no unexpected keys.

    5.24 takes the scales of a cache for unexpected ones, which is said (`caveat`). Linears load in every scheme but
    those with zero points, for which it expects another shape since 5.23 unless it is told to dequantize. Embeddings
    load where the weight keeps its shape. Experts are fused in memory by conversions that know one scheme for all of
    them, and that exist for families whose published files have one tensor per expert, and for some others.
    """
    if shared.quantizes_routers(plan) or any("q" in attention.specs for attention in shared.cached(plan)):
        return False
    if shared.own_code(plan) or shared.hides_cache(plan) or shared.renames_weights_alone(plan):
        return False
    if shared.own_linears(plan) and not all(keeps_shape(shared.pair_of(run[0])) for run in plan.quantized_alike()):
        return False
    if not known.transformers_joins(plan, leaves_others_alone=_first_leaves_others_alone(plan)):
        return False
    if not all(_transformers_decodes(run[0], tied=bool(plan.tied_head)) for run in plan.quantized_alike()):
        return False
    experts = [run[0] for run in plan.alike() if run[0].expert is not None]
    quantized = [target for target in experts if is_quantized(target)]
    if quantized and (_keeps_fused(plan) or not known.transformers_loads_experts(quantized)):
        return False
    left = [target for target in experts if target.weight is None]
    if any(target.view.expert is not None for target in left) and _splits_experts(plan):
        return False
    return _first_leaves_others_alone(plan) or all(target.view.expert is not None for target in left)


def _keeps_fused(plan: Plan) -> bool:
    """True when published files of the family have fused experts, and transformers does not load single ones."""
    experts = plan.rewrites.experts
    loads = experts is None or experts.singles or experts.converted or experts.split
    return experts is not None and bool(experts.fused) and not loads


def _splits_experts(plan: Plan) -> bool:
    """True when transformers makes a linear of every expert of the family, so that it finds no place for fused ones."""
    experts = plan.rewrites.experts
    return experts is not None and experts.split


def _transformers_decodes(target: QuantizedTarget, *, tied: bool) -> bool:
    """True when transformers decodes the target. `tied`: the head in memory shares its weight with the embedding."""
    shaped = not tied and keeps_shape((target.weight, target.input))
    return target.weight.symmetric and (shaped or target.role != "embedding")


def _first_leaves_others_alone(plan: Plan) -> bool:
    """True when nothing but the cache is quantized, or the first config group is one of 8-bit floats."""
    first = next(iter(_ordered_groups(plan)), None)
    return first is None or _leaves_others_alone(first)


WRITER = CompressedTensors()
