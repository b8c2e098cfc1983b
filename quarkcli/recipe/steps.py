"""Turns algorithm settings of AMD Quark and NVIDIA ModelOpt into (method, parameters) as recipes list them. Torch-free.

Fields are checked against the tables of their system (Quark 0.13, ModelOpt 0.47), and said in our words
(`peer_steps`); what only steers how the other system computes is left out and noted. Quark's `inside_layer_modules` of
a solver becomes the `slots` it works on, `scaling_layers` is kept as a parameter; the one known form of a `condition`
is parsed, and nothing is ever evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quarkcli.errors import did_you_mean, in_brackets
from quarkcli.recipe import peer_steps
from quarkcli.recipe.entries import SLOTS
from quarkcli.recipe.load import Path_
from quarkcli.recipe.normalize import Located, Step
from quarkcli.spec import E4M3_SPAN


@dataclass
class Steps:
    """Holds the steps, notes and problems that were read."""

    steps: list[Step] = field(default_factory=list)
    notes: list[Located] = field(default_factory=list)
    problems: list[Located] = field(default_factory=list)


# --- kinds of fields: None, or what is wrong --------------------------------------------------------------------------

_Check = Callable[[Any], "str | None"]
_LARGEST = 1e9  # no number of these fields is near it; floats of any size, infinity and NaN are not let through


def _number(value: Any) -> str | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return None if good else "must be a number"


def _positive(value: Any) -> str | None:
    return _number(value) or (None if value > 0 else "must be a positive number")


def _whole(value: Any) -> str | None:
    return None if type(value) is int and 0 <= value <= _LARGEST else "must be a whole number, not below 0"


def _count(value: Any) -> str | None:
    return _whole(value) or (None if value else "must be at least 1")


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "must be text"


def _texts(value: Any) -> str | None:
    good = isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value)
    return None if good else "must be a list of names"


def _some_texts(value: Any) -> str | None:
    return _texts(value) or (None if value else "names no module; leave it out to name all")


def _mapping(value: Any) -> str | None:
    return None if isinstance(value, Mapping) else "must be a mapping"


def _switch(value: Any) -> str | None:
    return None if isinstance(value, bool | Mapping) else "must be true, false or a mapping"


def _percentage(value: Any) -> str | None:
    return _number(value) or (None if 0 < value <= 100 else "must be more than 0 and at most 100")


def _share(value: Any) -> str | None:
    return _number(value) or (None if 0 < value <= 1 else "must be more than 0 and at most 1")


def _headroom(value: Any) -> str | None:
    return _number(value) or (
        None if 0 < value < E4M3_SPAN else f"must lie between 0 and {E4M3_SPAN}, the span of e4m3"
    )


_PAIRS: dict[str, _Check] = {
    "prev_op": _text,
    "layers": _texts,
    "inp": _text,
    "module2inspect": _text,
    "condition": _text,
    "help": _text,
    "has_kwargs": _flag,
}
_ROTATION_PAIRS: dict[str, _Check] = {
    "prev_modules": _texts,
    "norm_module": _text,
    "next_modules": _texts,
    "target_modules": _texts,
}
_ROTATION_PLACES = ("first_layer", "middle_layers", "last_layer")
# What a row says beside the channels, and why it has no effect.
_ROW_STEERING = ("inp", "module2inspect", "has_kwargs")
_ROW_READERS = "quark judges channels by the output of all weights that read them"
_SAME_SHAPE = re.compile(r"\s*(?:module\.)?([\w.]+)\.shape\s*==\s*(?:module\.)?([\w.]+)\.shape\s*")


def _rows(value: Any, known: Mapping[str, _Check]) -> str | None:
    """Returns the problem with a value that must be a list of mappings with known keys, else None."""
    if not isinstance(value, list | tuple):
        return "must be a list"
    for row in value:
        if not isinstance(row, Mapping):
            return f"holds {row!r}, which is no mapping"
        for key, item in row.items():
            if key not in known:
                return f"has the unknown key '{key}'{in_brackets(did_you_mean(str(key), known))}"
            if item is not None and (wrong := known[key](item)):
                return f"has a '{key}' that {wrong}"
    return None


def _pairs(value: Any) -> str | None:
    """Returns the problem with Quark's scaling_layers (what is scaled, and what takes it back), else None."""
    if wrong := _rows(value, _PAIRS):
        return wrong
    for row in value:
        if "prev_op" not in row or "layers" not in row:
            return "must have 'prev_op' and 'layers' in every row"
        if row.get("condition") is not None and not _SAME_SHAPE.fullmatch(row["condition"]):
            return f"has the condition {row['condition']!r}, which is not of the form 'A.shape == B.shape'"
    return None


