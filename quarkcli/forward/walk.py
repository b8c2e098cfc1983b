"""Walks over the decoder blocks: load, forward, tap, forget. Job and evaluation share this loop.

A `Walk` holds the hidden states of its streams, one tensor per batch. `observe` runs a block once and feeds
statistics; `advance` runs it and moves the streams on. Out of device memory, both halve the batch and start the block
again, so nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from quarkcli.errors import ModelError, ResourceError
from quarkcli.events import Listener, Message, Working
from quarkcli.forward import handed
from quarkcli.forward.activations import turns
from quarkcli.forward.carry import Carry
from quarkcli.forward.enough import Enough, Watched
from quarkcli.forward.lanes import Lane, Span, spans
from quarkcli.forward.samples import first_tokens
from quarkcli.forward.taps import Batch
from quarkcli.model.handlers import Handlers

SERVED, SOURCE = "served", "source"
Apart = Mapping[str, Mapping[str, Tensor]] | None


class Walk:
    """Token rows on their way through the blocks of a model, in one stream of hidden states or two.

    `served` hidden states come from the quantized blocks below; `source` ones, when asked for, from those of the
    source model, for the same tokens.

    runner     `model.runner.Runner`
    outside    reads the weights outside the blocks (embedding, final norm, head) as they are served
    tokens     int64 [rows, seqlen]
    mask       bool [rows, seqlen] or None; False on padding, used by statistics only
    batch      rows in one forward
    few        rows that `probe` runs; None: those of the first batch
    held       bool [rows, seqlen] or None; True for held-out tokens
    embedding  reads the weights outside the blocks as the source has them, where a second stream needs them; None:
               they are those of `outside`
    streams    their names
    lanes      the lanes of rows that go this way, in order; None: all rows, in one
    carry      where hidden states wait; None: on the device while they are small there
    """

    def __init__(
        self,
        runner: Any,
        outside: Callable[[], Mapping[str, Tensor]],
        tokens: Tensor,
        mask: Tensor | None,
        batch: int,
        tell: Listener,
        *,
        streams: Iterable[str] = (SERVED,),
        held: Tensor | None = None,
        embedding: Callable[[], Mapping[str, Tensor]] | None = None,
        lanes: Sequence[Lane] | None = None,
        carry: Carry | None = None,
        few: int | None = None,
    ) -> None:
        self.runner = runner
        self.outside = outside
        self.tokens = tokens
        self.mask = mask
        self.batch = batch
        self.few = few
        self._few: Any = None  # their recording
        self._kept: Tensor | None = None  # their hidden states before the block that was observed
        self.tell = tell
        self.held = held
        self.embedding = embedding
        self.lanes = list(lanes) if lanes is not None else [Lane(0, 0, len(tokens))]
        self.carry = carry if carry is not None else Carry(self.device)
        self.hidden: dict[str, list[Tensor]] = {stream: [] for stream in streams}
        self.recordings: dict[str, list[Any]] = {}
        self.turned: dict[int, Mapping[str, int]] = {}  # by block: file tensor -> size of its input's block Hadamard
        self._moved: dict[str, list[Tensor]] = {}  # streams behind the block that was observed

    @property
    def served(self) -> list[Tensor]:
        """Returns the hidden states of the served stream, one per batch."""
        return self.hidden[SERVED]

    @property
    def spans(self) -> list[Span]:
        """Returns the rows of every batch."""
        return spans(self.lanes, self.batch)

    def split(self, values: Tensor) -> list[Tensor]:
        """Returns what has one entry for each calibration row, in batches."""
        return [values[span.start : span.stop] for span in self.spans]

    @property
    def device(self) -> torch.device:
        return torch.device(self.runner.device)

    def start(self) -> None:
        """Embeds every batch and records the call of each block."""
        self.hidden = self._retrying(self._record)

    def _record(self) -> dict[str, list[Tensor]]:
        self.recordings = {SERVED: self._recorded(self.outside)}
        if SOURCE in self.hidden:
            own = self._recorded(self.embedding) if self.embedding is not None else self.recordings[SERVED]
            self.recordings[SOURCE] = [recording.twin() for recording in own]
        hidden = {s: [self._park(recording.hidden, s) for recording in self.recordings[s]] for s in self.hidden}
        for recording in (one for each in self.recordings.values() for one in each):
            recording.hidden = recording.hidden.to("meta")  # its shape is all that is asked for from now on
        return hidden

    def _recorded(self, outside: Callable[[], Mapping[str, Tensor]]) -> list[Any]:
        self.runner.load_outside(outside())
        recordings: list[Any] = []
        for index, rows in enumerate(self.split(self.tokens)):
            self._working("embedding rows", index)
            last = recordings[-1] if recordings else None
            recordings.append(self.runner.record(rows.to(self.device), share_with=last))
        if self.few is not None and self.lanes and self.lanes[0].start == 0:
            self._few = self.runner.record(self.tokens[: min(self.few, self.spans[0].stop)].to(self.device))
        self.runner.unload_outside()
        return recordings

    def _park(self, hidden: Tensor, stream: str = SERVED) -> Tensor:
        batches = len(self.spans) * len(self.hidden)
        return self.carry.park(stream, hidden, batches)

    def take(self, hidden: Mapping[str, list[Tensor]], whole: bool = False) -> None:
        """Goes on with hidden states in batches of any size, cut as the recordings are.

        whole   they are of all rows, and not of these lanes alone
        """
        if whole and self.lanes:
            axis, _ = self._layout()
            start, count = self.lanes[0].start, self.lanes[-1].stop - self.lanes[0].start
            hidden = {s: [torch.cat(states, axis).narrow(axis, start, count)] for s, states in hidden.items()}
        self.hidden = {stream: self.cut(states) for stream, states in hidden.items()} if self.lanes else self.hidden

    def cut(self, states: list[Tensor]) -> list[Tensor]:
        """Returns hidden states, or what has their shape, in batches as the recordings are."""
        if len(states) == len(self.recordings[SERVED]):
            return states
        axis, _ = self._layout()
        sizes = [span.stop - span.start for span in self.spans]
        return list(torch.cat([hidden.cpu() for hidden in states], axis).split(sizes, axis))

    def masks(self) -> list[Tensor | None]:
        """Returns one mask per batch, tokens and rows in the order that the model has them in."""
        return self._batches(self.mask)

    def _of_batches(self) -> Iterator[Batch]:
        first = first_tokens(self.tokens, self.mask)
        each = self.masks(), *map(self._batches, (self.held, self.tokens, first)), self.spans
        for index, (mask, held, ids, starts, span) in enumerate(zip(*each, strict=True)):
            yield Batch(mask, held, self._name(index), span.lane, ids, starts)

    def of_batch(self, mask: Tensor, index: int) -> Tensor:
        """Returns what a batch has of a mask [rows, seqlen], tokens and rows in the order of the model."""
        found = self._batches(mask)[index]
        assert found is not None
        return found

    def _batches(self, mask: Tensor | None) -> list[Tensor | None]:
        if mask is None or not self.spans:
            return [None] * len(self.spans)
        _, tokens_first = self._layout()
        return [part.T if tokens_first else part for part in self.split(mask)]

    def _layout(self) -> tuple[int, bool]:
        """Returns the axis of the rows in hidden states, and whether tokens come before them.

        Most models have [rows, tokens, H]; gemma3n has [streams, rows, tokens, H], ChatGLM's code [tokens, rows, H].
        """
        recordings = self.recordings[SERVED]
        for tokens_first in (False, True):
            for axis in range(recordings[0].hidden.dim() - 1):
                if all(_fits(recording, axis, tokens_first) for recording in recordings):
                    return axis + tokens_first, tokens_first
        shape = list(recordings[0].hidden.shape)
        raise ModelError(
            f"quark cannot tell which axes of hidden states of shape {shape} are rows and tokens", kind="E-CLASS-FOLLOW"
        )

    def observe(
        self, block: int, new_statistics: Callable[[], Any], advance: bool = False, apart: Apart = None
    ) -> tuple[Any, Tensor | None]:
        """Runs the loaded block over every stream with taps. Returns the statistics and the first batch's output.

        A rank without lanes has no batch. The source stream moves on with `observed`.

        advance   the served stream moves on with it as well
        apart     by stream, the tensors of the block that are others in the other stream, when it is observed again:
                  streams move as they did the first time; None: it is the first time
        """
        again = apart is not None

        def once() -> tuple[Any, Tensor | None, dict[str, list[Tensor]]]:
            statistics = new_statistics()
            first, moved = None, dict[str, list[Tensor]]()
            taps = {SERVED: Watched(statistics.handlers())}
            if SOURCE in self.hidden:
                taps[SOURCE] = Watched(statistics.source_handlers())
            for index, batch in enumerate(self._of_batches()):
                statistics.batch = batch
                if SOURCE in taps:
                    out = self._tapped(block, index, SOURCE, taps[SOURCE], not again or not index, apart)
                    if out is not None and not again:
                        moved.setdefault(SOURCE, []).append(self._park(out, SOURCE))
                out = self._tapped(block, index, SERVED, taps[SERVED], advance or not index, apart)
                first = out if first is None else first
                if out is not None and advance:
                    moved.setdefault(SERVED, []).append(self._park(out))
            return statistics, first, moved

        statistics, first, moved = self._retrying(once)
        self._moved = {**self._moved, **moved} if again else moved
        if self._few is not None:
            self._kept = self._first_rows().clone()
        return statistics, first

    def _tapped(self, block: int, index: int, stream: str, taps: Watched, whole: bool, apart: Apart) -> Tensor | None:
        """Runs a batch with taps. Returns its output; None where it ended behind the last tap, as whole ones do not."""
        if apart and SOURCE in self.hidden:
            self.runner.load_block(block, apart[stream])
        with self.runner.handlers(block, taps.whole() if whole else taps.ending()), suppress(Enough):
            return self._run(block, index, stream)
        return None

    def observed(self) -> None:
        """Moves streams on behind the block that was observed: it will not be observed again."""
        for stream, states in self._moved.items():
            self.hidden[stream] = self.cut(states)
        self._moved = {}

    def observe_tail(self, new_statistics: Callable[[], Any], tail: Mapping[str, Tensor]) -> Any:
        """Runs final norm and head over every stream with taps (a head that is quantized).

        tail   tensors of the tail as they are now, which go before those of `outside`
        """

        def once() -> Any:
            self.runner.load_outside({**self.outside(), **tail})
            statistics = new_statistics()
            taps = {SERVED: statistics.handlers()}
            if SOURCE in self.hidden:
                taps = {SOURCE: statistics.source_handlers(), **taps}
            for index, batch in enumerate(self._of_batches()):
                statistics.batch = batch
                self._working("running the head of the model", index)
                for stream, handlers in taps.items():
                    hidden = self.hidden[stream][index].to(self.device)
                    with self.runner.handlers(None, handlers):
                        recording, head = self.recordings[stream][index], bool(handlers.outputs)
                        self.runner.observe_tail(recording, hidden, head=head)
            self.runner.unload_outside()
            return statistics

        return self._retrying(once)

    def advance(self, block: int, handlers: Handlers) -> None:
        """Runs the loaded block with `handlers` and moves the served stream on."""

        def once() -> list[Tensor]:
            with self.runner.handlers(block, handlers):
                return [self._park(self._run(block, index)) for index in range(len(self.served))]

        self.hidden[SERVED] = self._retrying(once)

    def probe(self, block: int, handlers: Handlers) -> Tensor | None:
        """Returns the output of the loaded block, which was observed, for the first rows; no stream moves.

        None on a rank without these rows.
        """
        if not self.spans or (self.few is not None and self._kept is None):
            return None

        def once() -> Tensor:
            with self.runner.handlers(block, handlers):
                return self._run(block, 0) if self._kept is None else self._run_few(block, self._kept)

        output: Tensor = self._retrying(once)
        return output

    def _first_rows(self) -> Tensor:
        axis, _ = self._layout()
        return self.served[0].narrow(axis, 0, len(self._few.tokens))

    def _run_few(self, block: int, hidden: Tensor) -> Tensor:
        axis, _ = self._layout()
        handed.first_rows(self.recordings[SERVED][0], self._few)
        with self._turning(block):
            hidden = hidden.narrow(axis, 0, len(self._few.tokens)).to(self.device)
            out: Tensor = self.runner.run_block(block, self._few, hidden)
        return out

    def outputs(self, block: int, handlers: Handlers, batches: Iterable[int]) -> Iterator[Tensor]:
        """Yields the loaded block's output for some batches of the served stream, which stays where it is."""
        with self.runner.handlers(block, handlers):
            for index in batches:
                yield self._run(block, index)

    def per_token(self, values: Tensor) -> Tensor:
        """Returns the sums of what has the shape of hidden states, one per token: as `masks` are."""
        axis, tokens_first = self._layout()
        rows = {axis, axis - 1} if tokens_first else {axis, axis + 1}
        return values.sum([other for other in range(values.dim()) if other not in rows])

    def wanted(self, block: int, batch: int) -> Tensor:
        """Returns the loaded source block's output for a batch: of the source stream if there is one, else the served.

        Valid after `observed`, until the block is loaded with other weights.
        """
        if SOURCE in self.hidden:
            return self.hidden[SOURCE][batch].to(self.device)
        return self._run(block, batch)

    def halve(self, cause: BaseException) -> None:
        """Halves the rows in one forward, after the device ran out of memory with gradients.

        Raises ResourceError where a batch is one row already.
        """
        self._halve(cause)

    def run_with(self, block: int, batch: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the block's output for the served stream, with parameters of other file tensors; gradients flow."""
        hidden = self.served[batch].to(self.device)
        with self._turning(block):
            out: Tensor = self.runner.run_with(block, self.recordings[SERVED][batch], hidden, tensors)
        return out

    def _run(self, block: int, index: int, stream: str = SERVED) -> Tensor:
        self._working(f"running block {block}", index)
        hidden = self.hidden[stream][index].to(self.device)
        with self._turning(block):
            out: Tensor = self.runner.run_block(block, self.recordings[stream][index], hidden)
        return out

    def _name(self, index: int) -> str:
        """Returns the place of a batch for messages: `, batch 2 of 5 (rows 33 to 64)`."""
        span = self.spans[index]
        return f", batch {index + 1} of {len(self.spans)} (rows {span.start + 1} to {span.stop})"

    def _turning(self, block: int) -> AbstractContextManager[None]:
        """Inputs are turned while inside, before anything sees them."""
        blocks = {name: size for name, size in self.turned.get(block, {}).items() if self.runner.loads(name)}
        turning: AbstractContextManager[None] = self.runner.turning(block, turns(blocks))
        return turning

    def _working(self, what: str, index: int) -> None:
        self.tell(Working(f"{what}, batch {index + 1} of {len(self.spans)}"))

    def _retrying(self, once: Callable[[], Any]) -> Any:
        while True:
            try:
                return once()
            except torch.OutOfMemoryError as error:
                self._halve(error)

    def _halve(self, cause: BaseException) -> None:
        """Halves the rows in one forward, after the device ran out of memory."""
        if self.batch == 1 and (said := self.carry.give_way(self.hidden)) is not None:
            self.tell(Message(f"not enough GPU memory: {said}", "warning"))
            self._release()
            return
        if self.batch == 1:
            tried = self.carry.tried()
            raise ResourceError(
                f"not enough GPU memory for one sequence of {self.tokens.shape[1]} tokens{tried}",
                where="calibration",
                hint="use a smaller --calib-seqlen, --offload cpu, or --device cpu",
                kind="E-MEMORY",
            ) from cause
        self.tell(Message(f"not enough GPU memory: {self.batch} -> {self.batch // 2} sequences at a time", "warning"))
        self.batch //= 2
        self._release()
        if not self.served:
            return
        kept = handed.collect(self.recordings)
        try:
            self._record()
        except torch.OutOfMemoryError as error:
            self._halve(error)
        else:
            self.take(self.hidden)
            handed.spread(kept, self.recordings)

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _fits(recording: Any, axis: int, tokens_first: bool) -> bool:
    rows, tokens = recording.tokens.shape
    return tuple(recording.hidden.shape[axis : axis + 2]) == ((tokens, rows) if tokens_first else (rows, tokens))
