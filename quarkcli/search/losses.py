"""Measures the loss of each group of weights in each candidate, in nats of KL divergence per token.

To second order the divergence of the quantized model from its source is a sum over groups of 1/2 E[(g . dh)^2]: dh is
how much a block's output moves when one group is quantized, weights and what they read, and g is the gradient, at that
output, of the log-probability of a token that was drawn from the source's own prediction. That makes it the true Fisher
information; targets of the text would make it another. Tokens are taken one by one: the products of different tokens
would add noise and little else.

Codes are fitted to one part of the rows, and losses are means over the other.

One forward keeps the input of every block. Then blocks come from the last to the first: the gradient goes through the
source block, every candidate quantizes the block as a run would, and each group is put in place alone. Memory is that
of one block.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quarkcli import memory
from quarkcli.errors import ModelError, ResourceError
from quarkcli.events import Listener, Message, PartDone, Working
from quarkcli.forward.lanes import default_batch
from quarkcli.forward.moments import held_out, holds_out
from quarkcli.forward.walk import SERVED, Walk
from quarkcli.job.options import Prepared
from quarkcli.model.handlers import Handlers
from quarkcli.plan.model import Part
from quarkcli.search.candidates import Group, Space
from quarkcli.search.quantizing import Made, Quantizing
from quarkcli.search.states import States

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData

Losses = dict[tuple[str, str], float]  # by group and candidate
Batches = dict[int, Tensor]  # what has the shape of hidden states, by batch; only batches with tokens to score on
SCORED_TOKENS = 8192  # a quarter of the rows is scored on, or more where that is fewer tokens, at most half


def measure(
    space: Space,
    base: Prepared,
    groups: Sequence[Group],
    data: CalibrationData,
    device: str,
    folder: Path,
    tell: Listener,
) -> Losses:
    """Returns the loss of every group in every candidate that it may get.

    base     the run whose model, settings of data and seed are used
    folder   for hidden states; what is put there goes again
    """
    measuring = _Measuring(space, base, groups, data, device, folder, tell)
    measuring.forward()
    return measuring.backward()


class _Measuring:
    """One search at work."""

    def __init__(
        self,
        space: Space,
        base: Prepared,
        groups: Sequence[Group],
        data: CalibrationData,
        device: str,
        folder: Path,
        tell: Listener,
    ) -> None:
        self.base = base
        self.tell = _once(tell)
        self.device = device
        self.states = States(folder)
        self.runner = _runner(base, data, device)
        self.walk = _walk(space, data, self.runner, self.tell)
        self.batch = self.walk.batch
        fitted, self.scored = _halves(data)
        self.walk.mask = fitted
        self.tokens = int(self.scored.sum())
        self.generator = torch.Generator().manual_seed(base.seed)
        self.groups: dict[int, list[Group]] = {}
        for group in groups:
            self.groups.setdefault(group.part, []).append(group)
        self.workers = {
            candidate.name: Quantizing.of(candidate.prepared, data, self.walk, self.runner, self.tell)
            for candidate in space.candidates
            if candidate.prepared is not None
        }
        self.kept = [candidate.name for candidate in space.candidates if candidate.prepared is None]

    @property
    def blocks(self) -> list[tuple[int, Part]]:
        return [(part.block, part) for part in self.base.plan.parts if part.block is not None]

    def forward(self) -> None:
        """Runs the source model and keeps the input of every block."""
        self.walk.start()
        for block, part in self.blocks:
            self.tell(Working(f"running {part.name} of the original model"))
            self.states.write(block, self.walk.served)
            self.runner.load_block(block, self._read(part.tensors))
            self.walk.advance(block, Handlers())
            self.runner.unload_block(block)
            self.walk.take(dict.fromkeys(self.walk.hidden, self.walk.served))

    def backward(self) -> Losses:
        """Goes back from the head, block by block."""
        losses, behind = self._tail()
        begun = time.monotonic()
        total = len(self.blocks)
        for count, (block, part) in enumerate(reversed(self.blocks), 1):
            at = time.monotonic()
            found, behind = self._block(block, part, behind)
            losses |= found
            now = time.monotonic()
            eta = (now - begun) / count * (total - count)
            rss, gpu = memory.peak_rss(), memory.peak_gpu(self.device)
            self.tell(PartDone(count, total, part.name, "search", now - at, None, rss, gpu, eta))
        return losses

    def _block(self, block: int, part: Part, behind: Batches) -> tuple[Losses, Batches]:
        """Returns the losses of a block's groups, and the gradient at its input. `behind`: the one at its output."""
        self.tell(Working(f"going back through {part.name}"))
        tensors = self._read(part.tensors)
        self.walk.take(dict.fromkeys(self.walk.hidden, self.states.take(block, self.runner.dtype)))
        outputs, before = self._back(block, tensors, behind)
        losses: Losses = {}
        for name, worker in self.workers.items():
            if not self._of(part, name):
                continue
            self.tell(Working(f"quantizing {part.name} with {name}"))
            made = worker.make(part, tensors)
            self._check_batch()
            still = outputs
            if made.rewritten is not tensors:  # what a transform rounds is no group's loss
                self.runner.load_block(block, made.rewritten)
                still = dict(zip(behind, self.walk.outputs(block, Handlers(), behind), strict=True))
            for group in self._of(part, name):
                losses[group.name, name] = self._loss(block, group, made, still, behind)
        self._keep(losses, part)
        self.runner.unload_block(block)
        return losses, before

    def _check_batch(self) -> None:
        """Raises ResourceError when the device ran out of memory and batches are others now."""
        if self.walk.batch != self.batch:
            raise ResourceError(
                f"not enough GPU memory for {self.batch} sequences at a time",
                where="search",
                hint=f"use --calib-batch {self.walk.batch}",
                kind="E-MEMORY",
            )

    def _of(self, part: Part, candidate: str) -> list[Group]:
        """Returns the groups of a part that may get a candidate."""
        return [group for group in self.groups.get(part.index, ()) if candidate in group.allowed]

    def _keep(self, losses: Losses, part: Part) -> None:
        losses |= {(group.name, name): 0.0 for name in self.kept for group in self._of(part, name)}

    def _back(self, block: int, tensors: Mapping[str, Tensor], behind: Batches) -> tuple[Batches, Batches]:
        """Returns the source block's outputs, and the gradients at its inputs."""
        outputs, before = {}, {}
        self.runner.load_block(block, tensors)
        for index, gradient in behind.items():
            hidden = self.walk.served[index].requires_grad_()
            with torch.enable_grad():
                out = self.walk.run_with(block, index, tensors)
                (before[index],) = torch.autograd.grad(out, hidden, gradient.to(out.device))
            hidden.requires_grad_(False)
            outputs[index] = out.detach().to(hidden.device)
        return outputs, before

    def _loss(self, block: int, group: Group, made: Made, outputs: Batches, behind: Batches) -> float:
        """Returns the loss of one group: the mean over tokens of half the squared product of gradient and movement."""
        self.runner.load_block(block, {**made.rewritten, **made.changed(group.names)})
        handlers = made.handlers(group.names, self.runner.loads)
        total = 0.0
        for index, out in zip(behind, self.walk.outputs(block, handlers, behind), strict=True):
            moved = (out - outputs[index].to(out.device)) * behind[index].to(out.device)
            products = self.walk.per_token(moved.float())
            mask = self.walk.of_batch(self.scored, index).to(products.device)
            total += float((products * mask).double().square().sum())
        return total / 2 / self.tokens

    # -- the tail --------------------------------------------------------------------------------------------------

    def _tail(self) -> tuple[Losses, Batches]:
        """Returns the losses of a head that is searched, and the gradient behind the last block."""
        self.tell(Working("going back through the tail"))
        outside = self._read(self.runner.outside_tensors())
        self.runner.load_outside(outside)
        marked = [bool(part.any()) for part in self.scored.split(self.batch)]
        behind = {index: self._drawn(index) for index, wanted in enumerate(marked) if wanted}
        losses: Losses = {}
        for part in self.base.plan.parts:
            if part.kind != "tail" or part.index not in self.groups:
                continue
            for name, worker in self.workers.items():
                made = worker.make(part, {tensor: outside[tensor] for tensor in part.tensors})
                for group in self._of(part, name):
                    losses[group.name, name] = self._head_loss(group, made, outside, behind)
            self._keep(losses, part)
        self.runner.unload_outside()
        return losses, behind

    def _drawn(self, index: int) -> Tensor:
        """Returns the gradient of the log-probability of tokens drawn from the source, for one batch."""
        parked = self.walk.served[index]
        hidden = parked.detach().to(self.runner.device).requires_grad_()
        logits = self.runner.logits(self.walk.recordings[SERVED][index], hidden, gradients=True)
        slope = torch.softmax(logits.detach(), -1)
        labels = torch.stack([self._draw(row) for row in slope])
        slope = slope.neg_().scatter_add_(-1, labels[..., None], torch.ones_like(slope[..., :1]))
        slope *= self.scored.split(self.batch)[index][..., None].to(slope.device)
        (found,) = torch.autograd.grad(logits, hidden, slope)
        return found.to(parked.device)

    def _draw(self, chances: Tensor) -> Tensor:
        """Returns one token per place, drawn from probabilities [tokens, vocabulary]."""
        uniform = torch.rand(chances.shape[0], generator=self.generator, dtype=torch.float64).to(chances.device)
        rising = chances.double().cumsum(-1)
        return torch.searchsorted(rising, (uniform * rising[:, -1])[:, None]).clamp_(max=chances.shape[1] - 1)[:, 0]

    def _head_loss(self, group: Group, made: Made, outside: Mapping[str, Tensor], batches: Iterable[int]) -> float:
        """Returns the divergence itself, with the head as it would be served."""
        total = 0.0
        for index in batches:
            recording = self.walk.recordings[SERVED][index]
            hidden = self.walk.served[index].to(self.runner.device)
            self.runner.load_outside(outside)
            source = torch.log_softmax(self.runner.logits(recording, hidden), -1)
            self.runner.load_outside({**outside, **made.changed(group.names)})
            with self.runner.handlers(None, made.handlers(group.names, self.runner.loads)):
                served = torch.log_softmax(self.runner.logits(recording, hidden), -1)
            each = (source.exp() * (source - served)).sum(-1)
            mask = self.scored.split(self.batch)[index].to(each.device)
            total += float((each * mask).double().sum())
        return total / self.tokens

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = self.base.weights.read_many(names)
        return {name: tensor.to(self.device) for name, tensor in found.items()}


