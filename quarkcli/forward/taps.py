"""Taps activations inside a running model for their statistics: also of experts, and without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quarkcli.errors import ModelError
from quarkcli.forward.experts import ExpertLayer
from quarkcli.numerics.observers import STATISTICS

if TYPE_CHECKING:
    from quarkcli.family import Site
    from quarkcli.forward.statistics import Statistics


def unpadded(mask: Tensor, leading: torch.Size) -> Tensor | None:
    """Returns bool [values], False on padding, for activations [*leading, features]; see `spread`."""
    return spread(mask.bool(), leading)


def spread(values: Tensor, leading: torch.Size) -> Tensor | None:
    """Returns a value [rows] for each row of activations [*leading, features], of one for each token.

    Their axes hold those of the tokens, or all flat.

    Axes of streams may stand before or behind. None when no axes are the tokens': nothing can be told apart.
    """
    for axis in range(len(leading) - 1):
        if leading[axis : axis + 2] == values.shape:
            behind = (1,) * (len(leading) - axis - 2)
            return values.reshape(*values.shape, *behind).expand(leading).reshape(-1)
    return values.reshape(-1) if leading.numel() == values.numel() else None


@dataclass
class Batch:
    """The batch that runs.

    mask   bool [batch, tokens] or None; 0 marks padding
    held   bool [batch, tokens] or None; true for held-out tokens
    name   for messages
    lane   that it is of
    ids    of its tokens, int64 [batch, tokens]; None: they do not matter
    first  bool [batch, tokens] or None; true for the first token of each row
    """

    mask: Tensor | None = None
    held: Tensor | None = None
    name: str = ""
    lane: int = 0
    ids: Tensor | None = None
    first: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """Returns activations [..., features] as rows, without padding."""
        rows = x.reshape(-1, x.shape[-1])
        kept = self._kept(x)
        return rows if kept is None else rows[kept.to(rows.device)]

    def tokens(self, x: Tensor) -> Tensor:
        """Returns values of attention [batch, heads, tokens, ...] without those of padding."""
        if self.mask is None or self.mask.shape != (x.shape[0], x.shape[2]):
            return x
        return x.movedim(2, 1)[self.mask.bool().to(x.device)]

    def held_rows(self, x: Tensor) -> Tensor | None:
        """Returns a mask of `rows` that are held out, bool; None: none."""
        return self._of_rows(self.held, x)

    def first_rows(self, x: Tensor) -> Tensor | None:
        """Returns a mask of `rows` that are first tokens, bool; None where nothing can be told apart."""
        return self._of_rows(self.first, x)

    def row_ids(self, x: Tensor) -> Tensor:
        """Returns the token id of each of `rows`, int64. Raises ModelError where nothing can be told apart."""
        ids = self._of_rows(self.ids, x)
        if ids is None:
            raise ModelError(
                f"quark cannot tell which rows of activations of shape {list(x.shape)} are which tokens",
                hint="leave balance out",
                kind="E-CLASS-FOLLOW",
            )
        return ids

    def _of_rows(self, values: Tensor | None, x: Tensor) -> Tensor | None:
        """Returns a value for each of `rows`, of one for each token [batch, tokens]."""
        found = spread(values, x.shape[:-1]) if values is not None else None
        if found is None:
            return None
        kept = self._kept(x)
        return (found if kept is None else found[kept]).to(x.device)

    def _kept(self, x: Tensor) -> Tensor | None:
        return unpadded(self.mask, x.shape[:-1]) if self.mask is not None else None


def linear_tap(statistics: Statistics, site: str) -> Callable[[Tensor], None]:
    """Returns what feeds a linear's input, or output, into the statistics."""
    weights, sampled = statistics.token_weights(site), "samples" in statistics.needs.get(site, set())

    def tap(x: Tensor) -> None:
        batch = statistics.batch
        rows, held, source = batch.rows(x), batch.held_rows(x), statistics.source_rows.pop(site, None)
        first = batch.first_rows(x) if sampled else None
        statistics.take(site, rows, held, source, None if weights is None else weights[batch.row_ids(x)], first)

    return tap


