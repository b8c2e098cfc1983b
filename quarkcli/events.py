"""Defines the events of a running job. Only `cli/` and the log file turn events into text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]
Measure = Literal["output", "weight", "drift"]


@dataclass(frozen=True)
class Message:
    """A line for the log; warnings are repeated in the report and the final summary.

    always   shown even where only errors are: it says where a user's files are, or what was left undone
    many     may come for every layer: of those that differ in names and numbers alone, one is shown
    """

    text: str
    level: Level = "info"
    always: bool = False
    many: bool = False


@dataclass(frozen=True)
class Phase:
    """A named phase begins.

    Of a job: resolve, check, calibrate+quantize or quantize, finalize, evaluate, verify. Of other commands: convert,
    search, upload as well. From Python: `done`.
    """

    name: str


@dataclass(frozen=True)
class PartDone:
    """One part of the model is finished and durable.

    index, total   1-based position among the parts
    label          scheme and algorithms, for example `nvfp4+gptq`, or `kept`
    error          None when nothing was quantized
    measure        what the error is: `output` (of the block, relative to the source's), `weight` (relative, where
                   there is no data), `drift` (of hidden states, since the embedding)
    rss, gpu       resident and device memory peaks in bytes
    eta            estimated seconds to go
    """

    index: int
    total: int
    name: str
    label: str
    seconds: float
    error: float | None
    rss: int
    gpu: int
    eta: float
    measure: Measure = "output"


@dataclass(frozen=True)
class Working:
    """The current work, told often; it becomes a line only where there has been none for a while."""

    what: str


Event = Message | Phase | PartDone | Working
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Drops everything: a listener."""


def broadcast(*listeners: Listener) -> Listener:
    """Returns one listener that hands each event to several."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell
