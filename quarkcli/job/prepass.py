"""Makes the decisions of transforms for the whole model before part 0, from statistics of the source if they ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from quarkcli.algorithms.base import Transform
from quarkcli.events import Listener, Message
from quarkcli.forward.group import Group
from quarkcli.job.options import SKIP, Prepared
from quarkcli.reporting.alike import folded

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData
    from quarkcli.forward.statistics import Statistics

NOTE = "transforms"


class Notes(Protocol):
    """Keeps JSON by name, as the journal does."""

    @property
    def notes(self) -> dict[str, Any]: ...

    def note(self, key: str, value: Any) -> None: ...


def decide(
    prepared: Prepared, data: CalibrationData | None, runner: Any, journal: Notes, tell: Listener, group: Group
) -> Mapping[str, Any]:
    """Returns the state of every transform by its key; a resumed run takes the journal's."""
    transforms = [step for step in prepared.steps if isinstance(step.algorithm, Transform)]
    if not transforms:
        return {}
    known = journal.notes.get(NOTE)
    if known is None:
        seen = _observed(prepared, data, runner, tell, group) if prepared.prepass else {}
        known = {step.key: step.prepare(prepared.plan, prepared.seed, seen) for step in transforms}
        journal.note(NOTE, group.share(known))
    states: Mapping[str, Any] = journal.notes[NOTE]
    return states


def _observed(
    prepared: Prepared, data: CalibrationData | None, runner: Any, tell: Listener, group: Group
) -> Mapping[int, Statistics]:
    """Returns statistics of every block of the source model, by part: one forward pass."""
    from quarkcli.forward.guard import Guard
    from quarkcli.forward.joining import join
    from quarkcli.forward.lanes import default_batch, lanes
    from quarkcli.forward.statistics import Statistics
    from quarkcli.forward.walk import Walk
    from quarkcli.job import damage

    assert data is not None and runner is not None
    plan, weights = prepared.plan, prepared.weights
    tell(Message("running the original model once, because transforms need it"))
    batch = default_batch(runner.device, data.tokens.shape[1], prepared.options.calib_batch)
    names = runner.outside_tensors()
    rows = group.own(lanes(*data.tokens.shape))
    walk = Walk(runner, lambda: weights.read_many(names), data.tokens, data.mask, batch, tell, lanes=rows)
    walk.start()
    said: list[str] = []
    guard = Guard(prepared.options.on_nonfinite == SKIP, said.append)
    found: dict[int, Statistics] = {}
    for part in plan.parts:
        if part.block is None:
            continue
        tensors = weights.read_many(part.tensors)
        damage.refuse_weights(plan, part, tensors)
        runner.load_block(part.block, tensors)

        def new(index: int = part.index) -> Statistics:
            return Statistics(plan, index, prepared.prepass, runner, guard=guard, group=group)

        found[part.index], _ = walk.observe(part.block, new, advance=True)
        walk.observed()
        join(found[part.index])
        runner.unload_block(part.block)
    for text in folded(said):
        tell(Message(text, "warning"))
    return found