def _runner(base: Prepared, data: CalibrationData, device: str) -> Any:
    """Returns a runner that computes in float32: 8-bit formats move a block's output no more than bfloat16 rounds."""
    from quarkcli.model.runner import Runner

    softmax = any("p" in module.specs for module in base.plan.attention.values())
    runner = Runner(
        base.source.whole_folder(), base.weights.headers, device=device, dtype=torch.float32,
        trust_remote_code=base.options.trust_remote_code, eager=softmax,
        transposed_experts=base.layout.transposed_experts,
    )  # fmt: skip
    runner.check_blocks()
    runner.check_tokens(data.tokens)
    if not runner.has_head:
        raise ModelError(
            "the model has no head, so it gives no probabilities to compare",
            where=str(base.source.folder),
            hint="give the model with its head",
            kind="E-MODEL-HEAD",
        )
    return runner


def _halves(data: CalibrationData) -> tuple[Tensor, Tensor]:
    """Returns masks of the tokens to calibrate with and of those to score on, bool [rows, seqlen].

    Codes that were fitted to some tokens lose less on these than on others.
    """
    rows, length = data.tokens.shape
    mask = torch.ones(rows, length, dtype=torch.bool) if data.mask is None else data.mask.bool()
    if rows == 1:
        return mask, mask
    wanted = min(rows // 2, max(rows // 4, -(-SCORED_TOKENS // length)))
    scored = (torch.arange(rows) >= rows - wanted)[:, None] & mask
    return ~scored & mask, scored


def _walk(space: Space, data: CalibrationData, runner: Any, tell: Listener) -> Walk:
    base, runs = space.base, space.runs
    streams = frozenset[str]({SERVED}).union(*(step.algorithm.streams for run in runs for step in run.steps))
    names = runner.outside_tensors()
    held = held_out(*data.tokens.shape) if any(holds_out(run.needs) for run in runs) else None
    batch = default_batch(runner.device, data.tokens.shape[1], base.options.calib_batch)
    return Walk(
        runner, lambda: base.weights.read_many(names), data.tokens, data.mask, batch, tell,
        streams=sorted(streams, reverse=True), held=held,
    )  # fmt: skip


def _once(tell: Listener) -> Listener:
    """Returns a listener that passes a message on the first time alone: every candidate would say the same."""
    said: set[str] = set()

    def listen(event: Any) -> None:
        if isinstance(event, Message):
            if event.text in said:
                return
            said.add(event.text)
        tell(event)

    return listen
