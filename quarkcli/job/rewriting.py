"""Runs transforms on one part, holds them to their declarations, and drops statistics that no longer hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from quarkcli.algorithms.base import Assignment, Transform
from quarkcli.algorithms.tensors import PartTensors
from quarkcli.disk.weights import WeightSource
from quarkcli.forward.statistics import Statistics
from quarkcli.plan.model import Part, Plan


class Rewriting:
    """One part on its way through the transforms of a run.

    states   decisions of each transform for the whole model, by its key
    weights  the source, where a transform needs a tensor of another part
    added    tensors that the source lacks, once they are made
    notes    what each transform decided, by its key
    """

    def __init__(
        self,
        plan: Plan,
        part: Part,
        tensors: dict[str, Tensor],
        transforms: Sequence[tuple[Assignment, Transform]],
        states: Mapping[str, Any],
        weights: WeightSource,
    ) -> None:
        self.plan = plan
        self.part = part
        self.tensors = tensors
        self.transforms = transforms
        self.states = states
        self.weights = weights
        self.added: dict[str, Tensor] = {}
        self.notes: dict[str, list[dict[str, Any]]] = {}

    def before(self) -> None:
        """Runs every transform on the part before it is observed."""
        for count, (step, transform) in enumerate(self.transforms):
            elsewhere = partial(self._elsewhere, count)
            part = PartTensors(self.plan, self.part, self.tensors, step.weights, elsewhere, dict(self.added))
            transform.before(part, self.states.get(step.key))
            self._commit(step, part)

    def _elsewhere(self, count: int, name: str) -> Tensor:
        """Returns a tensor of another part as the first `count` transforms leave it."""
        own = next(iter(self.tensors.values()))
        found = rewritten(self.plan, [name], self.transforms[:count], self.states, self.weights)
        return found[name].to(own.device)

    def after(self, step: Assignment, transform: Transform, statistics: Statistics) -> bool:
        """Runs one transform on the observed part. Returns whether the part has to be observed again.

        Scaled channels scale the second moments of what reads them. Ranges do not follow, and neither does anything
        where the transform changed a tensor in another way.
        """
        part = PartTensors(self.plan, self.part, self.tensors, step.weights)
        transform.after(part, statistics, self.states.get(step.key))
        if not self._commit(step, part):
            return False
        return part.changed_otherwise or not statistics.follow(part.scaled, part.scaled_outputs)

    def online(self) -> dict[str, int]:
        """Turns weights whose inputs are turned while the model runs, after all transforms. Returns their blocks."""
        part = PartTensors(self.plan, self.part, self.tensors)
        blocks = {name: block for name, block in self.plan.online.items() if name in part.targets}
        for name, block in blocks.items():
            part.turn_input(name, block)
            part.commit()  # one after the other: no more than one is held in float32
        return blocks

    def _commit(self, step: Assignment, part: PartTensors) -> bool:
        """Puts the changes in place, and holds them against what the transform declared."""
        declared = self.plan.changes[step.key]
        if part.notes:
            self.notes.setdefault(step.key, []).extend(part.notes)
        changed = part.commit()
        undeclared = [name for name in changed if name not in declared.tensors]
        new = part.added.keys() - self.added.keys()
        undeclared += sorted(new - {added.name for added in declared.added})
        if undeclared:
            raise AssertionError(f"transform {step.key} changes {undeclared[0]}, which it has not declared")
        self.added |= part.added
        return bool(changed)


def rewritten(
    plan: Plan,
    names: Collection[str],
    transforms: Sequence[tuple[Assignment, Transform]],
    states: Mapping[str, Any],
    weights: WeightSource,
) -> dict[str, Tensor]:
    """Returns source tensors as transforms leave them before anything is observed."""
    found: dict[str, Tensor] = {}
    for part in plan.parts:
        own = [name for name in part.tensors if name in names]
        if own:
            tensors = weights.read_many(part.tensors if transforms else own)
            Rewriting(plan, part, tensors, transforms, states, weights).before()
            found |= {name: tensors[name] for name in own}
    return found
