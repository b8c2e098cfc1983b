"""Writes and reads ModelOpt's algorithms and its two configs: in config.json and `hf_quant_config.json`. Torch-free.

As in exports of nvidia-modelopt 0.47, and as vLLM 0.32 reads them (`quantization/modelopt.py`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from quarkcli.dialects import _sglang as sglang
from quarkcli.dialects import _shared as shared
from quarkcli.dialects._kinds import Kinds, kinds_of
from quarkcli.dialects.base import Bar, Classes
from quarkcli.errors import ModelError
from quarkcli.plan.model import Plan, QuantizedTarget

NAME = "modelopt"
NESTED_FILE = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
# The release whose config this is; readers look at the name alone.
PRODUCER = {"name": NAME, "version": "0.47.0"}


class Algo(NamedTuple):
    """An algorithm: its kinds, its group size, and what `config_groups` says of inputs and weights; None: nothing."""

    kinds: Kinds
    group: int | None = None
    inputs: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None


_FLOAT8: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
_FLOAT4: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
# Servers take FP8_PB_WO for blocks with inputs that are quantized in groups, whatever its name says.
ALGOS: dict[str, Algo] = {
    "FP8": Algo(("fp8 tensor", "fp8 static"), None, _FLOAT8, _FLOAT8),
    "FP8_PER_CHANNEL_PER_TOKEN": Algo(("fp8 channel", "fp8 token")),
    "FP8_PB_WO": Algo(("fp8 tile", "fp8 group")),
    "NVFP4": Algo(("nvfp4", "nvfp4"), 16, _FLOAT4, _FLOAT4),
    "W4A16_NVFP4": Algo(("nvfp4", "none"), 16, None, _FLOAT4),
    "MXFP8": Algo(("mxfp8", "mxfp8"), 32),
}
# ModelOpt writes these as well, and vLLM and transformers do not read them.
_READ = {
    **ALGOS,
    "MXFP4": Algo(("mxfp4", "mxfp4"), 32),
    "W4A16_AWQ": Algo(("int4 group", "none")),
    "W4A8_AWQ": Algo(("int4 group", "fp8 static")),
    "W8A16": Algo(("int8 channel", "none")),
    "W8A8_SQ_PER_CHANNEL": Algo(("int8 channel", "int8 static")),
    "W4A8_NVFP4_FP8": Algo(("nvfp4", "fp8 static"), 32),
}
_AWQ_GROUP = 128  # where a config does not say it
_NAMES = {algo.kinds: name for name, algo in ALGOS.items()}
HOLDS = frozenset(_NAMES)
_FP8_CACHE = "FP8"
_FP8, _NVFP4, _NVFP4_WEIGHTS = (ALGOS[name].kinds for name in ("FP8", "NVFP4", "W4A16_NVFP4"))


def _sglang_faults(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Returns what SGLang does not load besides, of configs that name every module with its algorithm."""
    layers = config.get("quantized_layers") or {}
    algos = {str(layer.get("quant_algo")) for layer in layers.values()}
    found = sglang.unsaid(plan, layers)
    if layers and not algos & {"NVFP4", "W4A16_NVFP4"}:
        found.append(f"{MIXED} without NVFP4 is taken for another method (w4afp8)")
    return found