def site_taps(statistics: Statistics, site: Site, tensor: str) -> dict[str, Callable[[Tensor], None]]:
    """Returns the tap of a site at one of its linears; where sites are guessed, the others are compared with it."""
    tap = linear_tap(statistics, site.name)
    if not statistics.plan.guessed or len(site.members) == 1:
        return {tensor: tap}
    same = OneInput()
    tensors = [statistics.plan.targets[member].view.tensor for member in site.members]
    return {each: same.of(each, tap if each == tensor else None) for each in filter(statistics.runner.loads, tensors)}


def source_tap(statistics: Statistics, site: str) -> Callable[[Tensor], None]:
    """Returns what notes a linear's input in the source stream."""

    def tap(x: Tensor) -> None:
        statistics.source_rows[site] = statistics.batch.rows(x).clone()

    return tap


class OneInput:
    """Checks that linears which were guessed to read one activation do."""

    def __init__(self) -> None:
        self._first = ""
        self._seen: Tensor | None = None

    def of(self, tensor: str, tap: Callable[[Tensor], None] | None = None) -> Callable[[Tensor], None]:
        """Returns what compares a linear's input with that of the linear that came first, and hands it to `tap`.

        It raises ModelError where they are not the same.
        """

        def compared(x: Tensor) -> None:
            self._compare(tensor, x)
            if tap is not None:
                tap(x)

        return compared

    def _compare(self, tensor: str, x: Tensor) -> None:
        if self._first in ("", tensor):
            self._first, self._seen = tensor, x
        elif self._seen is None or not _same(self._seen, x):
            raise ModelError(
                f"reads another input than {self._first.removesuffix('.weight')}, although their names say that "
                "servers make one linear of them",
                where=tensor.removesuffix(".weight"),
                hint="describe the model in a family file, with other 'sites': quark models infer MODEL -o FILE.yaml",
                kind="E-MODEL-FAMILY",
            )


def _same(one: Tensor, other: Tensor) -> bool:
    in_place = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return one.shape == other.shape and (in_place or torch.equal(one, other))