def _places(value: Any) -> str | None:
    """Returns the problem with the scaling_layers of a rotation, else None."""
    if not isinstance(value, Mapping) or set(value) - set(_ROTATION_PLACES):
        return f"must be a mapping with {', '.join(_ROTATION_PLACES)}"
    return next((wrong for rows in value.values() if (wrong := _rows(rows, _ROTATION_PAIRS))), None)


def _parsed(rows: Any) -> list[dict[str, Any]]:
    """Returns scaling_layers with every condition taken apart: `{same_shape: [A, B]}`."""
    out = []
    for row in rows:
        found = _SAME_SHAPE.fullmatch(row.get("condition") or "")
        rest = {key: value for key, value in row.items() if key != "condition" and value is not None}
        out.append(rest | ({"condition": {"same_shape": [found[1], found[2]]}} if found else {}))
    return out


# --- tables -----------------------------------------------------------------------------------------------------------

_BLOCKS: dict[str, _Check] = {"inside_layer_modules": _some_texts, "model_decoder_layers": _text}
_SCALED: dict[str, _Check] = {"scaling_layers": _pairs, "model_decoder_layers": _text}
_COLUMNS: dict[str, _Check] = {"block_size": _count, "desc_act": _flag}
_QUARK: dict[str, dict[str, _Check]] = {
    "awq": _SCALED,
    "gptq": _BLOCKS | _COLUMNS | {"damp_percent": _number, "true_sequential": _flag},
    "gptaq": _BLOCKS | _COLUMNS | {"damp_percent": _number, "alpha": _number},
    "qronos": _BLOCKS | _COLUMNS | {"alpha": _number, "beta": _number},
    "smoothquant": _SCALED | {"alpha": _number, "scale_clamp_min": _number},
    "autosmoothquant": _SCALED | {"compute_scale_loss": _text},
    "rotation": {
        "scaling_layers": _places,
        **dict.fromkeys(("r1", "r2", "r3", "r4", "random_r1", "random_r2", "online_r1_rotation"), _flag),
        **dict.fromkeys(("backbone", "model_decoder_layers", "v_proj", "o_proj", "self_attn", "mlp"), _text),
        "rotation_size": _count,
        "online_config": _mapping,
    },
    "autoround": _BLOCKS
    | {"iters": _whole, "lr": _number, "enable_minmax_tuning": _flag, "minmax_lr": _number, "batch_size": _count},
}
_QUARK_NAMES = {"smooth": "smoothquant", "quarot": "rotation"}
_QUARK_REFUSED = {
    "svdquant": "no checkpoint format here holds a low-rank part beside a weight",
    "twobitscalar": "it is an experimental feature of AMD Quark",
}
_LEARNED = ("trainable", "train_smooth", "smooth_positions")
_NO_MEANING = {
    "moe_calib_experts_ratio": "use --moe-calibration",
    "num_attention_heads": "quark reads it from the model",
    "num_key_value_heads": "quark reads it from the model",
    "fused": "it changes only a kernel",
    "debug": "it changes only messages",
    "distributed_sync": "quark always joins the statistics of all processes",
    "layerwise": "quark always works on one block after the other",
    "sync_expert_weight_amax": "weights that share a scale always share it",
    "skip_forward_without_activation_calib": "quark runs the model only if a scale needs it",
    "shared_states": "scale groups come from the model family",
}
# Modules of a block that a solver works on, by the ends of their names: what is left is rounded to nearest.
_INSIDE = "inside_layer_modules"
_SLOTTED = {"gptq", "gptaq", "qronos", "autoround"}
_MODELOPT_COMMON: dict[str, _Check] = {"moe_calib_experts_ratio": _share, "layerwise": _switch}
_SWEEP: dict[str, _Check] = {
    **dict.fromkeys(("step_size", "start_multiplier", "stop_multiplier"), _positive),
    "fp8_scale_sweep": _flag,
    "distributed_sync": _flag,
    "shared_states": _mapping,
}
_AWQ_LITE: dict[str, _Check] = {"alpha_step": _share, "debug": _flag}
_AWQ_CLIP: dict[str, _Check] = {
    **dict.fromkeys(("max_co_batch_size", "max_tokens_per_batch"), _count),
    **dict.fromkeys(("min_clip_ratio", "shrink_step"), _positive),
    "debug": _flag,
}
_MODELOPT: dict[str, dict[str, _Check]] = {
    "max": {
        **dict.fromkeys(("distributed_sync", "sync_expert_weight_amax"), _flag),
        "skip_forward_without_activation_calib": _flag,
        "shared_states": _mapping,
    },
    "mse": _SWEEP,
    "local_hessian": _SWEEP | {"block_size": _count, "debug": _flag},
    "smoothquant": {"alpha": _number},
    "awq_lite": _AWQ_LITE,
    "awq_clip": _AWQ_CLIP,
    "awq_full": _AWQ_LITE | _AWQ_CLIP,
    "gptq": {"perc_damp": _number, "block_size": _count, "fused": _flag},
    "nvfp4_act_headroom": {
        **dict.fromkeys(("anchor_percentile", "upper_percentile"), _percentage),
        "rho": _headroom,
    },
}
_MODELOPT_REFUSED = {
    "svdquant": "no checkpoint format here holds a low-rank part beside a weight",
    "lsq": "scales are learned only in training",
}
_OF_WEIGHTS = "weight_scale_algorithm"
# Ranges are always found, so this asks for nothing more.
_PLAIN = "max"


