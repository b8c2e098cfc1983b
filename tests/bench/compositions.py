"""Which rows the loss table has: schemes, and the algorithms of the registry alone and composed."""

from __future__ import annotations

import importlib
from typing import Any

import yaml

from quarkcli import algorithms
from quarkcli.algorithms.base import Algorithm

Steps = list[tuple[str, dict[str, Any]]]

SCHEMES = (
    "int4_wo_128", "int3_wo_128", "int2_wo_128", "nvfp4_weight_only", "nvfp4", "mxfp4_weight_only", "mxfp4",
)  # fmt: skip
# Weights as they are, inputs quantized: what no choice of codes can win back.
INPUTS = "inputs alone"
# Compositions by what the scheme quantizes; written as in the table: steps with +, parameters with colons.
WEIGHTS = (
    "awq+gptq", "permutation+gptq", "rotation+gptq", "gptq+autoround", "gptq+polish", "qronos+polish",
    "awq+qronos+polish", "gptq+autoround+polish",
)  # fmt: skip
SERVED = (
    "smoothquant+gptq", "autosmoothquant+gptq", "permutation+gptq", "rotation+gptq", "awq+gptq", "hadamard+gptq",
    "autosmoothquant+permutation+gptq", "autosmoothquant+qronos+polish", "gptq+polish",
)  # fmt: skip


def parsed(text: str) -> Steps:
    """Returns the steps of `awq+gptq:signed=on:damp=0.05`."""
    steps: Steps = []
    for step in text.split("+"):
        name, *settings = step.split(":")
        pairs = (setting.split("=", 1) for setting in settings)
        steps.append((name, {key: _value(value) for key, value in pairs}))
    return steps


def _value(text: str) -> Any:
    """Returns a parameter's value; on and off stay the words that steps use."""
    return text if text in {"on", "off"} else yaml.safe_load(text)


def members() -> dict[str, type[Algorithm]]:
    """Returns the classes of the registry by name."""
    names = (name.replace("-", "_") for name in algorithms.names())
    return {name.replace("_", "-"): importlib.import_module(f"quarkcli.algorithms.{name}").ALGORITHM for name in names}


def compositions(integers: bool, inputs: bool) -> list[str]:
    """Returns the rows of a scheme: rtn first, then every algorithm alone, then compositions.

    integers   its weights are integers: solvers that know signed scales come with them off and on
    inputs     it quantizes activations too
    """
    known = members()
    alone = ["rtn", *(name for name in known if name != "rtn")]
    more = [row for row in (SERVED if inputs else WEIGHTS) if all(name in known for name, _ in parsed(row))]
    rows = ["rtn", *([INPUTS] if inputs else []), *alone[1:], *more]
    return [choice for row in rows for choice in _signs(row, known, integers)]


def _signs(row: str, known: dict[str, type[Algorithm]], integers: bool) -> list[str]:
    """Returns the row, for integers with signed scales off and on where one of its steps knows them."""
    if not integers or row == INPUTS:
        return [row]
    signed = [f"{name}:signed=on" if "signed" in known[name].parameters else name for name, _ in parsed(row)]
    both = [row, "+".join(signed)]
    return both if both[0] != both[1] else both[:1]