def attention_tap(statistics: Statistics, module: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """Returns what feeds queries, keys and values into the statistics."""

    def tap(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for kind, value in (("q", q), ("k", k), ("v", v)):
            statistics.see(f"{module}.{kind}", statistics.batch.tokens(value))
        return q, k, v

    return tap


def softmax_tap(statistics: Statistics, module: str) -> Callable[[Tensor], None]:
    """Returns what feeds the probabilities of attention into the statistics."""

    def tap(p: Tensor) -> None:
        statistics.see(f"{module}.p", statistics.batch.tokens(p), told=False)  # its channels are places in a row

    return tap


class ExpertTap:
    """Feeds one layer's experts into the statistics (the protocol of `model.experts.ExpertHandler`)."""

    def __init__(self, statistics: Statistics, prefix: str) -> None:
        self.statistics = statistics
        self.prefix = prefix
        self.layer = statistics.layers.setdefault(prefix, ExpertLayer(statistics.runner, statistics.all_tokens))
        self.layer.least = statistics.least
        self.site_in = statistics.expert_site(prefix, "experts_in")
        self.site_down = statistics.expert_site(prefix, "experts_down")
        reads = [statistics.read(s.name) if s is not None else None for s in (self.site_in, self.site_down)]
        self.layer.reads = reads[0], reads[1]
        counts = [statistics.token_weights(s.name) if s is not None else None for s in (self.site_in, self.site_down)]
        self.layer.token_weights = counts[0], counts[1]
        self.kept: Tensor | None = None  # which tokens of this call are no padding; None: all
        self.routed: Tensor | None = None  # [tokens, k] of this call
        sites = [site for site in (self.site_in, self.site_down) if site]
        kept = {"gram", "gram_val", "cross", "samples"}
        self.moments = any(kept & statistics.needs.get(site.name, set()) for site in sites)
        for _, expert in statistics.members((self.site_in or self.site_down).name):  # type: ignore[union-attr]
            self.layer.tokens.setdefault(expert, 0)

    def observe(self, module: Any, hidden: Tensor, top_k_index: Tensor) -> None:
        rows, routed = hidden, top_k_index
        mask = self.statistics.batch.mask
        self.routed = top_k_index
        self.kept = unpadded(mask, hidden.shape[:-1]) if mask is not None else None
        if self.kept is not None:
            self.kept = self.kept.to(hidden.device)
            rows, routed = hidden[self.kept], top_k_index[self.kept]
        self.layer.module = module
        for expert, count in zip(*torch.unique(routed, return_counts=True), strict=True):
            self.layer.tokens[int(expert)] = self.layer.tokens.get(int(expert), 0) + int(count)
        held = self.statistics.batch.held
        held = unpadded(held, hidden.shape[:-1]) if held is not None else None
        if held is not None:
            held = held.to(hidden.device) if self.kept is None else held.to(hidden.device)[self.kept]
        source = self.statistics.source_experts.pop(self.prefix, None)
        if source is not None:
            self.statistics.check_finite(f"{self.prefix}.input", source[0], " of the original model")
        if self.site_in:
            self.statistics.take(self.site_in.name, rows, held, first=self.statistics.batch.first_rows(hidden))
        if self.moments:
            batch = self.statistics.batch
            counted = any(each is not None for each in self.layer.token_weights)
            self.layer.keep(rows, routed, held, source, batch.lane, batch.row_ids(hidden) if counted else None)
        if self.site_down and self.statistics.all_tokens and self._wants_range():
            for expert in self.layer.tokens:
                inside = self.statistics.runner.expert_hidden(module, expert, rows)
                self.statistics.see(self.site_down.name, inside, expert)
                self.statistics.see_expert(self.site_down.name, expert, inside)

    def _wants_range(self) -> bool:
        return self.site_down is not None and bool(
            STATISTICS.keys() & self.statistics.needs.get(self.site_down.name, set())
        )

    def gate_up_input(self, expert: int, x: Tensor) -> Tensor:
        if self.site_in and not self.statistics.all_tokens:
            self.statistics.see_expert(self.site_in.name, expert, self._unpadded(expert, x))
        return x

    def down_input(self, expert: int, h: Tensor) -> Tensor:
        # With every token for every expert, `observe` has already seen these.
        if self.site_down and not self.statistics.all_tokens:
            rows = self._unpadded(expert, h)
            self.statistics.see(self.site_down.name, rows, expert)
            self.statistics.see_expert(self.site_down.name, expert, rows)
        return h

    def _unpadded(self, expert: int, h: Tensor) -> Tensor:
        """Returns the rows of `h` that are no padding; they come by choice, then by token."""
        if self.kept is None or self.routed is None:
            return h
        tokens = self.routed.T.eq(expert).nonzero()[:, 1]
        return h[self.kept[tokens]]


class SourceExpertTap:
    """Notes what one layer's experts read in the source stream, and how it routes (an `ExpertHandler`)."""

    def __init__(self, statistics: Statistics, prefix: str) -> None:
        self.statistics = statistics
        self.prefix = prefix

    def observe(self, module: Any, hidden: Tensor, top_k_index: Tensor) -> None:
        mask = self.statistics.batch.mask
        kept = unpadded(mask, hidden.shape[:-1]) if mask is not None else None
        if kept is not None:
            kept = kept.to(hidden.device)
            hidden, top_k_index = hidden[kept], top_k_index[kept]
        self.statistics.source_experts[self.prefix] = hidden.clone(), top_k_index.clone()

    def gate_up_input(self, expert: int, x: Tensor) -> Tensor:
        return x

    def down_input(self, expert: int, h: Tensor) -> Tensor:
        return h
