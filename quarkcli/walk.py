"""THE loop over decoder blocks: load, forward, tap, forget. Used by the job and by the evaluation.

A `Walk` holds the carry: what each batch hands from one block to the next. `observe` runs a block once and feeds
statistics; `advance` runs it and moves the carry on. Out of device memory, both halve the batch and start the block
again, so nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quarkcli.errors import ModelError, ResourceError
from quarkcli.events import Listener, Message, Working

CPU_TOKENS = 2048  # tokens in one forward on a CPU, whatever the batch asked for: the same bits for every batch size
HIDDEN_SHARE = 4  # the carry stays on the device while it takes less than one part in this of its free memory


def default_batch(device: torch.device, seqlen: int, asked: int | None) -> int:
    """Sequences in one forward. On a CPU always `CPU_TOKENS` tokens; on a GPU what was asked, else four times that."""
    if device.type == "cpu":
        return max(1, CPU_TOKENS // seqlen)
    return asked or max(1, 4 * CPU_TOKENS // seqlen)


class Walk:
    """Token rows on their way through the blocks of a model.

    runner   `model.runner.Runner`
    outside  reads the weights outside the blocks (embedding, final norm, head)
    tokens   int64 [rows, seqlen]
    mask     bool [rows, seqlen] or None; False on padding, used by statistics only
    batch    rows in one forward
    """

    def __init__(
        self,
        runner: Any,
        outside: Callable[[], Mapping[str, Tensor]],
        tokens: Tensor,
        mask: Tensor | None,
        batch: int,
        tell: Listener,
    ) -> None:
        self.runner = runner
        self.outside = outside
        self.tokens = tokens
        self.mask = mask
        self.batch = batch
        self.tell = tell
        self.carry: list[Tensor] = []
        self.recordings: list[Any] = []

    @property
    def device(self) -> torch.device:
        return torch.device(self.runner.device)

    def start(self) -> None:
        """Embed every batch and record what each block will be called with; the carry is the first block's input."""
        self.carry = self._retrying(self._record)

    def _record(self) -> list[Tensor]:
        self.runner.load_outside(self.outside())
        self.recordings = []
        for index, rows in enumerate(self.tokens.split(self.batch)):
            self._working("embedding rows", index)
            last = self.recordings[-1] if self.recordings else None
            self.recordings.append(self.runner.record(rows.to(self.device), share_with=last))
        self.runner.unload_outside()
        return [self._park(recording.hidden) for recording in self.recordings]

    def _park(self, hidden: Tensor) -> Tensor:
        """Keep the carry on the device only while it is small there."""
        if self.device.type != "cuda":
            return hidden
        free, _ = torch.cuda.mem_get_info(self.device)
        whole = hidden.numel() * hidden.element_size() * -(-self.tokens.shape[0] // self.batch)
        return hidden if whole * HIDDEN_SHARE < free else hidden.cpu()

    def take(self, carry: list[Tensor]) -> None:
        """Go on with a carry in batches of any size, cut as the recordings are."""
        if len(carry) != len(self.recordings):
            axis, _ = self._layout()
            carry = list(torch.cat([hidden.cpu() for hidden in carry], axis).split(self.batch, axis))
        self.carry = carry

    def masks(self) -> list[Tensor | None]:
        """One per batch, tokens and rows in the order that the model has them in."""
        if self.mask is None:
            return [None] * len(self.carry)
        _, tokens_first = self._layout()
        return [mask.T if tokens_first else mask for mask in self.mask.split(self.batch)]

    def _layout(self) -> tuple[int, bool]:
        """(axis of the rows in hidden states, whether tokens come before them).

        Most models have [rows, tokens, H]; gemma3n has [streams, rows, tokens, H], ChatGLM's code [tokens, rows, H].
        """
        for tokens_first in (False, True):
            for axis in range(self.recordings[0].hidden.dim() - 1):
                if all(_fits(recording, axis, tokens_first) for recording in self.recordings):
                    return axis + tokens_first, tokens_first
        shape = list(self.recordings[0].hidden.shape)
        raise ModelError(f"hidden states of shape {shape} do not tell which axes are rows and tokens")

    def observe(self, block: int, new_statistics: Callable[[], Any]) -> tuple[Any, Tensor]:
        """Run the loaded block over the carry with taps. Returns the statistics and the first batch's output."""

        def once() -> tuple[Any, Tensor]:
            statistics = new_statistics()
            first = None
            with self.runner.handlers(block, **statistics.handlers()):
                for index, (hidden, mask) in enumerate(zip(self.carry, self.masks(), strict=True)):
                    statistics.mask = mask
                    out = self._run(block, index, hidden)
                    first = out if first is None else first
            assert first is not None
            return statistics, first

        result: tuple[Any, Tensor] = self._retrying(once)
        return result

    def observe_tail(self, new_statistics: Callable[[], Any]) -> Any:
        """Run final norm and head over the carry with taps (a head that is quantized)."""

        def once() -> Any:
            self.runner.load_outside(self.outside())
            statistics = new_statistics()
            handlers = statistics.handlers()
            with self.runner.handlers(None, **handlers):
                for index, (hidden, mask) in enumerate(zip(self.carry, self.masks(), strict=True)):
                    statistics.mask = mask
                    self._working("observing the tail", index)
                    head = bool(handlers["outputs"])
                    self.runner.observe_tail(self.recordings[index], hidden.to(self.device), head=head)
            self.runner.unload_outside()
            return statistics

        return self._retrying(once)

    def advance(self, block: int, handlers: Mapping[str, Any]) -> None:
        """Run the loaded block with `handlers` and move the carry on."""

        def once() -> list[Tensor]:
            with self.runner.handlers(block, **handlers):
                return [self._park(self._run(block, i, hidden)) for i, hidden in enumerate(self.carry)]

        self.carry = self._retrying(once)

    def probe(self, block: int, handlers: Mapping[str, Any]) -> Tensor:
        """The loaded block's output for the first batch; the carry stays where it is."""

        def once() -> Tensor:
            with self.runner.handlers(block, **handlers):
                return self._run(block, 0, self.carry[0])

        output: Tensor = self._retrying(once)
        return output

    def _run(self, block: int, index: int, hidden: Tensor) -> Tensor:
        self._working(f"running block {block}", index)
        out: Tensor = self.runner.run_block(block, self.recordings[index], hidden.to(self.device))
        return out

    def _working(self, what: str, index: int) -> None:
        batches = -(-self.tokens.shape[0] // self.batch)
        self.tell(Working(f"{what}, batch {index + 1} of {batches}"))

    def _retrying(self, once: Callable[[], Any]) -> Any:
        while True:
            try:
                return once()
            except torch.OutOfMemoryError as error:
                self._halve(error)

    def _halve(self, cause: BaseException) -> None:
        """Half the rows in one forward, after the device ran out of memory."""
        if self.batch == 1:
            raise ResourceError(
                f"out of device memory with {self.batch} sequence(s) of {self.tokens.shape[1]} tokens in one forward",
                where="calibration",
                hint="a smaller --calib-seqlen or --calib-batch, or --device cpu",
            ) from cause
        half = self.batch // 2
        self.tell(Message(f"out of device memory: {self.batch} -> {half} sequences in one forward", "warning"))
        self.batch = half
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.carry:
            return
        try:
            self._record()
        except torch.OutOfMemoryError as error:
            self._halve(error)
        else:
            self.take(self.carry)


def _fits(recording: Any, axis: int, tokens_first: bool) -> bool:
    rows, tokens = recording.tokens.shape
    return tuple(recording.hidden.shape[axis : axis + 2]) == ((tokens, rows) if tokens_first else (rows, tokens))
