"""Builds the model's class and the walk of the calibration rows for a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quarkcli.disk.journal import Journal
from quarkcli.events import Listener, Message
from quarkcli.forward.group import Group
from quarkcli.job import partial_path
from quarkcli.job.options import Prepared
from quarkcli.plan.model import Part

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.forward.data import CalibrationData
    from quarkcli.forward.walk import Walk
    from quarkcli.job.part import PartWorker
    from quarkcli.job.pipeline import Pipeline


def runner_of(prepared: Prepared, data: CalibrationData, device: str, tell: Listener) -> Any:
    """Returns the model's class, which runs a block at a time. Raises ModelError, DataError."""
    from quarkcli.job.reach import check_loaded
    from quarkcli.model.runner import Runner

    source = prepared.source
    trusted = prepared.options.trust_remote_code
    softmax = any("p" in module.specs for module in prepared.plan.attention.values())
    runner = Runner(
        source.whole_folder(), prepared.weights.headers, device=device, trust_remote_code=trusted, eager=softmax,
        transposed_experts=prepared.layout.transposed_experts,
    )  # fmt: skip
    runner.check_blocks()
    runner.check_tokens(data.tokens)
    note = check_loaded(prepared.plan, prepared.needs, runner)
    if note is not None:
        tell(Message(note, "warning"))
    return runner


def walk_of(
    prepared: Prepared,
    data: CalibrationData | None,
    runner: Any,
    journal: Journal,
    todo: list[Part],
    pipeline: Pipeline,
    worker: PartWorker,
    tell: Listener,
    group: Group,
) -> Walk | None:
    """Returns a walk that has not started; None when no part to do needs data."""
    from quarkcli.forward.carry import Carry
    from quarkcli.forward.lanes import default_batch, lanes
    from quarkcli.forward.moments import held_out, holds_out
    from quarkcli.forward.walk import Walk
    from quarkcli.job.reach import last_part, probed_rows
    from quarkcli.job.rewriting import rewritten

    if data is None or not todo or todo[0].index > last_part(prepared.plan, prepared.needs):
        return None
    rows = lanes(*data.tokens.shape)
    batch = default_batch(runner.device, data.tokens.shape[1], prepared.options.calib_batch)
    batch = min(batch, max(lane.stop - lane.start for lane in rows))
    batch = journal.notes.get("batch", batch)
    few = probed_rows(data.tokens.shape[1]) if worker.one_pass else None
    streams = frozenset[str]().union(*(step.algorithm.streams for step in prepared.steps))
    embedding = [target for target in prepared.plan.quantized() if target.is_embedding]
    names = runner.outside_tensors()

    def source() -> dict[str, Tensor]:
        return rewritten(prepared.plan, names, worker.transforms, worker.states, prepared.weights)

    def outside() -> dict[str, Tensor]:
        return pipeline.outside(names, worker)

    return Walk(
        runner, outside, data.tokens, data.mask, batch, tell, streams=sorted(streams, reverse=True),
        held=held_out(*data.tokens.shape) if holds_out(prepared.needs) else None,
        embedding=source if embedding else None, lanes=group.own(rows),
        carry=Carry(runner.device, prepared.options.offload, partial_path(prepared.output)), few=few,
    )  # fmt: skip


def take_up(walk: Walk, journal: Journal, group: Group) -> None:
    """Goes on with the hidden states behind the last finished part."""
    from quarkcli.forward import handed

    count = journal.ranks_with_hidden
    working = [rank for rank, own in enumerate(group.shares) if own]
    if not count or not walk.lanes:
        return
    whole = count != len(working)  # then they were written by another number of ranks
    stored = [journal.hidden_of(number) for number in (range(count) if whole else [working.index(group.rank)])]
    hidden = {
        stream: [one[name] for one in stored for name in sorted(one) if name.startswith(f"{stream}/")]
        for stream in walk.hidden
    }
    walk.take(hidden, whole)
    start = walk.lanes[0].start if whole else 0
    handed.spread(handed.read(stored, list(walk.hidden)), walk.recordings, start)
