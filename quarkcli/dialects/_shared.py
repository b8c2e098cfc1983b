"""What the dialects share: names for the specs they hold, and what servers ask of fused modules. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from quarkcli.dialects.base import HeaderLike, TensorInfo
from quarkcli.errors import ModelError
from quarkcli.plan.model import Attention, Decision, Plan, Target
from quarkcli.spec import PerChannel, PerGroup, PerTensor, PerToken, ScaleSpec, TensorSpec

Pair = tuple[TensorSpec, TensorSpec | None]
Kinds = tuple[str, str]

FLOAT_TEXTS = ("F32", "BF16", "F16")
_PLAIN_SCALES = ("f32", "f16", "bf16", "model")
_SCALE_TEXTS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "e8m0": "U8", "e4m3": "F8_E4M3"}
_GLOBAL = ScaleSpec("f32")
# The element with its sort, and the rule by which AMD Quark and compressed-tensors compute its scale.
_PLAIN_RULES: dict[str, tuple[str, str]] = {
    "int4": ("int4", "half_range"),
    "int8": ("int8", "half_range"),
    "fp8": ("fp8_e4m3", "absmax"),
}
_SHORT = {element: short for short, (element, _) in _PLAIN_RULES.items()}


def weight_kind(spec: TensorSpec) -> str | None:
    """The short name of a weight spec (`int4 group`, `fp8 tensor`, `mxfp4` ...), None for one no dialect here knows."""
    scale = spec.scale
    if scale.when != "static":
        return None
    if spec.element == "fp4_e2m1":
        return _fp4_kind(spec)
    if scale.dtype not in _PLAIN_SCALES or scale.over is not None or spec.element not in _SHORT:
        return None
    match spec.granularity:
        case PerTensor() if spec.element != "int4":
            return f"{_SHORT[spec.element]} tensor"
        case PerChannel(0):
            return f"{_SHORT[spec.element]} channel"
        case PerGroup() if spec.element == "int4":
            return "int4 group"
    return None


def input_kind(spec: TensorSpec | None) -> str | None:
    """The short name of an input spec: `none`, `fp8 static`, `fp8 tensor`, `fp8 token`, `mxfp4`, `nvfp4` ..."""
    if spec is None:
        return "none"
    scale = spec.scale
    if spec.element == "fp4_e2m1":
        return _fp4_kind(spec) if scale.when == "dynamic" else None
    if spec.element not in ("fp8_e4m3", "int8") or scale.over is not None:
        return None
    short = _SHORT[spec.element]
    match spec.granularity, scale.when:
        case PerTensor(), "static" if scale.dtype == "f32":
            return f"{short} static"
        case PerTensor(), "dynamic" if scale.dtype in _PLAIN_SCALES:
            return f"{short} tensor"
        case PerToken(), "dynamic" if scale.dtype in _PLAIN_SCALES:
            return f"{short} token"
    return None


def _fp4_kind(spec: TensorSpec) -> str | None:
    scale, over = spec.scale, spec.scale.over
    if spec.granularity == PerGroup(32) and scale.dtype == "e8m0" and over is None:
        return "mxfp4"
    # Two levels: the outer scale is a static float32 on its own.
    if spec.granularity == PerGroup(16) and scale.dtype == "e4m3" and over is not None:
        return "nvfp4" if (over.dtype, over.when, over.over) == ("f32", "static", None) else None
    return None


def weight_spec(kind: str, scale_dtype: str = "f32", group: int | None = None, rule: str | None = None) -> TensorSpec:
    """The spec that `weight_kind` calls `kind`, with the usual rule of its format when `rule` is None."""
    if kind == "mxfp4":
        return TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", rule or "even"))  # type: ignore[arg-type]
    if kind == "nvfp4":
        return TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", over=_GLOBAL))
    short, where = kind.split()
    element, usual = _PLAIN_RULES[short]
    granularity = PerTensor() if where == "tensor" else PerChannel(0) if where == "channel" else PerGroup(group or 0)
    return TensorSpec(element, granularity, ScaleSpec(scale_dtype, rule or usual))  # type: ignore[arg-type]


def input_spec(kind: str, rule: str | None = None) -> TensorSpec | None:
    """The spec that `input_kind` calls `kind`."""
    if kind == "none":
        return None
    if kind == "mxfp4":
        return TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", rule or "even", "dynamic"))  # type: ignore[arg-type]
    if kind == "nvfp4":
        return TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "absmax", "dynamic", over=_GLOBAL))
    short, how = kind.split()
    element, usual = _PLAIN_RULES[short]
    when = "static" if how == "static" else "dynamic"
    granularity = PerToken() if how == "token" else PerTensor()
    return TensorSpec(element, granularity, ScaleSpec("f32", rule or usual, when))  # type: ignore[arg-type]


def scale_dtype(element: str, text: str) -> str:
    """The `ScaleSpec.dtype` of a stored plain scale; a 16-bit scale of an integer is one in the model's dtype."""
    if text == "F32":
        return "f32"
    return "model" if element.startswith("int") else text.lower()


