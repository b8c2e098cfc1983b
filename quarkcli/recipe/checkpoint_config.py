"""Reads the `quantization_config` of a quantized checkpoint as a recipe of ordered entries. Torch-free.

AMD Quark's, NVIDIA ModelOpt's (as in config.json, or the nested one of hf_quant_config.json) and that of
compressed-tensors. Algorithms are not on record in the latter two, and a note says so. Sources: exports of ModelOpt
0.47 and compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from quarkcli.errors import ConfigError, did_you_mean, in_brackets
from quarkcli.recipe import quark_config, strangers
from quarkcli.recipe.attributes import compressed_tensors
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.entries import TARGET_KINDS
from quarkcli.recipe.load import Path_
from quarkcli.recipe.match import slot_pattern
from quarkcli.recipe.normalize import Canonical, Cfg, Located, Normalized, Where, path_text, refusal

_LINEAR = "nn.Linear"
_UNRECORDED = (
    "the config does not say which algorithm was used; the weights are rounded to nearest unless you add 'algorithm'"
)


def read(data: Any, where: Where | None = None, base: Path_ = ()) -> Normalized | None:
    """Returns the entries of a `quantization_config`, or of a config.json with one; None for data that is neither.

    Raises ConfigError for a quantization method that is not understood, and with all problems of one that is.
    where, base  as in `normalize`
    """
    if isinstance(data, Mapping) and isinstance(data.get("quantization_config"), Mapping):
        data, base = data["quantization_config"], (*base, "quantization_config")
    if not isinstance(data, Mapping):
        return None
    at = where or path_text
    if isinstance(data.get("quantization"), Mapping) and "producer" in data:
        return _modelopt_nested(data["quantization"], at, (*base, "quantization"))
    if "quant_method" not in data:
        return None
    method = str(data["quant_method"])
    if method not in _READERS:
        known = strangers.advice(data)
        hint = known[1] if known else f"use one of {', '.join(_READERS)}"
        raise ConfigError(
            f"quark cannot read quant_method '{method}'",
            where=at((*base, "quant_method")),
            hint=hint,
            kind="E-RECIPE-KIND",
        )
    return _READERS[method](data, at, base)


class _Collector:
    """Entries and problems of one config."""

    def __init__(self, where: Where, base: Path_) -> None:
        self.where = where
        self.base = base
        self.found = Normalized([Canonical("*", None, False, place=base)], [(base, _UNRECORDED)])
        self.problems: list[Located] = []

    def module(self, pattern: str, cfgs: Mapping[str, Cfg], place: Path_, parent: str | None = None) -> None:
        """Entries for all four slots of modules; what `cfgs` leaves out is off."""
        for kind in TARGET_KINDS:
            cfg = cfgs.get(kind)
            slot = slot_pattern(pattern, f"{kind}_quantizer")
            self.found.entries.append(Canonical(slot, deepcopy(cfg), cfg is not None, parent, None, place))

    def cache(self, cfg: Cfg, place: Path_) -> None:
        for kind in ("k", "v"):
            self.found.kv.append(Canonical(f"*.{kind}_bmm_quantizer", deepcopy(cfg), True, place=place))

    def names(self, value: Any, path: Path_) -> list[str]:
        if value is None:
            return []
        if isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value):
            return list(value)
        self.problems.append((path, "must be a list of patterns"))
        return []

    def done(self) -> Normalized:
        if self.problems:
            raise refusal(self.problems, self.where)
        return self.found


# --- ModelOpt ---------------------------------------------------------------------------------------------------------

_FP8: dict[str, Any] = {"num_bits": [4, 3]}
_INT8: dict[str, Any] = {"num_bits": 8}
_INT8_ROWS: dict[str, Any] = {"num_bits": 8, "axis": 0}


def _groups(bits: Any, size: int, kind: str = "static", scale: list[int] | None = None) -> dict[str, Any]:
    more = {"scale_bits": scale} if scale else {}
    return {"num_bits": bits, "block_sizes": {-1: size, "type": kind, **more}}


def _nvfp4(size: int) -> dict[str, Any]:
    return _groups([2, 1], size, "dynamic", [4, 3])


_MXFP4, _MXFP8 = _groups([2, 1], 32, "dynamic", [8, 0]), _groups([4, 3], 32, "dynamic", [8, 0])
_FP8_TOKENS = {"num_bits": [4, 3], "type": "dynamic", "block_sizes": {-1: None}}
_FP8_TILES = {"num_bits": [4, 3], "block_sizes": {-1: 128, -2: 128}}
# quant_algo -> (usual group size, group size -> attributes of weight and input)
_ALGOS: dict[str, tuple[int, Callable[[int], dict[str, Cfg]]]] = {
    "FP8": (0, lambda size: {"weight": _FP8, "input": _FP8}),
    "FP8_PER_CHANNEL_PER_TOKEN": (0, lambda size: {"weight": {**_FP8, "axis": 0}, "input": _FP8_TOKENS}),
    "FP8_PB_WO": (0, lambda size: {"weight": _FP8_TILES}),
    "NVFP4": (16, lambda size: {"weight": _nvfp4(size), "input": _nvfp4(size)}),
    "NVFP4_AWQ": (16, lambda size: {"weight": _nvfp4(size), "input": _nvfp4(size)}),
    "W4A16_NVFP4": (16, lambda size: {"weight": _nvfp4(size)}),
    "W4A8_NVFP4_FP8": (32, lambda size: {"weight": _nvfp4(size), "input": _FP8}),
    "W4A16_AWQ": (128, lambda size: {"weight": _groups(4, size)}),
    "W4A8_AWQ": (128, lambda size: {"weight": [_groups(4, size), _FP8], "input": _FP8}),
    "W8A8_SQ_PER_CHANNEL": (0, lambda size: {"weight": _INT8_ROWS, "input": _INT8}),
    "W8A16": (0, lambda size: {"weight": _INT8_ROWS}),
    "MXFP4": (0, lambda size: {"weight": _MXFP4, "input": _MXFP4}),
    "MXFP8": (0, lambda size: {"weight": _MXFP8, "input": _MXFP8}),
    "W4A8_MXFP4_FP8": (0, lambda size: {"weight": _MXFP4, "input": _FP8}),
}
_MIXED = "MIXED_PRECISION"
_SVD = "NVFP4_SVD"
_CACHES: dict[str, Cfg] = {"FP8": _FP8, "NVFP4": _nvfp4(16), "INT8": _INT8}


def _modelopt_nested(data: Mapping[str, Any], where: Where, base: Path_) -> Normalized:
    cache = data.get("kv_cache_quant_algo")
    return _modelopt_read(data, "exclude_modules", cache, (*base, "kv_cache_quant_algo"), where, base)


def _modelopt(data: Mapping[str, Any], where: Where, base: Path_) -> Normalized:
    cache = data.get("kv_cache_scheme")
    if isinstance(cache, Mapping):  # the long form of fp8, the only one that has it
        cache = "FP8" if (cache.get("num_bits"), cache.get("type")) == (8, "float") else str(dict(cache))
    return _modelopt_read(data, "ignore", cache, (*base, "kv_cache_scheme"), where, base)


def _modelopt_read(
    data: Mapping[str, Any], ignored: str, cache: Any, cache_place: Path_, where: Where, base: Path_
) -> Normalized:
    out = _Collector(where, base)
    algo = data.get("quant_algo")
    if str(algo) == _MIXED:
        layers = data.get("quantized_layers")
        rows = layers.items() if isinstance(layers, Mapping) else ()
        for module, layer in sorted(rows, key=lambda row: not _is_list(row[0])):  # single ones of a list win
            place = (*base, "quantized_layers", module)
            given = layer if isinstance(layer, Mapping) else {}
            pattern = f"{module}.*" if _is_list(module) else str(module)
            _modelopt_module(out, pattern, given.get("quant_algo"), given.get("group_size"), place, None)
    elif algo is not None:
        _modelopt_module(out, "*", algo, _group_size(data), (*base, "quant_algo"), _LINEAR)
    for index, name in enumerate(out.names(data.get(ignored), (*base, ignored))):
        out.module(name, {}, (*base, ignored, index))
    if cache is not None and str(cache).upper() not in _CACHES:
        what = f"KV cache format '{cache}' is not supported, only {', '.join(_CACHES)}"
        out.problems.append((cache_place, what))
    elif cache is not None:
        out.cache(_CACHES[str(cache).upper()], cache_place)
    return out.done()


def _is_list(module: Any) -> bool:
    """True for the name of a layer's experts, which stands for all of them."""
    return str(module).rpartition(".")[2] == "experts"