# --- reading ----------------------------------------------------------------------------------------------------------


def from_quark(value: Any, path: Path_) -> Steps:
    """Returns the steps of Quark's `algo_config` or `pre_quant_opt_config`: a mapping, a list of them, or null."""
    return _listed(value, path, _quark_step)


def _listed(value: Any, path: Path_, step: Callable[[Any, Path_, Steps], None]) -> Steps:
    """Returns the steps of one row or of a list of them; `step` takes a row in."""
    out = Steps()
    rows = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for index, row in enumerate(rows):
        step(row, (*path, index) if isinstance(value, list | tuple) else path, out)
    return out


def _quark_step(row: Any, path: Path_, out: Steps) -> None:
    if isinstance(row, Mapping) and len(row) == 1 and str(next(iter(row))).endswith("Config"):
        ((key, inner),) = row.items()  # a class and its arguments, as in Python
        row = {"name": key.removesuffix("Config").lower()} | dict(inner) if isinstance(inner, Mapping) else inner
    if not isinstance(row, Mapping) or not isinstance(row.get("name"), str):
        out.problems.append((path, "an algorithm must be a mapping with 'name'"))
        return
    given = {key: item for key, item in row.items() if key != "name" and item is not None}
    old = row["name"].lower()
    if "random" in given:
        given = {"random_r1": given["random"], "random_r2": given["random"]} | given
        del given["random"]
    if old != _QUARK_NAMES.get(old, old) and old not in _QUARK:
        out.notes.append(((*path, "name"), f"'{old}' is called '{_QUARK_NAMES[old]}' today"))
    if old == "quarot":
        given = dict.fromkeys(("r1", "r2", "r3", "r4"), True) | given
    for key in _LEARNED:
        if given.pop(key, None):
            out.problems.append(((*path, key), f"'{key}' is not supported: transforms are learned only in training"))
    if given.pop("static_groups", True) is False:
        at = (*path, "static_groups")
        if given.get("desc_act", True) is not False:
            text = (
                "static_groups: false does not work together with desc_act, because groups are static here; "
                "write desc_act: false"
            )
            out.problems.append((at, text))
        else:
            out.notes.append(
                (at, "static_groups has no effect: quark always finds the scales of groups first and keeps them")
            )
    if isinstance(given.get("online_config"), Mapping):
        given["online_config"] = {k: v for k, v in given["online_config"].items() if k != "shared_input_rotation"}
    _finish(_QUARK_NAMES.get(old, old), given, _QUARK, _QUARK_REFUSED, path, out)


