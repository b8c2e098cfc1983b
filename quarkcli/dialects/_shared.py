"""Does what dialects share: refusals, and the demands of servers on fused modules. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from quarkcli.dialects import _vllm_names as vllm_names
from quarkcli.dialects._kinds import Kinds, Pair, input_kind, kinds_of
from quarkcli.dialects.base import Classes, TensorInfo
from quarkcli.errors import ModelError
from quarkcli.family import HeaderLike
from quarkcli.plan.model import Attention, Plan, QuantizedTarget, Target
from quarkcli.spec import PerGroup, PerTensor, PerTile, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

# Experts in one tensor -> the projections that it holds.
FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
FLOAT_TEXTS = ("F32", "BF16", "F16")
# A method that TensorRT-LLM does not know: it takes the model for unquantized, and codes for weights.
TENSORRT_LLM_NONE = Classes(
    frozenset(), frozenset(), "ModelConfig.load_hf_quant_config in tensorrt_llm/_torch/model_config.py"
)


def pair_of(target: QuantizedTarget) -> Pair:
    """Returns (weight, input) of a target."""
    return target.weight, target.input


def unquantized(plan: Plan) -> list[Target]:
    """Returns the targets that keep their weight and that a loader would take for a linear module."""
    return [t for t in plan.targets.values() if t.weight is None and t.role != "embedding"]


def tied_head(plan: Plan) -> list[str]:
    """Returns the module name of a head that exists in memory only, as a list of none or one."""
    return [plan.tied_head.removesuffix(".weight")] if plan.tied_head else []


def further(plan: Plan) -> list[str]:
    """Returns names that lists of modules left out need beside those of targets.

    These are matrices that no recipe can reach, a head in memory only, and vLLM's names.
    """
    return [*plan.matrices, *tied_head(plan), *vllm_names.left_out(plan)]


def experts_by_layer(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """Returns the routed experts by the prefix of their layer."""
    layers: dict[str, list[Target]] = {}
    for target in targets:
        if target.expert is not None:
            layers.setdefault(target.expert[0], []).append(target)
    return layers


def fused_agree(plan: Plan) -> bool:
    """True when the modules that vLLM fuses have one spec: members of a scale group, and all experts of a layer."""
    return plan.once("fused_agree", lambda: _experts_agree(plan) and not plan.disagreeing())


def _experts_agree(plan: Plan) -> bool:
    first: dict[str, Target] = {}
    for run in plan.alike():
        for target in run if run[0].expert is not None else ():
            assert target.expert is not None
            other = first.setdefault(target.expert[0], target)
            if other.slots is not target.slots and (other.weight, other.input) != (target.weight, target.input):
                return False
    return True


def vllm_lacks(plan: Plan) -> bool:
    """True when vLLM has no place for the plan, whatever its formats are."""
    lacks = quantizes_routers(plan) or interleaves(plan) or unscaled_cache(plan) or _quantizes_whole(plan)
    return lacks or not vllm_names.loads(plan)


def _quantizes_whole(plan: Plan) -> bool:
    """True when a module is quantized to which vLLM gives no scheme."""
    patterns = plan.rewrites.family.whole_in_vllm if plan.rewrites.family is not None else []
    return bool(patterns) and any(fnmatchcase(t.name, pattern) for t in plan.quantized() for pattern in patterns)


def quantizes_routers(plan: Plan) -> bool:
    """True when a router is quantized: to servers it is a bare parameter, or a linear that never is."""
    return any(run[0].role == "router" for run in plan.quantized_alike())


def interleaves(plan: Plan) -> bool:
    """True when experts lie in the source with the rows of gate and up by turns, as gpt-oss has them.

    vLLM 0.32's class of such models takes quantized experts under names of its own, gate and up in one; of those that
    are written one by one it raises for some and leaves others without an error as they were allocated. Tried with
    every kind of weight.
    """
    experts = (run[0] for run in plan.quantized_alike() if run[0].expert is not None)
    return any(target.view.rows is not None and target.view.rows[2] > 1 for target in experts)


def vllm_loads(plan: Plan, dense: frozenset[Kinds], experts: frozenset[Kinds]) -> bool:
    """True when vLLM has a class for every pair, apart for linears and routed experts, and fused modules agree."""
    if vllm_lacks(plan):
        return False
    for target, *_ in plan.quantized_alike():
        if kinds_of(pair_of(target)) not in (experts if target.expert else dense):
            return False
    return fused_agree(plan)


@dataclass(frozen=True)
class Places:
    """The slots that a dialect can hold: weights with their inputs, outputs, attention slots, and embeddings."""

    pairs: frozenset[Kinds]
    outputs: frozenset[str] = frozenset()
    attention: frozenset[str] = frozenset({"k", "v"})
    embeddings: bool = False


def refusals(plan: Plan, dialect: str, holds: frozenset[Kinds] | Places) -> list[str]:
    """Returns the refusals that every dialect here has in common. One sentence for all modules with the same reason."""
    places = holds if isinstance(holds, Places) else Places(holds)
    reasons: dict[str, list[str]] = {}
    for run in plan.alike():
        for reason in _target_reasons(run[0], dialect, places):
            reasons.setdefault(reason, []).extend(target.name for target in run)
    for reason, name in _attention_reasons(plan, dialect, places):
        reasons.setdefault(reason, []).append(name)
    return sentences(reasons)


def sentences(reasons: Mapping[str, list[str]]) -> list[str]:
    """Returns one sentence for every reason, from the names of the modules it holds for."""
    return [_sentence(names, reason) for reason, names in reasons.items()]


def _sentence(names: list[str], reason: str) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}{more}: {reason}"


def _target_reasons(target: Target, dialect: str, places: Places) -> Iterator[str]:
    for kind, spec in (("output", target.output), ("bias", target.bias_spec)):
        if spec is not None and (kind == "bias" or input_kind(spec) not in places.outputs):
            yield f"{dialect} has no place for a quantized {kind} ({spec.describe()})"
    weight, source = target.weight, target.input
    if weight is None:
        return
    if target.role == "embedding" and not places.embeddings:
        yield f"{dialect} readers do not load a quantized embedding ({weight.describe()})"
    if kinds_of((weight, source)) not in places.pairs:
        after = f" with input {source.describe()}" if source is not None else " without a quantized input"
        yield f"{dialect} cannot hold weight {weight.describe()}{after}"
    for size in {weight.group_size, source.group_size if source is not None else None} - {None}:
        if size and target.shape[1] % size:
            yield f"{target.shape[1]} input features are not a multiple of the group of {size} of {weight.describe()}"


CACHE = frozenset("kv")


def cached(plan: Plan) -> list[Attention]:
    """Returns the attention modules with an enabled slot."""
    return [attention for attention in plan.attention.values() if attention.specs]


def _attention_reasons(plan: Plan, dialect: str, places: Places) -> Iterator[tuple[str, str]]:
    active = cached(plan)
    for attention in active:
        specs = attention.specs
        for kind in sorted(set(specs) - places.attention):
            yield f"{dialect} is written without scales for attention {kind} ({specs[kind].describe()})", attention.name
        if attention.latent and CACHE & set(specs):
            yield (
                f"its KV cache holds a compressed latent vector, not k and v, and {dialect} has no name for it",
                attention.name,
            )
        if not set(specs) >= CACHE:
            yield f"{dialect} describes the cache of k and v together, so both must be quantized", attention.name
        for kind in sorted(places.attention & set(specs)):
            if input_kind(specs[kind]) != "fp8 static":
                reason = (
                    f"{dialect} can hold a KV cache of fp8_e4m3 with one static float32 scale, not "
                    f"{specs[kind].describe()}"
                )
                yield reason, f"{attention.name}.{kind}_bmm_quantizer"
    if active and len(active) < len(plan.attention):
        off = next(a.name for a in plan.attention.values() if not a.specs)
        yield f"{dialect} describes one KV cache for the whole model, and that of this module is not quantized", off


def whole_layers(plan: Plan, targets: Iterable[Target]) -> dict[str, str]:
    """Returns the list of experts, such as `<layer>.experts`, by the names of those that are here with all others."""
    every = experts_by_layer(plan.targets.values())
    mine = experts_by_layer(targets)
    whole = {prefix for prefix, members in mine.items() if len(members) == len(every[prefix])}
    return {target.name: prefix for prefix in whole for target in mine[prefix]}


def tiles_fit(plan: Plan) -> bool:
    """True when tiles of weights end with their module wherever servers fuse modules along the output.

    Nothing follows the last member, such as `kv_a_proj_with_mqa` behind `q_a_proj`: its last tile may be a part of one.
    Gate and up of experts lie apart, both whole. Where rows are sorted by heads, tiles have to fit into them.
    """
    if _splits_tiles(plan):
        return False
    members = Counter(target.group for target in plan.targets.values())
    return all(
        not isinstance(run[0].weight.granularity, PerTile)
        or run[0].shape[0] % run[0].weight.granularity.rows == 0
        or all(members[target.group] == 1 or _is_last(target) for target in run)
        for run in plan.quantized_alike()
    )


def _splits_tiles(plan: Plan) -> bool:
    """True when vLLM sorts the rows of q, k and v by heads, and a head ends within a tile."""
    attention = plan.rewrites.attention
    if attention is None or not attention.by_head:
        return False
    joined = {module.k_proj for module in plan.attention.values()}
    weights = (plan.targets[name].weight for name in joined if name in plan.targets)
    tiles = [spec.granularity.rows for spec in weights if spec and isinstance(spec.granularity, PerTile)]
    return any((plan.rewrites.head_dim or 1) % rows for rows in tiles)


def _is_last(target: Target) -> bool:
    """True for the last of modules that servers fuse, in the order of their group's name."""
    return target.expert is None and target.name.rpartition(".")[2] == target.group.rpartition("+")[2]