def _group_size(data: Mapping[str, Any]) -> Any:
    """Returns the group size of the nested form, or of the first config group of the flat one."""
    groups = data.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    return data.get("group_size") or (weights.get("group_size") if isinstance(weights, Mapping) else None)


def _modelopt_module(out: _Collector, pattern: str, algo: Any, size: Any, place: Path_, parent: str | None) -> None:
    name = str(algo).upper()
    if name == _SVD:
        out.problems.append((place, f"{_SVD} is not supported: no checkpoint format here holds a low-rank part"))
        return
    if name not in _ALGOS:
        more = in_brackets(did_you_mean(name, _ALGOS))
        out.problems.append((place, f"quant_algo '{algo}' is unknown{more}"))
        return
    usual, cfgs = _ALGOS[name]
    wanted = usual if size is None or not usual else size
    if usual and (type(wanted) is not int or wanted < 1):
        out.problems.append((place, f"group_size must be a positive whole number, not {size!r}"))
        return
    out.module(pattern, cfgs(wanted), place, parent)


# --- compressed-tensors -----------------------------------------------------------------------------------------------

_ARGUMENTS = {"weights": "weight", "input_activations": "input", "output_activations": "output"}


def _compressed_tensors(data: Mapping[str, Any], where: Where, base: Path_) -> Normalized:
    """Returns the entries of groups: those for classes, then patterns, then names, the first of each kind last."""
    out = _Collector(where, base)
    if data.get("transform_config"):
        what = "'transform_config' is not supported: the rotations are part of the weights"
        out.problems.append(((*base, "transform_config"), what))
    groups = data.get("config_groups")
    if not isinstance(groups, Mapping):
        out.problems.append(((*base, "config_groups"), "config_groups must be a mapping"))
        groups = {}
    found: list[tuple[int, str, dict[str, Cfg], Path_]] = []
    for name, group in groups.items():
        place = (*base, "config_groups", name)
        cfgs = _group(group, place, out)
        targets = out.names(group.get("targets") if isinstance(group, Mapping) else None, (*place, "targets"))
        found = [*((_closeness(target), target, cfgs, place) for target in reversed(targets)), *found]
    for _, target, cfgs, place in sorted(found, key=lambda row: row[0]):
        pattern, parent = _target(target)
        out.module(pattern, cfgs, place, parent)
    for index, name in enumerate(out.names(data.get("ignore"), (*base, "ignore"))):
        pattern, parent = _target(name)
        out.module(pattern, {}, (*base, "ignore", index), parent)
    cache = data.get("kv_cache_scheme")
    if cache is not None:
        cfg = _arguments(cache, (*base, "kv_cache_scheme"), out, weight=False)
        if cfg is not None:
            out.cache(cfg, (*base, "kv_cache_scheme"))
    return out.done()