# SGLang 0.5.23: it refuses other algorithms, or looks for the scales of MXFP8 and of tiles under other names.
# TensorRT-LLM: other algorithms have no name in its `QuantAlgo`, or no class for linears in the source that was read.
CLASSES = {
    sglang.NAME: Classes(
        frozenset({_FP8, _NVFP4, _NVFP4_WEIGHTS}),
        frozenset({_FP8, _NVFP4, _NVFP4_WEIGHTS}),
        "ModelOptFp8Config, ModelOptFp4Config, ModelOptMixedPrecisionConfig in layers/quantization/modelopt_quant.py",
        heads=True,
        faults=_sglang_faults,
    ),
    "tensorrt-llm": Classes(
        frozenset({_FP8, _NVFP4, ALGOS["FP8_PER_CHANNEL_PER_TOKEN"].kinds}),
        frozenset({_FP8, _NVFP4}),
        "ModelConfig._build_modelopt_quant_config in tensorrt_llm/_torch/model_config.py; get_quant_method in "
        "tensorrt_llm/_torch/modules/linear.py; CutlassFusedMoE._get_quant_method",
    ),
}
BARS = {
    sglang.NAME: (
        Bar("*", "*", "cdna2 cdna3 cdna4", "modelopt is not in rocm_supported_quantization"),
        Bar("fp8 *", "*", "ampere", "ModelOptFp8Config asks for compute capability 8.9"),
    )
}


def algo_of(target: QuantizedTarget) -> str:
    """Returns the algorithm of a target that the dialect holds."""
    found = kinds_of(shared.pair_of(target))
    assert found is not None
    return _NAMES[found]


# --- writing -------------------------------------------------------------------------------------------------------


def config_of(plan: Plan) -> dict[str, Any]:
    """Returns the `quantization_config`: one algorithm and the modules left out, or an algorithm for each module.

    Servers leave a module out when an entry is part of its name. Where that would hit quantized modules, as `mlp.gate`
    hits `mlp.gate_proj`, every module is named with its algorithm instead.
    """
    algos = {target.name: algo_of(target) for target in plan.quantized()}
    left = _left_out(plan)
    harmless = [entry for entry in left if not _hits(entry, algos)]
    mixed = len(set(algos.values())) != 1 or len(harmless) != len(left)
    name = MIXED if mixed else next(iter(algos.values()))
    found: dict[str, Any] = {"quant_method": NAME, "quant_algo": name, "producer": PRODUCER}
    if mixed:
        found["quantized_layers"] = {module: _layer(algo) for module, algo in algos.items()}
    else:
        found |= _described(ALGOS[name])
    found["ignore"] = harmless
    if any(shared.cached(plan)):
        found["kv_cache_scheme"] = _FLOAT8
    return found


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of `hf_quant_config.json` that says what the flat config says."""
    inner: dict[str, Any] = {
        "quant_algo": config["quant_algo"],
        "kv_cache_quant_algo": _FP8_CACHE if "kv_cache_scheme" in config else None,
        "exclude_modules": config["ignore"],
    }
    inner |= {key: config[key] for key in ("group_size", "quantized_layers") if key in config}
    return {"producer": config["producer"], "quantization": inner}


def _layer(name: str) -> dict[str, Any]:
    group = ALGOS[name].group
    return {"quant_algo": name} | ({} if group is None else {"group_size": group})


def _described(algo: Algo) -> dict[str, Any]:
    found: dict[str, Any] = {} if algo.group is None else {"group_size": algo.group}
    if algo.weights is not None:
        group = {"weights": algo.weights, "targets": ["Linear"]}
        if algo.inputs is not None:
            group["input_activations"] = algo.inputs
        found["config_groups"] = {"group_0": group}
    return found


def _left_out(plan: Plan) -> list[str]:
    """Returns names of unquantized linears; `<layer>.experts*` where none of a layer's experts is quantized."""
    left = shared.unquantized(plan)
    whole = shared.whole_layers(plan, left)
    names = (f"{whole[target.name]}*" if target.name in whole else target.name for target in left)
    return [*dict.fromkeys(names), *shared.further(plan)]


def _hits(entry: str, modules: Iterable[str]) -> bool:
    """True when an entry that names modules left out is part of the name of one of these."""
    text = entry.removesuffix("*")
    return any(text in module for module in modules)


# --- reading -------------------------------------------------------------------------------------------------------


