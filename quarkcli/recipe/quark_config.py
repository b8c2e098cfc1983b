"""Turns AMD Quark's `QConfig` (JSON or YAML), or a checkpoint's `quantization_config`, into entries. Torch-free.

Quark's own precedence, as its release 0.13 applies it, written out as a list in which later wins: deny all, the global
config, layer types, layers (of two patterns that match, the first wins, so they stand in reverse), `exclude`. A layer
dictionary replaces all slots of a module: what it leaves out is off. Patterns are globs on the whole module name, and
only linears are meant. Apart from these stand cache and attention: `output_tensors` of a KV group become the k and v
slots, those of a `*q_proj` pattern the q slot, `softmax_quant_spec` the p slot. No exclusion reaches them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from quarkcli.errors import ConfigError, did_you_mean, in_brackets
from quarkcli.recipe import steps
from quarkcli.recipe.attributes import to_spec
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.load import Path_
from quarkcli.recipe.match import slot_pattern
from quarkcli.recipe.normalize import Canonical, Cfg, Located, Normalized, Where, path_text, refusal

_KEYS = (
    "global_quant_config", "layer_type_quant_config", "layer_quant_config", "kv_cache_quant_config", "kv_cache_group",
    "min_kv_scale", "kv_cache_post_rope", "shared_scale_groups", "sync_moe_expert_input_amax", "softmax_quant_spec",
    "exclude", "algo_config", "pre_quant_opt_config", "quant_mode", "quant_flow", "gpu_resident_blocks",
    "keep_prequantized_layers", "log_severity_level", "quant_method", "version", "export",
)  # fmt: skip
_EXPORT_KEYS = ("kv_cache_group", "min_kv_scale", "pack_method", "weight_format", "weight_merge_groups")
# Names of a layer's tensors in Quark -> slots of a scheme.
LAYER_KEYS = {"weight": "weight", "input_tensors": "input", "output_tensors": "output", "bias": "bias"}
_WEIGHTS = ("weight", "bias")
# Classes that older and newer releases wrap their arguments in when they are written out.
_WRAPPERS = (
    "Config", "QConfig", "quantization_config", "QuantizationConfig", "QLayerConfig", "QuantizationSpec",
    "QTensorConfig",
)  # fmt: skip
_PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
_CACHE = ("k", "v")
_MODES = ("eager_mode", "fx_graph_mode")
_LINEAR = "nn.Linear"
# What steers how Quark works, and has no meaning here, by the value that says nothing.
_STEERING = {
    "quant_flow": ("standard", "quark always works block by block"),
    "gpu_resident_blocks": (0, "quark always has one block in memory at a time"),
    "keep_prequantized_layers": (True, "quark always decodes a quantized model first"),
    "log_severity_level": (None, "use --log-level debug"),
}
_EXPORT_STEERING = {
    "pack_method": ("reorder", "the checkpoint format decides how codes are packed"),
    "weight_format": ("real_quantized", "quark always writes codes"),
    "weight_merge_groups": (None, "weights that servers multiply together always share their scale"),
}


def read(data: Any, where: Where | None = None, base: Path_ = ()) -> Normalized:
    """Returns the entries of a config, cache and attention apart. Raises ConfigError with all problems at once.

    where, base  as in `normalize`
    """
    reader = _Reader()
    data, base = _unwrapped(data, base)
    if isinstance(data, Mapping):
        reader.config(data, base)
    else:
        reader.refuse(base, "a Quark config must be a mapping with 'global_quant_config'")
    if reader.problems:
        raise refusal(reader.problems, where or path_text)
    return reader.found


def _unwrapped(value: Any, path: Path_) -> tuple[Any, Path_]:
    while isinstance(value, Mapping) and len(value) == 1 and (key := next(iter(value))) in _WRAPPERS:
        value, path = value[key], (*path, key)
    return value, path


class _Reader:
    """Walks one config; collects entries, notes and problems."""

    def __init__(self) -> None:
        self.found = Normalized()
        self.problems: list[Located] = []
        self.minimum = 0.0

    def refuse(self, path: Path_, text: str) -> None:
        self.problems.append((path, text))

    def note(self, path: Path_, text: str) -> None:
        self.found.notes.append((path, text))

    def known(self, value: Mapping[Any, Any], keys: tuple[str, ...], path: Path_) -> None:
        for key in value:
            if key not in keys:
                more = in_brackets(did_you_mean(str(key), keys))
                self.refuse((*path, key), f"unknown key '{key}'{more}")

    def mapping(self, data: Mapping[str, Any], key: str, path: Path_) -> dict[str, tuple[Any, Path_]]:
        """Returns a mapping from pattern to (value without wrappers, its place)."""
        value = data.get(key)
        if value is None:
            return {}
        if isinstance(value, Mapping) and all(isinstance(pattern, str) for pattern in value):
            return {pattern: _unwrapped(item, (*path, key, pattern)) for pattern, item in value.items()}
        self.refuse((*path, key), f"{key} must be a mapping from patterns")
        return {}

    def names(self, data: Mapping[str, Any], key: str, path: Path_) -> list[str]:
        value = data.get(key)
        if value is None:
            return []
        if isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value):
            return list(value)
        self.refuse((*path, key), f"{key} must be a list of patterns")
        return []

    # -- the parts, in order of precedence -------------------------------------------------------------------------

    def config(self, data: Mapping[str, Any], base: Path_) -> None:
        self.known(data, _KEYS, base)
        export = data.get("export") or {}
        if not isinstance(export, Mapping):
            self.refuse((*base, "export"), "export must be a mapping")
            export = {}
        self.known(export, _EXPORT_KEYS, (*base, "export"))
        self.minimum = self.least(data, base) or self.least(export, (*base, "export"))
        group = self.names(data, "kv_cache_group", base) + self.names(export, "kv_cache_group", (*base, "export"))
        layers = self.mapping(data, "layer_quant_config", base)
        caches = self.mapping(data, "kv_cache_quant_config", base)
        self.found.entries.append(Canonical("*", None, False, place=base))
        overall, place = _unwrapped(data.get("global_quant_config"), (*base, "global_quant_config"))
        if overall is not None:
            self.layer("*", overall, place, _LINEAR)
        elif not layers and not data.get("layer_type_quant_config"):
            self.refuse(base, "'global_quant_config' is missing")
        for name, (layer, place) in self.mapping(data, "layer_type_quant_config", base).items():
            self.layer("*", layer, place, self.class_of(name, place))
        for pattern, (layer, place) in reversed(layers.items()):
            own = _attends(pattern) is None and pattern not in group and pattern not in caches
            self.layer(pattern, layer, place, _LINEAR if "*" in pattern else None, output=own)
        for index, pattern in enumerate(self.names(data, "exclude", base)):
            for kind in LAYER_KEYS.values():
                self.entry(slot_pattern(pattern, f"{kind}_quantizer"), None, (*base, "exclude", index))
        self.attention(layers, caches, group, data, base)
        self.algorithms(data, base)
        self.steering(data, export, base)

    def least(self, data: Mapping[str, Any], path: Path_) -> float:
        value = data.get("min_kv_scale") or 0.0
        if not is_minimum(value):
            self.refuse((*path, "min_kv_scale"), f"min_kv_scale must be a number from 0 on, not {value!r}")
            return 0.0
        return float(value)

    def class_of(self, name: str, place: Path_) -> str:
        """Returns `class_name` of a class, and notes one that is not quantized as it is written."""
        parent = class_name(name)
        if parent not in (_LINEAR, "nn.Embedding"):
            self.note(place, f"quark does not quantize anything in modules of class {_written(name)}")
        return parent

    def layer(self, pattern: str, layer: Any, path: Path_, parent: str | None, *, output: bool = True) -> None:
        """Entries of all four kinds; `output`: whether its `output_tensors` are of the projection itself."""
        if layer is None:
            layer = {}
        if not isinstance(layer, Mapping):
            self.refuse(path, f"a layer's config must be a mapping with {', '.join(LAYER_KEYS)}")
            return
        self.known(layer, (*LAYER_KEYS, "target_device"), path)
        if layer.get("target_device") is not None:
            self.note((*path, "target_device"), "target_device has no effect here; --device chooses the device")
        for key, kind in LAYER_KEYS.items():
            value = layer.get(key) if output or kind != "output" else None
            cfg = self.cfg(value, (*path, key), weight=kind in _WEIGHTS)
            self.entry(slot_pattern(pattern, f"{kind}_quantizer"), cfg, (*path, key) if key in layer else path, parent)

    def entry(self, pattern: str, cfg: Cfg, place: Path_, parent: str | None = None) -> None:
        self.found.entries.append(Canonical(pattern, cfg, cfg is not None, parent, None, place))

    def cfg(self, value: Any, path: Path_, *, weight: bool) -> Cfg:
        """Returns the SPEC, or the list of them, as written; None for none, or for one that is refused."""
        value, path = _unwrapped(value, path)
        if not value:
            return None
        cfg: Any = [_unwrapped(item, path)[0] for item in value] if isinstance(value, list | tuple) else value
        try:
            to_spec(cfg, weight=weight)
        except ConfigError as error:
            self.refuse(path, error.what + (f" ({error.hint})" if error.hint else ""))
            return None
        return [dict(item) for item in cfg] if isinstance(cfg, list) else dict(cfg)

    # -- cache and attention ---------------------------------------------------------------------------------------

    def attention(
        self,
        layers: Mapping[str, tuple[Any, Path_]],
        caches: Mapping[str, tuple[Any, Path_]],
        group: list[str],
        data: Mapping[str, Any],
        base: Path_,
    ) -> None:
        """Slots of k and v from the KV group, of q from a pattern on q projections, of p from the softmax SPEC."""
        for pattern in group:
            if pattern not in layers and pattern not in caches:
                self.refuse(base, f"'{pattern}' of kv_cache_group has no entry in layer_quant_config")
        for pattern, (layer, place) in (dict(layers) | dict(caches)).items():
            kind = _attends(pattern)
            in_cache = pattern in group or pattern in caches
            if (kind is None and not in_cache) or not isinstance(layer, Mapping):
                continue
            cfg = self.cfg(layer.get("output_tensors"), (*place, "output_tensors"), weight=False)
            if in_cache and kind is None:
                self.note(place, f"k and v get the range of '{pattern}'")
            elif cfg is not None and not in_cache and kind in _CACHE:
                self.note(place, "output_tensors of a pattern for k or v projections quantize the KV cache")
            for one in (kind,) if kind else _CACHE:
                self.slot(pattern, one, cfg, (*place, "output_tensors"))
        at = (*base, "softmax_quant_spec")
        self.slot("*", "p", self.cfg(data.get("softmax_quant_spec"), at, weight=False), at)

    def slot(self, pattern: str, kind: str, cfg: Cfg, place: Path_) -> None:
        """The entry of an attention slot: `*self_attn.k_proj` -> `*self_attn.k_bmm_quantizer`."""
        if cfg is None:
            return
        if kind in _CACHE and self.minimum:
            cfg = with_minimum(cfg, self.minimum)
        above, dot, leaf = pattern.rpartition(".")
        head = f"{above}{dot}*" if "*" in leaf else above  # `*language_model.*k_proj` is below any module of it
        name = f"{kind}_bmm_quantizer"
        self.found.kv.append(Canonical(f"{head}.{name}" if head else name, cfg, True, place=place))

    # -- the rest --------------------------------------------------------------------------------------------------

    def algorithms(self, data: Mapping[str, Any], base: Path_) -> None:
        for key in ("pre_quant_opt_config", "algo_config"):
            read = steps.from_quark(data.get(key), (*base, key))
            self.found.algorithms += read.steps
            self.found.notes += read.notes
            self.problems += read.problems

    def steering(self, data: Mapping[str, Any], export: Mapping[str, Any], base: Path_) -> None:
        mode = str(data.get("quant_mode") or _MODES[0]).rpartition(".")[2]
        if mode not in _MODES:
            self.refuse((*base, "quant_mode"), f"quant_mode '{mode}' is unknown; use {' or '.join(_MODES)}")
        elif mode != _MODES[0]:
            self.note((*base, "quant_mode"), f"{mode} has no effect here; the checkpoint is the same")
        self.groups(data.get("shared_scale_groups"), (*base, "shared_scale_groups"))
        if data.get("sync_moe_expert_input_amax") is False:
            self.found.expert_inputs = "own"
        for table, values, path in ((_STEERING, data, base), (_EXPORT_STEERING, export, (*base, "export"))):
            for key, (nothing, why) in table.items():
                if values.get(key) not in (None, nothing):
                    self.note((*path, key), f"{key} has no effect here: {why}")

    def groups(self, value: Any, place: Path_) -> None:
        """Groups as asked for: these weights alone share, and others do not."""
        if value is None:
            return
        if not is_groups(value):
            self.refuse(place, f"shared_scale_groups must be a list of lists of names, not {value!r:.60}")
            return
        self.found.share = [(weight_slots(group), (*place, index)) for index, group in enumerate(value)]
        self.note(place, "only these weights share their per-tensor scale" if value else "no weights share their scale")


def class_name(name: str) -> str:
    """Returns `nn.Linear` for `Linear`, `nn.Linear`, `torch.nn.Linear` or `<class '...Linear'>`."""
    return f"nn.{_written(name).rpartition('.')[2]}"


def _written(name: str) -> str:
    """Returns a class as the file has it, without what `str` puts around it."""
    return name.removeprefix("<class '").removesuffix("'>")


def is_groups(value: Any) -> bool:
    """True when a value is a list of lists of names."""
    return isinstance(value, list | tuple) and all(
        isinstance(group, list | tuple) and group and all(isinstance(name, str) and name for name in group)
        for group in value
    )


def weight_slots(names: Iterable[str]) -> list[str]:
    """Returns patterns on the weight slots of modules with these leaf names."""
    return [f"*{name.lstrip('*')}.weight_quantizer" for name in names]


def _attends(pattern: str) -> str | None:
    """Returns the attention slot that a glob on projections stands for, k for `*k_proj`; None for a full name."""
    return _PROJECTIONS.get(pattern.rpartition(".")[2].lstrip("*")) if "*" in pattern else None


def is_minimum(value: Any) -> TypeGuard[float]:
    """True for what `min_kv_scale` may be: a number from 0 on."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def with_minimum(cfg: Any, minimum: float) -> dict[str, Any]:
    """Returns a cfg whose scale is at least `minimum`, which no SPEC can say, in the native words."""
    spec = to_spec(cfg, weight=False)
    if spec.scale is None:
        return dict(cfg)
    outer = replace(spec.scale.outermost, minimum=minimum)
    return spec_to_yaml(
        replace(spec, scale=replace(spec.scale, global_scale=outer) if spec.scale.global_scale else outer)
    )
