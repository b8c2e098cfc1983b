"""Works with lists of entries, and counts what a plan comes to, by the names of NVIDIA ModelOpt's functions.

The functions that change a plan are in `quarkcli.plan.edit`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from quarkcli import algorithms
from quarkcli.api.checked import checked
from quarkcli.errors import ConfigError, did_you_mean
from quarkcli.job import asked, preflight
from quarkcli.plan import sizes
from quarkcli.plan.model import Plan
from quarkcli.recipe.attributes import check_names
from quarkcli.recipe.entries import Origin
from quarkcli.recipe.normalize import normalize, path_text
from quarkcli.recipe.recipe import located

_SOURCE_BITS = 16
_LIST, _ALGORITHM, _PLAIN = "quant_cfg", "algorithm", "max"
_PATH_KEYS = ("quantizer_path", "quantizer_name")


class NoSuchEntry(ConfigError, KeyError):
    """No entry of the list has this path."""


def normalize_quant_cfg_list(quant_cfg: Any) -> list[dict[str, Any]]:
    """Returns the ordered list of any shape a `quant_cfg` may have.

    The shapes are entries, flat dicts, single-key dicts and class scopes.

    Every entry of the result has `quantizer_path`, `cfg` (only what was written, or None) and `enable`, and
    `parent_class` where there is one. Warns once (DeprecationWarning) of legacy shapes. Raises ConfigError with
    all that is wrong.
    """
    found = normalize(quant_cfg)
    for entry in found.entries:
        for index, stage in enumerate(entry.cfg if isinstance(entry.cfg, list) else [entry.cfg or {}]):
            at = (*entry.place, "cfg", index) if isinstance(entry.cfg, list) else (*entry.place, "cfg")
            located(Origin(path_text(at)), check_names, stage)
    if found.notes:
        text = "; ".join(f"{path_text(path)}: {note}" for path, note in found.notes)
        warnings.warn(text, DeprecationWarning, stacklevel=2)
    return [deepcopy(entry.as_dict()) for entry in found.entries]


@checked
def find_quant_cfg_entry_by_path(quant_cfg_list: Sequence[Mapping[str, Any]], quantizer_path: str) -> Mapping[str, Any]:
    """Returns the last entry whose path is exactly `quantizer_path`; it is the member itself, not a copy.

    Patterns are compared as text and match nothing. Raises NoSuchEntry, a ConfigError and a KeyError.
    """
    paths = [next((entry[key] for key in _PATH_KEYS if key in entry), None) for entry in quant_cfg_list]
    for entry, path in zip(reversed(quant_cfg_list), reversed(paths), strict=True):
        if path == quantizer_path:
            return entry
    written = [path for path in paths if isinstance(path, str)]
    hint = did_you_mean(quantizer_path, written, "write the path exactly as in the entry")
    raise NoSuchEntry(f"no entry has the path '{quantizer_path}'", hint=hint, kind="E-PYTHON-VALUE")


def update_quant_cfg_with_kv_cache_quant(quant_cfg: Any, kv_cache_quant_cfg: Any) -> Any:
    """Returns `quant_cfg` with the entries of the KV cache behind its own. It changes neither argument.

    Each may be a whole config (`{"quant_cfg": ..., "algorithm": ...}`) or only its list. A list gives a list. A whole
    config gives a whole config; if it names no algorithm, the algorithm is `max`, as in ModelOpt.
    """
    inner = kv_cache_quant_cfg.get(_LIST) if _is_whole(kv_cache_quant_cfg) else kv_cache_quant_cfg
    extra = normalize_quant_cfg_list(inner)
    if not _is_whole(quant_cfg):
        return [*normalize_quant_cfg_list(quant_cfg), *extra]
    config = deepcopy(dict(quant_cfg))
    config[_LIST] = [*normalize_quant_cfg_list(config[_LIST]), *extra]
    config[_ALGORITHM] = config.get(_ALGORITHM) or _PLAIN
    return config


def _is_whole(config: Any) -> bool:
    return isinstance(config, Mapping) and _LIST in config


@checked
def need_calibration(plan: Plan) -> bool:
    """Says whether `quantize` needs data for this plan.

    It does if some static scale of an input, an output or an attention operand is measured, or if an algorithm needs
    statistics. Slots that are off in the end, constant ranges and dynamic scales need none.
    """
    spelled_out = replace(plan, warnings=[])
    asked.advise(spelled_out)
    return bool(preflight.data_needs(plan, algorithms.pipeline(spelled_out)))


@checked
def estimate_quant_compression(plan: Plan) -> float:
    """Returns the stored bits per quantized weight, with scales and zero points, divided by 16.

    nvfp4 gives a little more than 4.5 / 16. Kept weights and caches do not count. Without a quantized weight it is 1.0.
    (ModelOpt's function of this name looks only at the smallest number format of a config.)
    """
    return sizes.effective_bits(plan) / _SOURCE_BITS if any(plan.quantized()) else 1.0
