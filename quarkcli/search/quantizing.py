"""Quantizes parts in one candidate as a run would, and keeps the result beside the source."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quarkcli.events import Listener
from quarkcli.forward.group import Group
from quarkcli.forward.walk import Walk
from quarkcli.job.options import Prepared
from quarkcli.job.part import PartWorker
from quarkcli.job.prepass import decide
from quarkcli.job.served import handlers, put_decoded
from quarkcli.model.handlers import Handlers
from quarkcli.plan.model import Part, Plan, QuantizedTarget

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData


@dataclass(frozen=True)
class Made:
    """A part as a candidate would have it served.

    rewritten   its tensors after transforms, not quantized; the source's own where there are none
    decoded     tensors that hold quantized weights, as a server reads them
    scales      stored static scales by `Activation.key`
    """

    plan: Plan
    part: Part
    rewritten: Mapping[str, Tensor]
    decoded: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]

    def changed(self, names: Collection[str]) -> dict[str, Tensor]:
        """Returns the file tensors in which these weights alone are quantized."""
        found: dict[str, Tensor] = {}
        for target in self._targets(names):
            tensor = target.view.tensor
            whole = found.setdefault(tensor, self.rewritten[tensor].clone())
            target.view.of(whole).copy_(target.view.of(self.decoded[tensor]))
            if target.bias is not None and target.bias_spec is not None:
                found[target.bias] = self.decoded[target.bias]
        return found

    def handlers(self, names: Collection[str], loads: Callable[[str], bool]) -> Handlers:
        """Returns the handlers that quantize what these weights read and return."""
        targets = {target.name: target for target in self._targets(names)}
        return handlers(replace(self.plan, targets=targets, attention={}), self.part, self.scales, loads)

    def _targets(self, names: Collection[str]) -> list[QuantizedTarget]:
        return [target for target in self.plan.quantized(self.part.index) if target.name in names]


@dataclass
class _Notes:
    """Stands for the journal, which a search has not."""

    notes: dict[str, Any] = field(default_factory=dict)

    def note(self, key: str, value: Any) -> None:
        self.notes[key] = value


class Quantizing(PartWorker):
    """Works on parts as the job does, and does not go on to the next."""

    moves_on = False
    made: Made | None = None

    @classmethod
    def of(cls, prepared: Prepared, data: CalibrationData, walk: Walk, runner: Any, tell: Listener) -> Quantizing:
        states = decide(prepared, data, runner, _Notes(), tell, Group())
        return cls(
            prepared.plan, prepared.dialect, prepared.steps, prepared.needs, prepared.weights, walk, tell,
            calibration=prepared.calibration,
            strict=prepared.options.strict, roles=prepared.layout.tensor_roles,
            on_nonfinite=prepared.options.on_nonfinite, states=states,
        )  # fmt: skip

    def make(self, part: Part, tensors: dict[str, Tensor]) -> Made:
        """Returns the part as it would be served. `tensors`: of the source, which stay as they are."""
        given = {name: tensor.clone() for name, tensor in tensors.items()} if self.plan.changes else tensors
        if self.walk is not None:  # the candidate before may have moved the source stream on; here both are one
            self.walk.take(dict.fromkeys(self.walk.hidden, self.walk.served))
        self._turn_inputs(part, {})
        self.work(part, given)
        self._turn_inputs(part, self.plan.online)
        assert self.made is not None
        made, self.made = self.made, None
        return made

    def _turn_inputs(self, part: Part, blocks: Mapping[str, int]) -> None:
        """Sets the online operations of a block: the walk is shared with the other candidates."""
        if self.walk is not None and part.block is not None:
            targets = {name: target for name, target in self.plan.targets.items() if target.part == part.index}
            turned = {target.view.tensor: blocks[name] for name, target in targets.items() if name in blocks}
            self.walk.turned[part.block] = turned

    def advance(
        self, part: Part, tensors: dict[str, Tensor], packed: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> None:
        """Keeps what would be served."""
        names = {target.view.tensor for target in self.plan.quantized(part.index)}
        names |= {t.bias for t in self.plan.quantized(part.index) if t.bias is not None and t.bias_spec is not None}
        decoded = {name: tensors[name].clone() for name in names}
        put_decoded(self.plan, self.dialect, part, decoded, packed)
        self.made = Made(self.plan, part, tensors, decoded, scales)
