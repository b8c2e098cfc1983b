"""Writes and reads the `quantization_config` of the quark dialect, with a dictionary for each layer. Torch-free."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from quarkcli.dialects import _shared as shared
from quarkcli.dialects._patterns import WrittenNames
from quarkcli.dialects._quark_specs import read_spec, specs_of
from quarkcli.errors import ModelError
from quarkcli.plan.model import Attention, Plan, QuantizedTarget, Target
from quarkcli.spec import TensorSpec

# The release whose layout this is; readers only show it.
_VERSION = "0.13"
PACK_METHOD = "reorder"
IN_ORDER = "order"
# Attention slots whose scale is stored as that of a projection's output; the softmax output has a name of its own.
# Where one linear makes k and v (fused with q, or out of a latent), its output has one scale, which amd-quark's
# templates name so: `*qkv_proj`, `*query_key_value`, `*Wqkv`, `*c_attn`, `*kv_b_proj`, `*wkv`.
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
CACHE = ("k", "v")
SOFTMAX = "p"


class Slots(NamedTuple):
    """The specs that a layer dictionary gives a module."""

    weight: TensorSpec | None
    input: TensorSpec | None
    output: TensorSpec | None
    bias: TensorSpec | None


_NOTHING = Slots(None, None, None, None)


def slots_of(target: Target) -> Slots:
    return Slots(target.weight, target.input, target.output, target.bias_spec)


def is_cast(spec: TensorSpec | None) -> bool:
    """True for a 16-bit float without a scale."""
    return spec is not None and spec.scale is None


def is_joined(attention: Attention) -> bool:
    """True when one linear makes both k and v."""
    return attention.k_proj == attention.v_proj


def leaf_of(attention: Attention, kind: str) -> str:
    """Returns the last step of the name of the module on whose output the scale of q, k or v is stored."""
    if kind in CACHE and is_joined(attention):
        return attention.k_proj.rpartition(".")[2]
    return PROJECTIONS[kind]


def projection(attention: Attention, kind: str) -> str:
    """Returns the module on whose output the scale of q, k or v is stored."""
    return {"k": attention.k_proj, "v": attention.v_proj}.get(kind, f"{attention.name}.{PROJECTIONS['q']}")


# --- writing ---------------------------------------------------------------------------------------------------------


def config_of(plan: Plan, quant_method: str) -> dict[str, Any]:
    """Returns the whole `quantization_config`; keys as in exports of AMD Quark."""
    layers, everywhere = _layers(plan)
    attention = _attention_specs(plan)
    active = [module for module in plan.attention.values() if module.specs]
    keys = [f"*{leaf_of(active[0], kind)}" for kind in CACHE if kind in attention]
    kv = {key: layers[key] for key in keys}
    minima = [spec.scale.outermost.minimum for kind, spec in attention.items() if kind in CACHE and spec.scale]
    return {
        "quant_method": quant_method,
        "quant_mode": "eager_mode",
        "version": _VERSION,
        "global_quant_config": _layer(everywhere),
        "layer_quant_config": layers,
        "layer_type_quant_config": {},
        "kv_cache_quant_config": kv,
        # Scales of k and v are measured where the cache is written, after the rotary embedding; one scale for all
        # that a linear makes is that of its output.
        "kv_cache_post_rope": bool(kv) and not is_joined(active[0]),
        "softmax_quant_spec": specs_of(attention.get(SOFTMAX), activation=True),
        "algo_config": None,
        "exclude": [*_excluded(plan), *shared.further(plan)],
        "export": {
            "kv_cache_group": list(kv),
            "min_kv_scale": max((minimum or 0.0 for minimum in minima), default=0.0),
            "pack_method": PACK_METHOD,
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }


def _layer(slots: Slots, output: TensorSpec | None = None) -> dict[str, Any]:
    """Returns the `LAYER` dictionary; `output` is that of an attention slot."""
    return {
        "weight": specs_of(slots.weight, activation=False),
        "input_tensors": specs_of(slots.input, activation=True),
        "output_tensors": specs_of(output or slots.output, activation=True),
        "bias": specs_of(slots.bias, activation=False),
        "target_device": None,
    }


def _attention_specs(plan: Plan) -> dict[str, TensorSpec]:
    """Returns kind -> spec of the attention slots that are on; every module has the same."""
    found: dict[str, TensorSpec] = {}
    for attention in plan.attention.values():
        found |= attention.specs
    return found


def _layers(plan: Plan) -> tuple[dict[str, Any], Slots]:
    """Returns `layer_quant_config`, and the slots of `global_quant_config`: the most frequent ones hold elsewhere.

    vLLM takes the first key that fits, so full names stand before the patterns of attention; and it wants the same
    output in every entry of a k or v projection. A cast is named: no scale in the file shows where it is.
    """
    found: dict[Slots, list[QuantizedTarget]] = {}
    for target in plan.quantized():
        found.setdefault(slots_of(target), []).append(target)
    everywhere = _most_frequent({slots: len(members) for slots, members in found.items() if not is_cast(slots.weight)})
    leaves: dict[str, TensorSpec] = {}
    leaf_by_name: dict[str, str] = {}
    for module in plan.attention.values():
        for kind, spec in module.specs.items():
            if kind in PROJECTIONS:
                leaf = leaf_by_name[projection(module, kind)] = leaf_of(module, kind)
                leaves[leaf] = spec
    usual = {leaf: _usual(plan, [name for name, own in leaf_by_name.items() if own == leaf]) for leaf in leaves}
    layers: dict[str, Any] = {}
    for slots, targets in found.items():
        plain = _layer(slots)
        for target in targets:
            leaf = leaf_by_name.get(target.name, "")
            if leaf and slots != usual[leaf]:
                layers[target.name] = _layer(slots, leaves[leaf])
            elif not leaf and target.expert is None and slots != everywhere:
                layers[target.name] = plain
        if slots != everywhere:
            layers |= dict.fromkeys(_expert_keys(targets, plan), plain)
    layers |= {f"*{leaf}": _layer(usual[leaf], spec) for leaf, spec in leaves.items()}
    return layers, everywhere


def _usual(plan: Plan, names: Iterable[str]) -> Slots:
    counts: dict[Slots, int] = {}
    for name in names:
        target = plan.targets.get(name)
        if target is not None and target.weight is not None:
            counts[slots_of(target)] = counts.get(slots_of(target), 0) + 1
    return _most_frequent(counts)


def _most_frequent(counts: Mapping[Slots, int]) -> Slots:
    return max(counts, key=lambda slots: counts[slots], default=_NOTHING)


def _expert_keys(targets: Sequence[Target], plan: Plan) -> list[str]:
    """Returns the keys of routed experts: one for a whole layer, else their names.

    `<prefix>.*` hides the prefix itself from vLLM's glob, so the key of a layer of experts is `<prefix>*`.
    """
    everyone = shared.experts_by_layer(plan.targets.values())
    keys = []
    for prefix, members in shared.experts_by_layer(targets).items():
        alone = {name for name in plan.targets if name.startswith(prefix)} == {member.name for member in members}
        whole = len(members) == len(everyone[prefix])
        keys += [f"{prefix}*"] if whole and alone else [member.name for member in members]
    return keys


def _excluded(plan: Plan) -> list[str]:
    """Returns full names of unquantized modules. A prefix stands for the experts of a layer when none is quantized."""
    everyone = shared.experts_by_layer(plan.targets.values())
    left = shared.unquantized(plan)
    whole = {
        prefix for prefix, members in shared.experts_by_layer(left).items() if len(members) == len(everyone[prefix])
    }
    names = [target.expert[0] if target.expert and target.expert[0] in whole else target.name for target in left]
    return list(dict.fromkeys(names))


# --- reading ---------------------------------------------------------------------------------------------------------


def unlisted_heads(config: Mapping[str, Any], plan: Plan | None) -> list[str]:
    """Returns a sentence for each unquantized head that the config gives a scheme and does not exclude."""
    if plan is None:
        return []
    heads = [target.name for target in shared.unquantized(plan) if target.role == "head"] + shared.tied_head(plan)
    layers = LayerReader(config)
    names = WrittenNames(layers.excluded, heads)
    listed = {head for head in heads if names.named(head, layers.excluded)}
    listed |= {head for head in heads for entry in layers.excluded if fnmatch.fnmatchcase(head, entry)}
    return [f"exclude does not list {head}" for head in heads if head not in listed and layers.speaks_of(head)]


class LayerReader:
    """Reads the modules' specs from a written config. Raises ModelError for a spec that the dialect does not hold."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.layers = _mapping(config, "layer_quant_config")
        self.globs = {key: layer for key, layer in self.layers.items() if "*" in key}
        by_class = _mapping(config, "layer_type_quant_config").get("Linear")
        self.others: Mapping[str, Any] = by_class or _mapping(config, "global_quant_config")
        self.softmax = config.get("softmax_quant_spec")
        kept = _mapping(config, "kv_cache_quant_config")  # modules that are left out stand here alone
        grouped = _names(_mapping(config, "export"), "kv_cache_group")
        self.caches = list(dict.fromkeys([*grouped, *kept]))
        self._entries = [*self.globs.items(), *kept.items()]
        self.excluded = _names(config, "exclude")
        self._known: dict[tuple[int, bool], Slots] = {}

    def slots(self, module: str) -> Slots:
        """Returns the slots of a module: by name, by the first glob that fits, by class, else those for all."""
        layer = self._named(module)
        if layer is None:
            layer = self.others
        key = (id(layer), self._attends(module))
        if key not in self._known:
            self._known[key] = _read_layer(module, layer, own_output=not key[1])
        return self._known[key]

    def speaks_of(self, module: str) -> bool:
        """True when an entry for the module, a glob, its class or all modules quantizes its weight."""
        layer = self._named(module)
        return bool((self.others if layer is None else layer).get("weight"))

    def casts(self, module: str) -> bool:
        """True when an entry for this very module, or a glob, says that its weight is cast."""
        weight = (self._named(module) or {}).get("weight")
        if not isinstance(weight, Mapping) or weight.get("dtype") not in ("float16", "bfloat16"):
            return False
        return not any(module == name or module.startswith(f"{name}.") for name in self.excluded)

    def attention(self) -> dict[str, tuple[str, TensorSpec]]:
        """Returns kind -> last step of the module that has its scale, and the spec, of the attention slots."""
        leaves = dict(PROJECTIONS)
        for leaf in filter(self._joined.__contains__, map(_leaf, self.caches)):
            leaves |= {kind: leaf for kind in CACHE if not self._output(PROJECTIONS[kind])}
        outputs = {kind: (leaf, f"*{leaf}", self._output(leaf)) for kind, leaf in leaves.items()}
        outputs[SOFTMAX] = ("", "softmax_quant_spec", self.softmax)
        found: dict[str, tuple[str, TensorSpec]] = {}
        for kind, (leaf, where, specs) in outputs.items():
            spec = read_spec(where, specs, activation=True)
            found |= {kind: (leaf, spec)} if spec is not None else {}
        return found

    def is_cached(self, module: str) -> bool:
        """True when the cache's scale may stand on the output of a module."""
        return any(fnmatch.fnmatchcase(module, key) for key in self.caches)

    def _named(self, module: str) -> Mapping[str, Any] | None:
        if module in self.layers:
            return self.layers[module] or {}
        return next((layer or {} for key, layer in self.globs.items() if fnmatch.fnmatchcase(module, key)), None)

    def _output(self, leaf: str) -> Any:
        found = ((layer or {}).get("output_tensors") for key, layer in self._entries if _leaf(key) == leaf)
        return next(filter(None, found), None)

    def _attends(self, module: str) -> bool:
        """True when the output of this module is an attention slot: a glob such as `*k_proj` says so."""
        leaf = module.rpartition(".")[2]
        return leaf in {*PROJECTIONS.values(), *self._joined} and bool(self._output(leaf))

    @property
    def _joined(self) -> set[str]:
        """Returns the last steps of linears that make both k and v."""
        return {*map(_leaf, self.caches)} - {*PROJECTIONS.values()}


def _leaf(glob: str) -> str:
    """Returns the last step of the names that a glob is for: `*language_model.*k_proj` -> `k_proj`."""
    return glob.rpartition(".")[2].lstrip("*")


def _read_layer(module: str, layer: Mapping[str, Any], *, own_output: bool) -> Slots:
    weight = read_spec(module, layer.get("weight"), activation=False)
    if weight is None:
        raise ModelError(
            "it has a weight scale, but the quantization config has no quantized weights",
            where=module,
            kind="E-SOURCE-CONTRADICTS",
        )
    return Slots(
        weight,
        read_spec(module, layer.get("input_tensors"), activation=True),
        read_spec(module, layer.get("output_tensors") if own_output else None, activation=True),
        read_spec(module, layer.get("bias"), activation=False),
    )


def _names(config: Mapping[str, Any], key: str) -> list[str]:
    found = config.get(key) or []
    if not isinstance(found, list):
        raise ModelError(f"{key} must be a list", where="quantization_config", kind="E-SOURCE-CONFIG")
    return [str(name) for name in found]


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise ModelError(f"{key} must be a mapping", where="quantization_config", kind="E-SOURCE-CONFIG")
    return found