def scale_text(spec: TensorSpec, model: str) -> str:
    """The safetensors dtype of a spec's scale; `model` is the source tensor's."""
    return _SCALE_TEXTS.get(spec.scale.dtype, model)


def pair_of(target: Target) -> Pair | None:
    """(weight, input) of a target. An input spec without a quantized weight is switched off, as the plan says."""
    return (target.weight, target.input) if target.weight is not None else None


def kinds_of(pair: Pair) -> Kinds | None:
    weight, source = weight_kind(pair[0]), input_kind(pair[1])
    return (weight, source) if weight and source else None


def pairs(plan: Plan) -> dict[Pair, list[Target]]:
    """Quantized targets by their (weight, input) specs, in plan order."""
    found: dict[Pair, list[Target]] = {}
    for target in plan.quantized():
        pair = pair_of(target)
        assert pair is not None
        found.setdefault(pair, []).append(target)
    return found


def unquantized(plan: Plan) -> list[Target]:
    """Targets that keep their weight and that a loader would take for a linear module."""
    return [t for t in plan.targets.values() if t.weight is None and t.role != "embedding"]


def tied_head(plan: Plan) -> list[str]:
    """The module name of a head that exists in memory only, as a list of none or one."""
    return [plan.tied_head.removesuffix(".weight")] if plan.tied_head else []


def experts_by_layer(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """Routed experts by the prefix of their layer."""
    layers: dict[str, list[Target]] = {}
    for target in targets:
        if target.expert is not None:
            layers.setdefault(target.expert[0], []).append(target)
    return layers


def fused_agree(plan: Plan) -> bool:
    """True when what vLLM fuses has one spec: the members of a scale group, and all experts of a layer."""
    groups: dict[str, list[Target]] = {}
    for target in plan.targets.values():
        groups.setdefault(target.group, []).append(target)
    layers = experts_by_layer(plan.targets.values())
    return all(len({pair_of(t) for t in members}) == 1 for members in (*groups.values(), *layers.values()))


def quantizes_routers(plan: Plan) -> bool:
    """True when a router is quantized: to servers it is a bare parameter, or a linear that never is."""
    return any(target.role == "router" for target in plan.quantized())


def vllm_loads(plan: Plan, dense: frozenset[Kinds], experts: frozenset[Kinds]) -> bool:
    """True when vLLM has a class for every pair, apart for linears and routed experts, and fused modules agree."""
    if quantizes_routers(plan):
        return False
    for pair, targets in pairs(plan).items():
        kinds = kinds_of(pair)
        if any(kinds not in (experts if target.expert else dense) for target in targets):
            return False
    return fused_agree(plan)


def refusals(plan: Plan, dialect: str, holds: frozenset[Kinds]) -> list[str]:
    """Reasons every dialect here has in common. One sentence for all modules with the same reason."""
    reasons: dict[str, list[str]] = {}
    for target in plan.targets.values():
        for reason in _target_reasons(target, dialect, holds):
            reasons.setdefault(reason, []).append(target.name)
    for reason, name in _attention_reasons(plan, dialect):
        reasons.setdefault(reason, []).append(name)
    return [_sentence(names, reason) for reason, names in reasons.items()]


def _sentence(names: list[str], reason: str) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}{more}: {reason}"


