"""Transforms at work on one part: their declarations, their changes, and whether statistics still hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from quarkcli.algorithms.base import Assignment, Transform
from quarkcli.algorithms.tensors import PartTensors
from quarkcli.forward.statistics import Statistics
from quarkcli.plan.model import Part, Plan


class Rewriting:
    """One part on its way through the transforms of a run.

    states   decisions of each transform for the whole model, by its key
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
    ) -> None:
        self.plan = plan
        self.part = part
        self.tensors = tensors
        self.transforms = transforms
        self.states = states
        self.added: dict[str, Tensor] = {}
        self.notes: dict[str, list[dict[str, Any]]] = {}

    def before(self) -> None:
        """Runs every transform on the part before it is observed."""
        for step, transform in self.transforms:
            part = PartTensors(self.plan, self.part, self.tensors, step.weights)
            transform.before(part, self.states.get(step.key))
            self._commit(step, part)

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
        part.commit()
        return blocks

    def _commit(self, step: Assignment, part: PartTensors) -> bool:
        """Puts the changes in place, and holds them against what the transform declared."""
        declared = self.plan.changes[step.key]
        if part.notes:
            self.notes.setdefault(step.key, []).extend(part.notes)
        changed = part.commit()
        undeclared = [name for name in changed if name not in declared.tensors]
        undeclared += [name for name in part.added if name not in {added.name for added in declared.added}]
        if undeclared:
            raise AssertionError(f"transform {step.key} changes {undeclared[0]}, which it has not declared")
        self.added |= part.added
        return bool(changed)
