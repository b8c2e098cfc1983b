"""Divides the parts of a run among its ranks. All ranks walk through the parts that need data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quarkcli import versions
from quarkcli.disk.journal import Journal
from quarkcli.disk.writer import STATE, tensor_bytes
from quarkcli.errors import ResourceError, UsageError
from quarkcli.events import Listener
from quarkcli.family import HeaderLike
from quarkcli.forward.defaults import SELF
from quarkcli.forward.group import Group, dealt
from quarkcli.job import finish
from quarkcli.job.options import Prepared
from quarkcli.plan.model import Part, Plan

if TYPE_CHECKING:
    from quarkcli.job.part import PartWorker


LATE = 5.0  # seconds after which a file that another machine wrote must be seen


class Share(NamedTuple):
    """A part that a rank passes.

    writer   the rank that writes it, where ranks pass it together; None: this rank does all of it alone
    works    this rank works on it
    """

    part: Part
    writer: int | None
    works: bool = True


def check(prepared: Prepared, group: Group) -> None:
    """Raises UsageError for what several ranks cannot do, and where they are not alike."""
    if group.size == 1:
        return
    _check_alike(prepared, group)
    one = "start it in one process, without torchrun"
    if prepared.download is not None:
        where = prepared.options.model
        hint = f"run 'hf download {where}', then the same command again"
        raise UsageError(
            "several processes need the model on a local disk, and this one is on the hub",
            where=where,
            hint=hint,
            kind="E-RANKS",
        )
    if prepared.calibration is not None and prepared.calibration.source == SELF:
        what = (
            "the model cannot write its own text with several processes: one would write, and the others would "
            "wait too long"
        )
        hint = "write the rows in one process first (quark data preview --json), then give that file to --calib-data"
        raise UsageError(what, where="--calib-data self", hint=hint, kind="E-RANKS")
    tuner = next((step for step in prepared.steps if step.kind == "tuner"), None)
    if tuner is not None:
        what = f"{tuner.name} needs all rows of a block in one process, and here each process has some of them"
        raise UsageError(what, where="algorithm", hint=f"{one}, or leave {tuner.name} out", kind="E-RANKS")


def _check_alike(prepared: Prepared, group: Group) -> None:
    """Raises UsageError where this rank has another model, or other versions, than the first."""
    own = {"model": prepared.source.header_digest()[:16], **versions.deciding()}
    first = group.share(own)
    other = next((key for key in own if own[key] != first[key]), None)
    if other is not None:
        what = f"process {group.rank} has {other} {own[other]}, and process 0 has {first[other]}"
        raise UsageError(
            what, hint="give all processes the same files under the same path, and the same packages", kind="E-RANKS"
        )


def check_place(partial: Path) -> None:
    """Raises ResourceError where this rank does not see what the first one began; a shared file system may be late."""
    until = time.monotonic() + LATE
    while not (partial / STATE / "fingerprint.json").is_file():
        if time.monotonic() > until:
            hint = "put the output on a file system that all machines share"
            raise ResourceError(
                "does not hold the files that process 0 began to write",
                where=str(partial),
                hint=hint,
                kind="E-RANKS-LOST",
            )
        time.sleep(0.1)


def agreed(plan: Plan, journal: Journal, group: Group, tell: Listener) -> list[Part]:
    """Returns the parts to do, as the first rank's journal says; the others take it over."""
    found = finish.unfinished(plan, journal, tell) if group.is_main else []
    state = group.share(journal.state if group.is_main else None)
    if not group.is_main and state is not None:
        journal.follow(state)
        found = [part for part in plan.parts if part.name not in journal.finished]
    return found


def shares(todo: Sequence[Part], worker: PartWorker, headers: Mapping[str, HeaderLike], group: Group) -> list[Share]:
    """Returns what this rank does of the parts, in order."""
    if group.size == 1:
        return [Share(part, None) for part in todo]
    together = [part for part in todo if worker.walk is not None and part.index <= worker.last]
    passed = []
    for part in together:
        writer = part.index % group.size
        passed.append(Share(part, writer, worker.is_shared(part) or writer == group.rank))
    sizes = {part.name: _size(part, headers) for part in todo}
    rest = divided([part for part in todo if part not in together], sizes, group.size)[group.rank]
    return passed + [Share(part, None) for part in rest]


def divided(parts: Sequence[Part], sizes: Mapping[str, int], ranks: int) -> list[list[Part]]:
    """Returns the parts of each rank, about as many bytes each, in order."""
    owners = dealt([sizes[part.name] for part in parts], ranks)
    return [[part for part, owner in zip(parts, owners, strict=True) if owner == rank] for rank in range(ranks)]


def _size(part: Part, headers: Mapping[str, HeaderLike]) -> int:
    return sum(tensor_bytes(headers[name].dtype, headers[name].shape) for name in part.tensors)