def _target_reasons(target: Target, dialect: str, holds: frozenset[Kinds]) -> Iterator[str]:
    for kind in ("output", "bias"):
        spec = target.slots[kind].spec if kind in target.slots else None
        if spec is not None:
            yield f"{dialect} has no place for a quantized {kind} ({spec.describe()})"
    pair = pair_of(target)
    if pair is None:
        return
    weight, source = pair
    if target.role == "embedding":
        yield f"{dialect} readers do not load a quantized embedding ({weight.describe()})"
    if kinds_of(pair) not in holds:
        after = f" with input {source.describe()}" if source is not None else " without a quantized input"
        yield f"{dialect} cannot hold weight {weight.describe()}{after}"
    for size in {weight.group_size, source.group_size if source is not None else None} - {None}:
        if size and target.shape[1] % size:
            yield f"{target.shape[1]} input features are not a multiple of the group of {size} of {weight.describe()}"


def enabled(slots: Mapping[str, Decision]) -> dict[str, TensorSpec]:
    """The specs of the attention slots that are on, by kind."""
    return {kind: decision.spec for kind, decision in slots.items() if decision.spec is not None}


def cache_kinds(attention: Attention) -> list[str]:
    """Which of k and v are on."""
    return [kind for kind in ("k", "v") if kind in enabled(attention.slots)]


def cached(plan: Plan) -> list[Attention]:
    """Attention modules with an enabled slot."""
    return [attention for attention in plan.attention.values() if enabled(attention.slots)]


def _attention_reasons(plan: Plan, dialect: str) -> Iterator[tuple[str, str]]:
    active = cached(plan)
    for attention in active:
        specs = enabled(attention.slots)
        for kind in sorted(set(specs) - {"k", "v"}):
            yield f"{dialect} is written without scales for attention {kind} ({specs[kind].describe()})", attention.name
        if ("k" in specs) != ("v" in specs):
            yield f"{dialect} describes the cache of k and v together; both must be on", attention.name
        for kind in sorted({"k", "v"} & set(specs)):
            if input_kind(specs[kind]) != "fp8 static":
                reason = (
                    f"{dialect} holds a cache of fp8_e4m3 with one static float32 scale, not {specs[kind].describe()}"
                )
                yield reason, f"{attention.name}.{kind}_bmm_quantizer"
    if active and len(active) < len(plan.attention):
        off = next(a.name for a in plan.attention.values() if not enabled(a.slots))
        yield f"{dialect} describes one cache for the whole model; this module's is not quantized", off


# --- reading -------------------------------------------------------------------------------------------------------


def quantized_modules(headers: Mapping[str, HeaderLike]) -> list[str]:
    """Modules that have a weight scale, in file order."""
    suffix = ".weight_scale"
    return [name.removesuffix(suffix) for name in headers if name.endswith(suffix)]


def header(headers: Mapping[str, HeaderLike], name: str) -> HeaderLike:
    if name not in headers:
        raise ModelError("the checkpoint's quantization config needs a tensor that is not in its files", where=name)
    return headers[name]


def check_headers(expected: Iterable[TensorInfo], headers: Mapping[str, HeaderLike]) -> tuple[str, ...]:
    """The names of `expected`, each present with its dtype and shape; a scalar may be stored as [] or [1].

    Raises ModelError naming the tensor. Plain float scales may have any float dtype.
    """
    names = []
    for info in expected:
        found = header(headers, info.name)
        same_dtype = found.dtype == info.dtype or {found.dtype, info.dtype} <= set(FLOAT_TEXTS)
        scalar = {tuple(found.shape), info.shape} <= {(), (1,)}
        if not same_dtype or not (scalar or tuple(found.shape) == info.shape):
            raise ModelError(
                f"found {found.dtype} {list(found.shape)}, but the quantization config asks for "
                f"{info.dtype} {list(info.shape)}",
                where=info.name,
            )
        names.append(info.name)
    return tuple(names)
