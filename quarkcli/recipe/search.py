"""ModelOpt's `mse` calibration of weights as what it is here: a property of the weights' specs. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quarkcli.recipe.attributes import to_spec
from quarkcli.recipe.entries import Entry
from quarkcli.spec import ObserverSpec, TensorSpec, spec_to_yaml

_MSE = "mse"
_WEIGHT = "weight_quantizer"
# ModelOpt's defaults: multipliers of amax.
_START, _STEP = 0.25, 0.1

Step = tuple[str, dict[str, Any]]


def with_search(steps: Sequence[Step], entries: Sequence[Entry]) -> tuple[list[Step], list[Entry]]:
    """The steps without `mse`, and the entries with weights searched where it was among them.

    Block scales of nvfp4 are swept through all their codes with `fp8_scale_sweep`; every other range is shrunk to the
    least squared error, from amax down to `start_multiplier` times amax. Stretching a range never pays here and is not
    tried.
    """
    asked = next((parameters for name, parameters in steps if name == _MSE), None)
    rest = [step for step in steps if step[0] != _MSE]
    if asked is None:
        return rest, list(entries)
    return rest, [_searched(entry, asked) for entry in entries]


def _searched(entry: Entry, asked: dict[str, Any]) -> Entry:
    if entry.cfg is None or _WEIGHT not in entry.quantizer_path:
        return entry
    spec = to_spec(entry.cfg, weight=True)
    if spec.then is not None or spec.scale is None:
        return entry
    return replace(entry, cfg=spec_to_yaml(_with(spec, asked)))


def _with(spec: TensorSpec, asked: dict[str, Any]) -> TensorSpec:
    assert spec.scale is not None
    blocks = spec.scale.dtype == "e4m3" and spec.element == "fp4_e2m1"
    if blocks and asked.get("fp8_scale_sweep"):
        return replace(spec, scale=replace(spec.scale, rule="sweep"))
    if spec.scale.rule == "four_over_six":
        return spec
    start, step = float(asked.get("start_multiplier", _START)), float(asked.get("step_size", _STEP))
    if not 0 < start < 1:
        return spec
    steps = float(round((1 - start) / step) + 1)
    return replace(spec, observer=ObserverSpec(_MSE, (("steps", steps), ("shrink", start))))
