"""Keeps the common input of a layer's experts, and makes each expert's moments of it when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quarkcli.forward.group import Group
from quarkcli.forward.moments import Means, Moments, Share, chosen
from quarkcli.spec import TensorSpec


@dataclass
class ExpertLayer:
    """The common input of one layer's experts, with its routing and counts.

    runner      runs one expert for its inner activation
    all_tokens  every token feeds every expert
    module      the experts
    tensor      a file tensor of theirs
    hidden      per batch, the tokens that are no padding, [tokens, features]
    source      per batch, the same tokens of the source stream; None: there is none
    routed      per batch, the experts of each token
    held        per batch, which of its tokens are held out; None: none
    ids         per batch, the ids of its tokens; None: they do not matter
    lanes       per batch, the lane that it is of
    tokens      expert -> how many tokens were routed to it
    least       with fewer tokens than this an expert is taken for one that saw none: the layer stands in
    reads       how the weights read the common input, and the inner one; None: as it is
    token_weights   how much a token of each id counts in the moments of both, see `forward.balance`; None: all alike
    """

    runner: Any
    all_tokens: bool
    module: Any = None
    tensor: str = ""
    hidden: list[Tensor] = field(default_factory=list)
    source: list[Tensor | None] = field(default_factory=list)
    routed: list[Tensor] = field(default_factory=list)
    held: list[Tensor | None] = field(default_factory=list)
    ids: list[Tensor | None] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    tokens: dict[int, int] = field(default_factory=dict)
    least: int = 1
    reads: tuple[TensorSpec | None, TensorSpec | None] = (None, None)
    token_weights: tuple[Tensor | None, Tensor | None] = (None, None)
    _layer: dict[tuple[bool, bool | None], Means] = field(default_factory=dict)

    def keep(
        self,
        hidden: Tensor,
        routed: Tensor,
        held: Tensor | None,
        source: tuple[Tensor, Tensor] | None,
        lane: int,
        ids: Tensor | None = None,
    ) -> None:
        """Keeps one batch of a lane.

        source   of the source stream: its tokens and their routing, which is replayed so that both streams' moments
                 are of the same tokens
        """
        self.hidden.append(hidden.clone())
        self.source.append(source[0] if source is not None else None)
        self.routed.append(source[1] if source is not None else routed.clone())
        self.held.append(held)
        self.ids.append(ids)
        self.lanes.append(lane)

    def merge(self, layers: Sequence[ExpertLayer]) -> None:
        """Takes the batches and counts of all ranks, in the order of their lanes; its own are among them."""
        self.hidden, self.source, self.routed, self.held, self.ids, self.lanes = (
            [one for layer in layers for one in getattr(layer, name)]
            for name in ("hidden", "source", "routed", "held", "ids", "lanes")
        )
        experts = sorted({expert for layer in layers for expert in layer.tokens})
        self.tokens = {expert: sum(layer.tokens.get(expert, 0) for layer in layers) for expert in experts}

    def bare(self) -> ExpertLayer:
        """Returns batches and counts alone, for other ranks."""
        return replace(self, runner=None, module=None, _layer={})

    def few(self, expert: int) -> bool:
        """True for an expert that saw too few tokens to have statistics of its own."""
        return not self.all_tokens and self.tokens.get(expert, 0) < self.least

    def rows(self, expert: int, held: bool | None) -> Iterator[tuple[int, Tensor]]:
        """Yields lane and common input of one expert's tokens, batch by batch; see `_share`. Nothing of too few."""
        for batch, lane in enumerate(() if self.few(expert) else self.lanes):
            share = self._share(batch, expert, held)
            if share is not None:
                yield lane, share[0]

    def _share(self, batch: int, expert: int | None, held: bool | None, inner: bool = False) -> Share | None:
        """Returns the common input of a batch's tokens that one expert gets, of all when it is None; None: no token.

        held    only tokens that are held out, or only those that are not; None: all
        inner   they count as they do for the inner input; those that are held out count alike
        """
        hidden, source, mask = self.hidden[batch], self.source[batch], self.held[batch]
        picked = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        if expert is not None and not self.all_tokens:
            picked = (self.routed[batch] == expert).any(-1)
        if held is not None and mask is not None:
            picked = picked & (mask if held else ~mask)
        elif held:
            return None
        if not bool(picked.any()):
            return None
        of_ids, ids = self.token_weights[inner], self.ids[batch]
        weights = of_ids[ids[picked]] if of_ids is not None and ids is not None and not held else None
        return hidden[picked], chosen(source, picked), weights

    def inside(self, expert: int, rows: Tensor) -> Tensor:
        """Returns what an expert's down projection reads for rows of the common input."""
        found: Tensor = self.runner.expert_hidden(self.module, expert, rows)
        return found

    def means(self, experts: Iterable[int | None], inner: bool, held: bool | None) -> Means:
        """Returns the means over the tokens of some experts: of the common input, or of the inner one."""
        moments = Moments(self.reads[inner])
        experts = list(experts)
        for batch, lane in enumerate(self.lanes):
            moments.add_shares(self._shares(batch, experts, inner, held), lane)
        return moments.means()

    def _shares(self, batch: int, experts: list[int | None], inner: bool, held: bool | None) -> Iterator[Share]:
        """Yields what each of some experts reads of a batch."""
        for expert in experts:
            share = self._share(batch, expert, held, inner)
            if share is None:
                continue
            if not inner:
                yield share
                continue
            assert expert is not None
            rows, source, weights = share
            yield self.inside(expert, rows), self.inside(expert, source) if source is not None else None, weights

    def own(self, expert: int, inner: bool, held: bool | None) -> Means:
        """Returns one expert's means; empty ones where it saw too few tokens."""
        return self.means([] if self.few(expert) else [expert], inner, held)

    def shrunk(self, expert: int, inner: bool, held: bool | None) -> Means:
        """Returns one expert's means, with its layer's as a prior when it saw fewer than two tokens per feature."""
        own = self.own(expert, inner, held)
        if own.gram is not None and own.tokens >= 2 * own.gram.shape[0]:
            return own
        return own.shrunk(self.layer(inner, held))

    def wants_layer(self, expert: int, width: int, held: bool | None) -> bool:
        """True when `shrunk` asks for the layer's own means, of an activation of so many features."""
        if self.few(expert):
            return True
        seen = 0
        for batch in range(len(self.lanes)):
            share = self._share(batch, expert, held)
            seen += len(share[0]) if share is not None else 0
        return seen < 2 * width

    def pool(self, inner: bool, held: bool | None, group: Group) -> None:
        """Makes the layer's own means on all ranks, each from the tokens of its lanes."""
        moments, own = Moments(self.reads[inner]), group.shares[group.rank]
        experts: list[int | None] = [*sorted(self.tokens)] if inner else [None]
        for batch, lane in enumerate(self.lanes):
            if lane in own:
                moments.add_shares(self._shares(batch, experts, inner, held), lane)
        moments.spread(group)
        self._layer[inner, held] = moments.means()

    def layer(self, inner: bool, held: bool | None) -> Means:
        """Returns the layer's own means: of all tokens for the common input, of all experts for the inner one."""
        if (inner, held) not in self._layer:
            self._layer[inner, held] = self.means(sorted(self.tokens) if inner else [None], inner, held)
        return self._layer[inner, held]