def _group(group: Any, place: Path_, out: _Collector) -> dict[str, Cfg]:
    if not isinstance(group, Mapping):
        out.problems.append((place, "a config group must be a mapping"))
        return {}
    return {
        kind: _arguments(group[key], (*place, key), out, weight=kind == "weight")
        for key, kind in _ARGUMENTS.items()
        if group.get(key) is not None
    }


def _arguments(value: Any, place: Path_, out: _Collector, *, weight: bool) -> Cfg:
    """Returns the native cfg of QuantizationArgs; None when they are refused."""
    try:
        return spec_to_yaml(compressed_tensors.to_spec(value, weight=weight))
    except ConfigError as error:
        out.problems.append((place, error.what + (f" ({error.hint})" if error.hint else "")))
        return None


def _closeness(target: str) -> int:
    return 1 if target.startswith("re:") else 0 if _is_class(target) else 2


def _is_class(target: str) -> bool:
    return re.fullmatch(r"[A-Z]\w*", target) is not None


def _target(target: str) -> tuple[str, str | None]:
    """Returns (module pattern, class) of a target.

    A target is a class name, a regular expression that need only match the beginning, or a name.
    """
    if target.startswith("re:"):
        return f"re:(?:{target[3:]}).*", None
    return ("*", f"nn.{target}") if _is_class(target) else (target, None)


_READERS: dict[str, Callable[[Mapping[str, Any], Where, Path_], Normalized]] = {
    "quark": quark_config.read,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed_tensors,
}
