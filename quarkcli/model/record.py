"""Runs a model block by block: it records the arguments of every block and replays the blocks one at a time.

Every block is replaced by a stub that notes its arguments and passes the hidden states on; the model's own forward
runs once per batch. Masks and rotary embeddings that differ per block therefore come out right, which the shortcut of
reusing the first block's arguments gets wrong for many families. Hidden states are opaque: some families have
[streams, batch, tokens, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from quarkcli.errors import ModelError
from quarkcli.model import handed
from quarkcli.model.experts import shapes_only
from quarkcli.model.failures import ModelCode
from quarkcli.model.head import without_head
from quarkcli.model.skeleton import Skeleton

Visit = Callable[[int, nn.Module, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Output:
    """Stands in recorded arguments for the `position`-th output of block `block`, filled in at replay."""

    block: int
    position: int


@dataclass
class Call:
    """The arguments of one block, the hidden states taken out.

    slot  where they go: 0 (first positional argument) or the keyword
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str


@dataclass
class Recording:
    """One batch, as the blocks see it.

    tokens, attention_mask  what was recorded: [b, T], and [b, T] or None
    hidden                  input of the first block (opaque)
    calls                   per block, None for a block this batch never reaches
    extras                  (block, position) -> further outputs that later blocks read, filled by `run_block`
    given, places           mappings that blocks get, as they were recorded, and as blocks have written to them
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    hidden: Any = None
    calls: list[Call | None] = field(default_factory=list)
    extras: dict[tuple[int, int], Any] = field(default_factory=dict)
    given: list[MutableMapping[Any, Any]] = field(default_factory=list)
    places: list[MutableMapping[Any, Any]] = field(default_factory=list)

    def twin(self) -> Recording:
        """Returns the recording for another stream: what blocks hand to later ones is its own."""
        return replace(self, extras={}, places=handed.own(self.given))

    def handed(self) -> dict[str, torch.Tensor]:
        """Returns by name what blocks have handed to later ones so far, beside hidden states."""
        return handed.written(self.given, self.places, self.extras)

    def hand(self, named: Mapping[str, torch.Tensor]) -> None:
        """Goes on with what `handed` returned of another recording of the same rows."""
        handed.fill(named, self.places, self.extras)

    @property
    def last(self) -> int:
        """Returns the index of the last block that is called."""
        return max(index for index, call in enumerate(self.calls) if call is not None)

    def reads(self, output: Output) -> bool:
        """True when some block is called with that output of another."""
        calls = [call for call in self.calls if call is not None]
        return any(output in _flat((call.args, tuple(call.kwargs.values()))) for call in calls)


@dataclass(frozen=True)
class Form:
    """Describes the output of a block class: a tensor (`count` None) or a tuple of `count` members.

    empty  positions of the tuple that are None"""

    count: int | None = None
    empty: tuple[int, ...] = ()

    def wrap(self, hidden: Any, others: Callable[[int], Any]) -> Any:
        if self.count is None:
            return hidden
        return (hidden, *(None if p in self.empty else others(p) for p in range(1, self.count)))

    @staticmethod
    def of(output: Any) -> Form:
        if isinstance(output, torch.Tensor):
            return Form()
        if not isinstance(output, (tuple, list)) or not output:
            raise ModelError(
                f"a decoder block returns {type(output).__name__}, which quark cannot follow", kind="E-CLASS-FOLLOW"
            )
        return Form(len(output), tuple(p for p, value in enumerate(output) if value is None))


class Recorder:
    """Records and replays batches on one skeleton."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._forms: dict[type, Form] = {}

    def record(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor | None, share_with: Recording | None
    ) -> Recording:
        """Runs the model's forward over stubs once; the outside tensors must be loaded."""
        count = len(self.skeleton.blocks)
        recording = Recording(tokens, attention_mask, calls=[None] * count)
        session = _Session(self, recording, share_with)
        with self.skeleton.code.running("fails in its forward pass"), without_head(self.skeleton):
            self._forward(session.visit, tokens, attention_mask)
        recording.places = handed.own(recording.given)
        if recording.hidden is None:
            raise ModelError("the model calls none of its decoder blocks", kind="E-CLASS-FOLLOW")
        return recording

    def logits(self, recording: Recording, hidden: Any, gradients: bool = False) -> torch.Tensor:
        """Returns [b, T, vocab] float32: the model's own forward with the last block returning `hidden`.

        gradients   they flow into `hidden`
        """
        return _logits_of(self._tail(recording, hidden, gradients)).float()

    def observe_tail(self, recording: Recording, hidden: Any, head: bool) -> None:
        """Runs what lies behind the blocks for its hooks alone; `head`: somebody sees what the head returns."""
        with nullcontext() if head else without_head(self.skeleton):
            self._tail(recording, hidden)

    def _tail(self, recording: Recording, hidden: Any, gradients: bool = False) -> Any:
        last = recording.last

        def visit(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given, _ = _hidden_of(args, kwargs, index)
            return self._form(block).wrap(hidden if index == last else given, lambda position: Output(index, position))

        return self._forward(visit, recording.tokens, recording.attention_mask, gradients)

    def run_block(
        self, index: int, recording: Recording, hidden: Any, params: Mapping[str, torch.Tensor] | None = None
    ) -> Any:
        """Returns the output hidden states of block `index` for this batch, or `hidden` for a skipped block.

        params   by name, to run with instead of the loaded ones; then gradients flow into them
        """
        call = recording.calls[index]
        if call is None:
            return hidden
        block = self.skeleton.blocks[index]
        fill = _filler(recording)
        args = tuple(_map_tuples(fill, value) for value in call.args)
        kwargs = {key: _map_tuples(fill, value) for key, value in call.kwargs.items()}
        hidden = hidden.clone()  # a block may write into its input, which is the caller's
        if call.slot == 0:
            args = (hidden, *args)
        else:
            kwargs[str(call.slot)] = hidden
        with self.skeleton.code.running(f"fails in decoder block {index}"):
            output = self._called(index, args, kwargs, params)
        self._check_form(block, index, output)
        values = output if isinstance(output, (tuple, list)) else (output,)
        for position, value in enumerate(values):
            if recording.reads(Output(index, position)):
                recording.extras[index, position] = value
        return values[0]

    def _called(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], params: Mapping[str, torch.Tensor] | None
    ) -> Any:
        block = self.skeleton.blocks[index]
        if params is None:
            with torch.no_grad():
                return block(*args, **kwargs)
        start = f"{self.skeleton.blocks_path}.{index}."
        own = {name.removeprefix(start): value for name, value in params.items()}
        return torch.func.functional_call(block, own, args, kwargs)

    def learn_form(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
        """Returns the form of this class's output. It runs the block once on the meta device to learn it.

        A block whose code looks at values cannot run there; it is taken to return a tensor, which `run_block` checks.
        """
        if type(block) not in self._forms:
            self._forms[type(block)] = _probe(block, args, kwargs, self.skeleton.code)
        return self._forms[type(block)]

    def _form(self, block: nn.Module) -> Form:
        return self._forms.get(type(block), Form())

    def _check_form(self, block: nn.Module, index: int, output: Any) -> None:
        found, expected = Form.of(output), self._form(block)
        if found.count != expected.count:
            raise ModelError(
                f"decoder block {index} ({type(block).__name__}) returns {_describe(found)}, but returned "
                f"{_describe(expected)} before, so quark cannot follow it",
                hint="quantize with a scheme that needs no calibration data, such as mxfp4: that never runs the model",
                kind="E-CLASS-FOLLOW",
            )

    def _forward(
        self, visit: Visit, tokens: torch.Tensor, attention_mask: torch.Tensor | None, gradients: bool = False
    ) -> Any:
        running = self.skeleton.code.running("fails in its forward pass")
        with torch.set_grad_enabled(gradients), running, _stubbed(self.skeleton, visit):
            return self.skeleton.model(input_ids=tokens, attention_mask=attention_mask, use_cache=False)


class _Stub(nn.Module):
    """Takes a block's place; attribute reads go on to the block (`layer.attention_type` and the like)."""

    def __init__(self, index: int, block: nn.Module, visit: Visit) -> None:
        super().__init__()
        # Not through setattr: a registered child would be loaded, moved and listed.
        self.__dict__.update(index=index, block=block, visit=visit)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.visit(self.index, self.block, args, kwargs)


@contextmanager
def _stubbed(skeleton: Skeleton, visit: Visit) -> Iterator[None]:
    blocks = skeleton.blocks
    skeleton.set_blocks(nn.ModuleList(_Stub(index, block, visit) for index, block in enumerate(blocks)))
    try:
        yield
    finally:
        skeleton.set_blocks(blocks)


class _Session:
    """State of one recording forward."""

    def __init__(self, recorder: Recorder, recording: Recording, share_with: Recording | None) -> None:
        self.recorder = recorder
        self.recording = recording
        self.others = share_with.calls if share_with is not None else []
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> (recorded tensor, the one stored)
        self.previous = -1
        self.version = 0
        # Hidden states handed out per block, each its own tensor object, so that arguments that are one are noticed.
        self.handed: dict[int, torch.Tensor] = {}

    def visit(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index <= self.previous:
            raise ModelError(f"the model runs decoder block {index} after block {self.previous}", kind="E-CLASS-FOLLOW")
        hidden, slot = _hidden_of(args, kwargs, index)
        if self.recording.hidden is None:
            self.recording.hidden = hidden
        elif not self._untouched(hidden):
            raise ModelError(
                f"the model changes the hidden states between decoder blocks {self.previous} and {index}",
                hint="quantize with a scheme that needs no calibration data, such as mxfp4: that never runs the model",
                kind="E-CLASS-FOLLOW",
            )
        form = self.recorder.learn_form(block, args, kwargs)
        other = self.others[index] if self.others else None
        rest = args[1:] if slot == 0 else args
        named = {key: value for key, value in kwargs.items() if key != slot}
        self.recording.calls[index] = Call(
            self._keep(rest, other.args if other else ()),
            {key: self._keep(value, other.kwargs.get(key) if other else None) for key, value in named.items()},
            slot,
        )
        self.previous = index
        self.handed[index] = hidden.detach()
        self.version = _writes(hidden)
        return form.wrap(self.handed[index], lambda position: Output(index, position))

    def _untouched(self, hidden: torch.Tensor) -> bool:
        """True when these are the hidden states the previous block's stub gave out, or a view of all of them."""
        given = self.handed[self.previous]
        same_place = hidden.data_ptr() == given.data_ptr() and hidden.stride() == given.stride()
        return same_place and hidden.shape == given.shape and _writes(hidden) == self.version

    def _keep(self, value: Any, other: Any) -> Any:
        """Returns the value to store for an argument. `other` is the one that another batch stored there."""
        if type(value) is tuple:
            others = other if type(other) is tuple and len(other) == len(value) else (None,) * len(value)
            return tuple(self._keep(item, twin) for item, twin in zip(value, others, strict=True))
        if isinstance(value, MutableMapping):
            return handed.place(self.recording.given, value)
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self.kept:
            shared = isinstance(other, torch.Tensor) and _same(other, value)
            self.kept[id(value)] = (value, other if shared else value)
        output = next((Output(index, 0) for index, hidden in self.handed.items() if value is hidden), None)
        return output or self.kept[id(value)][1]


def _writes(tensor: torch.Tensor) -> int:
    """Returns the number of writes to the tensor's storage. Tensors of inference mode do not count them and give 0."""
    return 0 if tensor.is_inference() else tensor._version


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> tuple[Any, int | str]:
    if args:
        return args[0], 0
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], "hidden_states"
    raise ModelError(f"decoder block {index} is called without hidden states", kind="E-CLASS-FOLLOW")


def _filler(recording: Recording) -> Callable[[Any], Any]:
    def fill(value: Any) -> Any:
        if isinstance(value, handed.Place):
            return recording.places[value.number]
        if not isinstance(value, Output):
            return value
        if (value.block, value.position) not in recording.extras:
            raise ModelError(
                f"a decoder block reads an output of block {value.block}, which has not run for this batch",
                kind="E-CLASS-FOLLOW",
            )
        return recording.extras[value.block, value.position]

    return fill


def _probe(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], code: ModelCode) -> Form:
    meta = all(tensor.is_meta for tensor in block.parameters())
    args, kwargs = handed.copied((args, kwargs), torch.device("meta") if meta else None)
    try:
        with shapes_only(block):
            output = block(*args, **kwargs)
    except Exception as error:
        if code.passes(error):
            raise
        return Form()
    return Form.of(output)


def _map_tuples(change: Callable[[Any], Any], value: Any) -> Any:
    """Applies `change` to a value or inside nested tuples. Lists stay the objects they are: blocks share them."""
    if type(value) is tuple:
        return tuple(_map_tuples(change, item) for item in value)
    return change(value)


def _flat(value: Any) -> Iterator[Any]:
    if type(value) is tuple:
        for item in value:
            yield from _flat(item)
    elif isinstance(value, Output):
        yield value


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)


def _logits_of(output: Any) -> torch.Tensor:
    logits = output.logits if hasattr(output, "logits") else output[0]
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        raise ModelError("the model returns no logits", kind="E-CLASS-FOLLOW")
    return logits


def _describe(form: Form) -> str:
    return "a tensor" if form.count is None else f"a tuple of {form.count}"
