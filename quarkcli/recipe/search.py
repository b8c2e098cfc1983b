"""Turns ModelOpt's steps that only choose ranges into properties of the specs. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from quarkcli.errors import ConfigError
from quarkcli.recipe.attributes import to_spec
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.entries import Entry
from quarkcli.recipe.match import matches, with_flags
from quarkcli.spec import OBSERVERS, ObserverSpec, TensorSpec

_WEIGHT, _INPUT = "weight_quantizer", "input_quantizer"
# ModelOpt's defaults: multipliers of amax.
START, STOP, STEP = 0.25, 4.0, 0.1
# What the observer `headroom` takes -> its name there; the defaults are the same.
_ENDS = {"anchor": "anchor_percentile", "upper": "upper_percentile", "rho": "rho"}

Step = tuple[str, dict[str, Any]]
_Change = Callable[[dict[str, Any], TensorSpec], TensorSpec]


def with_search(steps: Sequence[Step], entries: Sequence[Entry]) -> tuple[list[Step], list[Entry]]:
    """Returns the steps without `mse` and `nvfp4_act_headroom`, and the entries with ranges found as these ask for it.

    mse: block scales of nvfp4 weights are swept through all their codes with `fp8_scale_sweep`; every other range of
    weights is shrunk to the least squared error, from amax down to `start_multiplier` times amax. Stretching a range
    never pays here and is not tried. nvfp4_act_headroom: inputs in nvfp4 take the observer `headroom`.
    """
    listed = list(entries)
    for name, asked in steps:
        if name in _CHANGES:
            kind, change = _CHANGES[name]
            listed = [made for entry in listed for made in _changed(entry, kind, partial(change, asked))]
    return [step for step in steps if step[0] not in _CHANGES], listed


def _changed(entry: Entry, kind: str, change: Callable[[TensorSpec], TensorSpec]) -> list[Entry]:
    """Returns the entry with its spec changed, if it gives slots of this kind one.

    Where it gives others one too, as `*` does, another entry behind it has the change, for this kind alone.
    """
    if entry.cfg is None:
        return [entry]
    pattern = entry.quantizer_path if _is_of(entry.quantizer_path, kind) else _narrowed(entry.quantizer_path, kind)
    if pattern is None:
        return [entry]
    try:
        spec = to_spec(entry.cfg, weight=kind == _WEIGHT)
    except ConfigError:  # the cfg is for slots of other kinds, as of `*softmax*`
        return [entry]
    changed = change(spec)
    made = [] if changed == spec else [replace(entry, quantizer_path=pattern, cfg=spec_to_yaml(changed))]
    return made if made and pattern == entry.quantizer_path else [entry, *made]


def _is_of(pattern: str, kind: str) -> bool:
    """True for a pattern that names a kind of slots; an expression with alternatives may name another beside it."""
    return kind in pattern and not (pattern.startswith("re:") and "|" in pattern)


def _narrowed(pattern: str, kind: str) -> str | None:
    """Returns what a pattern matches of one kind of slots: `*mlp*weight_quantizer` of `*mlp*`; None for nothing.

    It is cut where its end matches the kind first; a star stands on both sides of the cut: `*weight_quantizer` of
    `*weight*`, whose later cuts match less.
    """
    if pattern.startswith("re:"):
        flags, rest = with_flags(pattern[3:])
        return f"re:{flags}(?=.*{kind}$)(?:{rest})"
    for at, character in enumerate(pattern):
        if matches(pattern[at:], [kind]):
            return f"{pattern[:at]}{'*' if character == '*' else ''}{kind}"
    return None


def _searched(asked: dict[str, Any], spec: TensorSpec) -> TensorSpec:
    if spec.then is not None or spec.scale is None:
        return spec
    blocks = spec.scale.dtype == "e4m3" and spec.element == "fp4_e2m1"
    if blocks and asked.get("fp8_scale_sweep"):
        return replace(spec, scale=replace(spec.scale, rule="sweep"))
    if spec.scale.rule == "four_over_six":
        return spec
    start, step = float(asked.get("start_multiplier", START)), float(asked.get("step_size", STEP))
    if start >= 1:
        return spec
    steps = float(round((1 - start) / step) + 1)
    return replace(spec, observer=ObserverSpec("mse", (("steps", steps), ("shrink", start))))


def _with_headroom(asked: dict[str, Any], spec: TensorSpec) -> TensorSpec:
    if not any(_is_dynamic_nvfp4(stage) for stage in spec.stages) or not spec.needs_amax:
        return spec
    if spec.then is not None:
        raise ConfigError(
            "nvfp4_act_headroom does not work with chains",
            hint="use one stage for the inputs, or the algorithm max",
            kind="E-ATTRIBUTE-CONFLICT",
        )
    numbers = tuple((key, float(asked.get(_ENDS[key], usual))) for key, usual in OBSERVERS["headroom"].items())
    return replace(spec, observer=ObserverSpec("headroom", numbers))


def _is_dynamic_nvfp4(spec: TensorSpec) -> bool:
    scale = spec.scale
    return spec.element == "fp4_e2m1" and scale is not None and (scale.dtype, scale.when) == ("e4m3", "dynamic")


# ModelOpt's step -> the slots that it is about, and what it makes of their specs.
_CHANGES: dict[str, tuple[str, _Change]] = {"mse": (_WEIGHT, _searched), "nvfp4_act_headroom": (_INPUT, _with_headroom)}
