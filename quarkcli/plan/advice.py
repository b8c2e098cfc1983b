"""Applies the default advice to a plan: the steps that `auto` stands for, with the weights of each, and why.

Weights of one format have the steps of one row. A step that several rows list is one, for the weights of all of them.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quarkcli.plan.model import Plan, Step
from quarkcli.recipe import advice
from quarkcli.recipe.entries import SLOTS
from quarkcli.recipe.match import Patterns, slot_pattern, starred
from quarkcli.recipe.schema import AdviceRow

_SLOT = "weight_quantizer"


@dataclass(frozen=True)
class Advice:
    """The choice for the weights of one format.

    format   how weights and inputs are quantized, in words
    weights  names of the weights
    steps    in the order in which they run
    why      the reason, from the table of advice
    """

    format: str
    weights: frozenset[str]
    steps: tuple[Step, ...]
    why: str

    @property
    def names(self) -> list[str]:
        return [step.name for step in self.steps]

    def as_dict(self) -> dict[str, Any]:
        return {"format": self.format, "weights": len(self.weights), "steps": self.names, "why": self.why}


def text(choice: Mapping[str, Any]) -> str:
    """Returns a choice, as a report has it, in a line: `smoothquant, gptq for 84 weights in fp4_e2m1 ...: why`."""
    steps = ", ".join(choice["steps"]) or "rounding to nearest"
    return f"{steps} for {choice['weights']} weights in {choice['format']}: {choice['why']}"


def advise(plan: Plan) -> list[Advice]:
    """Returns the choice for every format of the plan, in plan order."""
    found: dict[str, tuple[AdviceRow, set[str]]] = {}
    for run in plan.quantized_alike():
        weight, read = run[0].weight, run[0].input
        words = weight.describe() + (f" with inputs in {read.describe()}" if read is not None else "")
        found.setdefault(words, (advice.of(weight, read), set()))[1].update(target.name for target in run)
    return [
        Advice(words, frozenset(names), tuple(Step(s.method, dict(s.model_extra or {})) for s in row.steps), row.why)
        for words, (row, names) in found.items()
    ]


def steps(choices: Iterable[Advice], plan: Plan) -> list[Step]:
    """Returns the steps of all choices in one order that holds for each, with their weights (None: all)."""
    weights: list[tuple[Step, set[str]]] = []
    for choice in choices:
        at = 0
        for step in choice.steps:
            known = next((index for index, (other, _) in enumerate(weights) if other == step), None)
            if known is None:
                weights.insert(at, (step, set()))
                known = at
            weights[known][1].update(choice.weights)
            at = known + 1
    everything = {target.name for target in plan.quantized()}
    return [step._replace(weights=None if names == everything else frozenset(names)) for step, names in weights]


def written(step: Step, plan: Plan) -> tuple[str, dict[str, Any]]:
    """Returns a step as a recipe lists it: its name and parameters, `slots` among them where it takes some weights."""
    slots = {} if step.weights is None else {SLOTS: _patterns(step.weights, plan.targets)}
    return step.name, {**slots, **step.parameters}


def _patterns(weights: Collection[str], everything: Collection[str]) -> list[str]:
    """Returns patterns that match the slots of exactly these weights: with `*` for indices where that is exact."""
    groups: dict[str, list[str]] = {}
    for name in everything:
        if name in weights:
            groups.setdefault(starred(name), []).append(name)
    found = []
    for pattern, names in groups.items():
        match = Patterns().matcher(pattern)
        exact = {name for name in everything if match(name)} <= set(weights)
        found += [pattern] if exact else names
    return [slot_pattern(name, _SLOT) for name in found]