def is_modelopt(config: Mapping[str, Any]) -> bool:
    """True for a flat config of ModelOpt, and for a nested one, which names its producer instead of a method."""
    if str(config.get("quant_method", "")).lower().startswith(NAME):
        return True
    producer = config.get("producer")
    nested_form = "quant_method" not in config and isinstance(config.get("quantization"), Mapping)
    return nested_form and isinstance(producer, Mapping) and producer.get("name") == NAME


def flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a checked config in the flat form, whichever form it has."""
    inner = config.get("quantization")
    if inner is None:
        return config
    return {
        "quant_method": NAME,
        "quant_algo": inner.get("quant_algo"),
        "group_size": inner.get("group_size"),
        "ignore": inner.get("exclude_modules"),
        "kv_cache_scheme": inner.get("kv_cache_quant_algo"),
        "quantized_layers": inner.get("quantized_layers"),
    }


class LayerReader:
    """The algorithm of each module, from a flat config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._layers = config.get("quantized_layers") or {}
        name = str(config.get("quant_algo") or "").upper()
        if name == MIXED and not self._layers:
            raise ModelError(
                f"{MIXED} needs quantized_layers, which is missing",
                where="quant_algo",
                kind="E-SOURCE-CONTRADICTS",
            )
        groups = (config.get("config_groups") or {}).values()
        if name == "NVFP4" and groups and not any(group.get("input_activations") for group in groups):
            name = "W4A16_NVFP4"
        self._all = None if name == MIXED else {"quant_algo": name, "group_size": config.get("group_size")}
        self._ignored = [part for entry in config.get("ignore") or [] for part in _parts(entry)]

    def algo(self, module: str) -> Algo:
        """Returns the algorithm of a module that has a scale. Raises ModelError for none, and for one not read."""
        if any(fnmatch.fnmatchcase(module, entry) for entry in self._ignored):
            raise ModelError(
                "it has a weight_scale, but the quantization config ignores it",
                where=module,
                kind="E-SOURCE-CONTRADICTS",
            )
        given = self._given(module)
        if given is None:
            raise ModelError(
                "it has a weight_scale, but quantized_layers does not name it",
                where=module,
                kind="E-SOURCE-CONTRADICTS",
            )
        name = str(given.get("quant_algo") or "").upper()
        if name not in _READ:
            what = f"this version cannot read quant_algo {name or None!r}"
            raise ModelError(
                what, where=module, hint=f"use one of {', '.join(_READ)}, or {MIXED} of them", kind="E-SOURCE-FORMAT"
            )
        group = given.get("group_size")
        if group is not None and _READ[name].group not in (None, group):
            raise ModelError(
                f"this version cannot read {name} in groups of {group}", where=module, kind="E-SOURCE-FORMAT"
            )
        algo = _READ[name]
        return algo._replace(group=group or _AWQ_GROUP) if algo.kinds[0].endswith(" group") else algo

    def names(self, module: str) -> bool:
        """True when the config gives the module an algorithm."""
        return self._given(module) is not None

    def _given(self, module: str) -> Mapping[str, Any] | None:
        """Returns the entry of a module, or of the closest module it is in."""
        if self._all is not None:
            return self._all
        parts = module.split(".")
        names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self._layers[name] for name in names if name in self._layers), None)


def _parts(entry: str) -> list[str]:
    """Returns an entry as servers take it: `a*` is `a` and all below it, not `ab`."""
    if entry.endswith("*") and not entry.endswith(".*"):
        return [entry[:-1], f"{entry[:-1]}.*"]
    return [entry]


def cache_of(config: Mapping[str, Any]) -> bool:
    """True when a flat config says that k and v are cached as 8-bit floats. Raises ModelError for other caches."""
    scheme = config.get("kv_cache_scheme")
    if not scheme:
        return False
    name = scheme.upper() if isinstance(scheme, str) else None
    if name == _FP8_CACHE or (name is None and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)):
        return True
    raise ModelError(
        f"this version cannot read a KV cache of {scheme}", where="kv_cache_scheme", kind="E-SOURCE-FORMAT"
    )