def static_scale(target: QuantizedTarget, side: str, static: Mapping[str, Tensor]) -> Tensor:
    """Returns the scale of a static input or output, float32. Raises ValueError when none was given."""
    import torch

    if side not in static:
        raise ValueError(f"{target.name} has a static {side} but no {side} scale was given")
    return static[side].to(torch.float32)


# --- reading -------------------------------------------------------------------------------------------------------


def quantized_modules(headers: Mapping[str, HeaderLike]) -> list[str]:
    """Returns the modules that have a weight scale, in file order."""
    suffix = ".weight_scale"
    return [name.removesuffix(suffix) for name in headers if name.endswith(suffix)]


def scale_shape(spec: TensorSpec, shape: tuple[int, int]) -> tuple[int, ...]:
    """Returns the shape that the scales of a weight [out, in] have in memory."""
    rows, cols = shape
    match spec.granularity:
        case PerTensor():
            return ()
        case PerTile(height, width):
            return (-(-rows // height), -(-cols // width))
        case PerGroup(size):
            return (rows, cols // size)
    return (rows, 1)


def header(headers: Mapping[str, HeaderLike], name: str) -> HeaderLike:
    if name not in headers:
        raise ModelError(
            "the quantization config needs a tensor that is not in the files",
            where=name,
            kind="E-SOURCE-CONTRADICTS",
        )
    return headers[name]


def rows_and_columns(module: str, weight: HeaderLike) -> tuple[int, int]:
    """Returns the shape of a module's stored weight. Raises ModelError where it has not two dimensions."""
    if len(weight.shape) != 2:
        raise no_matrix(module, weight)
    return weight.shape[0], weight.shape[1]


def no_matrix(module: str, weight: HeaderLike) -> ModelError:
    """Returns the error that a module's quantized weight is no matrix."""
    return ModelError(
        f"a quantized weight of shape {list(weight.shape)} is not a matrix", where=module, kind="E-SOURCE-CONTRADICTS"
    )


def check_headers(expected: Iterable[TensorInfo], headers: Mapping[str, HeaderLike]) -> tuple[str, ...]:
    """Returns the names of `expected`, each present with its dtype and shape.

    A scalar may be stored as [] or [1].

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
                kind="E-SOURCE-CONTRADICTS",
            )
        names.append(info.name)
    return tuple(names)


def own_code(plan: Plan) -> bool:
    """True where transformers has no class for models of the family; those that bring their own were not tried."""
    return plan.rewrites.family is not None and plan.rewrites.family.own_code


def own_linears(plan: Plan) -> bool:
    """True where linears of the family have a class of their own in transformers, which reads the weight itself."""
    return plan.rewrites.family is not None and plan.rewrites.family.own_linears


def renames(plan: Plan) -> bool:
    """True where transformers has modules of the plan in memory under other names than the files."""
    family = plan.rewrites.family
    return family is not None and any(family.in_memory(name) != name for name in plan.targets)


def renames_weights_alone(plan: Plan) -> bool:
    """True where transformers renames the weight of a quantized module, and does not find its codes by that name."""
    family = plan.rewrites.family
    return family is not None and not all(family.finds_codes(run[0].name) for run in plan.quantized_alike())


def joined(plan: Plan) -> dict[str, Target | None]:
    """Returns the modules that transformers makes one of while it loads (`FamilyModel.joined`), but for experts.

    Those that no recipe reaches (convolutions) have no target.
    """
    names = set(plan.rewrites.family.joined) if plan.rewrites.family is not None else set()
    if not names:
        return {}
    found: dict[str, Target | None] = {name.removesuffix(".weight"): None for name in plan.kept}
    found |= {target.name: target for target in plan.targets.values() if target.expert is None}
    return {name: target for name, target in found.items() if name.rpartition(".")[2] in names}


def hides_cache(plan: Plan) -> bool:
    """True for a quantized cache whose scales find no place in transformers: it misses them, or stops."""
    attention = plan.rewrites.attention
    return attention is not None and attention.hidden_cache and bool(cached(plan))


def unscaled_cache(plan: Plan) -> bool:
    """True for a quantized cache whose scales find no place in the classes of servers."""
    attention = plan.rewrites.attention
    return attention is not None and attention.unscaled and bool(cached(plan))