def from_modelopt(value: Any, path: Path_) -> Steps:
    """Returns the steps of ModelOpt's `algorithm`: a method, a mapping, a list of them, or null (no calibration)."""
    return _listed(value, path, _modelopt_step)


def _modelopt_step(row: Any, path: Path_, out: Steps) -> None:
    given = {"method": row} if isinstance(row, str) else row
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        out.problems.append((path, "an algorithm must be the name of a method, or a mapping with 'method'"))
        return
    rest = {key: item for key, item in given.items() if key != "method" and item is not None}
    weights = rest.pop(_OF_WEIGHTS, None) if given["method"] == "nvfp4_act_headroom" else None
    _finish(given["method"], rest, _MODELOPT, _MODELOPT_REFUSED, path, out)
    if weights is not None:  # it is about inputs alone, and holds another step for the weights
        _modelopt_step(weights, (*path, _OF_WEIGHTS), out)


def _finish(
    name: str,
    given: dict[str, Any],
    known: Mapping[str, Mapping[str, _Check]],
    refused: Mapping[str, str],
    path: Path_,
    out: Steps,
) -> None:
    """Checks the fields of one algorithm and lists it under our names."""
    if name in refused:
        out.problems.append((path, f"'{name}' is not supported: {refused[name]}"))
        return
    if name not in known:
        more = in_brackets(did_you_mean(name, known)) or f"; known: {', '.join(known)}"
        out.problems.append((path, f"algorithm '{name}' is unknown{more}"))
        return
    common = _MODELOPT_COMMON if known is _MODELOPT else {"num_attention_heads": _count, "num_key_value_heads": _count}
    checks = {**common, **known[name]}
    words = (peer_steps.MODELOPT if known is _MODELOPT else peer_steps.QUARK).get(name, peer_steps.Words(name))
    left_out = {**_NO_MEANING, **words.left_out}
    fields: dict[str, Any] = {}
    for key, value in given.items():
        at = (*path, key)
        if key not in checks:
            more = in_brackets(did_you_mean(str(key), checks)) or f"; known: {', '.join(checks)}"
            out.problems.append((at, f"{name} has no field '{key}'{more}"))
        elif wrong := checks[key](value):
            out.problems.append((at, f"{key} {wrong}"))
        elif key == _INSIDE and name in _SLOTTED:
            fields[SLOTS] = [f"*{module.lstrip('*')}.weight_quantizer" for module in value]
        elif key in left_out:
            out.notes.append((at, f"{key} has no effect: {left_out[key]}"))
        elif checks[key] is not _pairs:
            fields[key] = value
        elif value:  # without rows, those of the model family
            fields[key] = _parsed(value)
            if said := [name for name in _ROW_STEERING if any(row.get(name) is not None for row in value)]:
                out.notes.append((at, f"{', '.join(said)} in {key} have no effect: {_ROW_READERS}"))
        if key in fields and key in words.otherwise:
            out.notes += [(at, text) for said, text in words.otherwise[key].items() if said == value]
    out.problems += [((*path, key), f"'{key}' is not supported: {why}") for key, why in words.refused(fields)]
    if name != _PLAIN:
        out.steps += words.steps(fields)
