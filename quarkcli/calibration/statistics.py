"""Statistics of activations, per input site.

A site is one activation tensor; every weight that reads it shares its statistics. Second moments are running means in
float32 over fixed chunks of `CHUNK` tokens in sample order, ranges and histograms are exact in any order: the batch
size changes no bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quarkcli.errors import DataError
from quarkcli.numerics.observers import STATISTICS, Histogram, MinMax, amax_of
from quarkcli.plan.model import Plan, Site
from quarkcli.spec import TensorSpec

CHUNK = 2048
_NONFINITE = (
    "see whether the source model itself overflows on this text; other --calib-data, or --exclude these modules"
)
_UNSEEN_ATTENTION = (
    "this model computes attention in code of its own, where its operands cannot be seen; take --kv-cache none, or a "
    "recipe whose cache has scale.constant_amax"
)


class Gram:
    """Running mean of x x^T over tokens, float32 [features, features]."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.tokens = 0
        self._waiting: list[Tensor] = []
        self._waiting_rows = 0

    def add(self, rows: Tensor) -> None:
        """Take rows [tokens, features] in sample order."""
        self._waiting.append(rows)
        self._waiting_rows += rows.shape[0]
        while self._waiting_rows >= CHUNK:
            joined = torch.cat(self._waiting)
            self._fold(joined[:CHUNK])
            rest = joined[CHUNK:].clone()
            self._waiting, self._waiting_rows = [rest], rest.shape[0]

    def _fold(self, rows: Tensor) -> None:
        count = rows.shape[0]
        if count == 0:
            return
        x = rows.float()
        total = self.tokens + count
        if self.mean is None:
            self.mean = x.T @ x
            self.mean /= total
        else:
            self.mean.mul_(self.tokens / total).addmm_(x.T, x, alpha=1.0 / total)
        self.tokens = total

    def result(self) -> tuple[Tensor | None, int]:
        """(mean or None when no token came, tokens)."""
        if self._waiting_rows:
            self._fold(torch.cat(self._waiting))
        self._waiting, self._waiting_rows = [], 0
        return self.mean, self.tokens


@dataclass
class _ExpertLayer:
    """What the experts of one layer saw: their common input with its routing, and counts."""

    module: Any = None
    hidden: list[Tensor] = field(default_factory=list)
    routed: list[Tensor] = field(default_factory=list)
    tokens: dict[int, int] = field(default_factory=dict)
    pooled: dict[str, tuple[Tensor | None, int]] = field(default_factory=dict)


class Statistics:
    """Statistics of one part. `needs`: kinds by site, those of `STATISTICS` and `gram`.

    Sites of outputs are `<module>.output`, those of attention `<module>.q`, `.k`, `.v` and `.p`.

    runner      runs one expert for its inner activation (see `model.runner.Runner.expert_hidden`)
    all_tokens  every token feeds every expert's statistics (`--moe-calibration all`), not only the routed ones
    """

    def __init__(
        self, plan: Plan, part: int, needs: Mapping[str, set[str]], runner: Any, all_tokens: bool = False
    ) -> None:
        self.plan = plan
        self.part = part
        self.needs = needs
        self.runner = runner
        self.all_tokens = all_tokens
        self.mask: Tensor | None = None  # [batch, tokens] of the batch now running; 0 marks padding
        self._ranges: dict[tuple[str, str], MinMax | Histogram] = {}
        self._grams: dict[str, Gram] = {}
        self._layers: dict[str, _ExpertLayer] = {}

    # -- reading -------------------------------------------------------------------------------------------------

    def amax(self, site: str, spec: TensorSpec) -> Tensor:
        """The largest magnitude (float32 []) behind a static scale at a site, as the spec's observer chooses it.

        Raises DataError for a site that saw no token or a NaN.
        """
        seen = self._ranges.get((site, spec.observer.statistic))
        if seen is None:
            unseen = _UNSEEN_ATTENTION if site.rpartition(".")[0] in self.plan.attention else ""
            raise DataError("no calibration token reached this activation", where=site, hint=unseen)
        value = amax_of(seen, spec)
        if not bool(torch.isfinite(value)):
            raise DataError("NaN or inf in the calibration activations", where=site, hint=_NONFINITE)
        return value

    def gram(self, site: str, expert: int | None = None) -> tuple[Tensor | None, int]:
        """(mean x x^T, tokens) of a site, or of one expert's part of it with the layer's as prior."""
        mean, tokens = self._gram(site, expert)
        if mean is not None and not bool(torch.isfinite(mean).all()):
            raise DataError("NaN or inf in the calibration activations", where=site, hint=_NONFINITE)
        return mean, tokens

    def _gram(self, site: str, expert: int | None) -> tuple[Tensor | None, int]:
        if expert is None:
            return self._grams[site].result() if site in self._grams else (None, 0)
        layer = self._layers[self._layer_of(site)]
        own = Gram()
        for rows in self._expert_rows(layer, site, expert):
            own.add(rows)
        mean, tokens = own.result()
        return _with_prior(mean, tokens, self._pooled(layer, site))

    def expert_tokens(self) -> dict[str, dict[int, int]]:
        """Routed tokens per expert, by experts prefix."""
        return {prefix: dict(sorted(layer.tokens.items())) for prefix, layer in self._layers.items()}

    # -- collecting ----------------------------------------------------------------------------------------------

    def handlers(self) -> dict[str, dict[str, Any]]:
        """Keyword arguments for `Runner.handlers` that feed these statistics."""
        linear: dict[str, Callable[[Tensor], None]] = {}
        experts: dict[str, Any] = {}
        attention: dict[str, Any] = {}
        softmax: dict[str, Any] = {}
        for site in self.plan.sites.values():
            if site.part != self.part or site.name not in self.needs:
                continue
            tensors = (self.plan.targets[member].view.tensor for member in site.members)
            tensor = next(filter(self.runner.loads, tensors))  # see `part.check_loaded`
            if site.kind == "linear":
                linear[tensor] = self._linear_tap(site.name)
            else:
                prefix = self._layer_of(site.name)
                experts.setdefault(prefix, (tensor, _ExpertTap(self, prefix)))
        outputs = {
            target.view.tensor: self._linear_tap(target.output_site)
            for target in self.plan.quantized(self.part)
            if target.output_site is not None and target.output_site in self.needs
        }
        for module in self.plan.attention.values():
            if module.part != self.part:
                continue
            tensor = self.plan.targets[module.k_proj].view.tensor
            if any(f"{module.name}.{kind}" in self.needs for kind in "qkv"):
                attention[tensor] = self._attention_tap(module.name)
            if f"{module.name}.p" in self.needs:
                softmax[tensor] = self._softmax_tap(module.name)
        return {
            "linear": linear,
            "outputs": outputs,
            "experts": dict(experts.values()),
            "attention": attention,
            "softmax": softmax,
        }

    def _linear_tap(self, site: str) -> Callable[[Tensor], None]:
        def tap(x: Tensor) -> None:
            self._take(site, self._rows(x))

        return tap

    def _attention_tap(self, module: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        def tap(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            for kind, value in (("q", q), ("k", k), ("v", v)):
                self._see(f"{module}.{kind}", self._tokens(value))
            return q, k, v

        return tap

    def _softmax_tap(self, module: str) -> Callable[[Tensor], None]:
        def tap(p: Tensor) -> None:
            self._see(f"{module}.p", self._tokens(p))

        return tap

    def _rows(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        kept = _kept(self.mask, x.shape[:-1]) if self.mask is not None else None
        return rows if kept is None else rows[kept.to(rows.device)]

    def _tokens(self, x: Tensor) -> Tensor:
        """Values of attention [batch, heads, tokens, ...] without those of padding."""
        if self.mask is None or self.mask.shape != (x.shape[0], x.shape[2]):
            return x
        return x.movedim(2, 1)[self.mask.bool().to(x.device)]

    def _take(self, site: str, rows: Tensor) -> None:
        self._see(site, rows)
        if "gram" in self.needs.get(site, set()):
            self._grams.setdefault(site, Gram()).add(rows.clone())

    def _see(self, site: str, x: Tensor) -> None:
        """Widen the range of a site, and count its magnitudes, where that is needed."""
        if not x.numel():
            return
        for kind in STATISTICS.keys() & self.needs.get(site, set()):
            self._ranges.setdefault((site, kind), STATISTICS[kind]()).observe(x)

    # -- experts -------------------------------------------------------------------------------------------------

    def _layer_of(self, site: str) -> str:
        member = self.plan.targets[self.plan.sites[site].members[0]]
        assert member.expert is not None
        return member.expert[0]

    def _expert_site(self, prefix: str, kind: str) -> Site | None:
        for site in self.plan.sites.values():
            if site.part == self.part and site.kind == kind and self._layer_of(site.name) == prefix:
                return site
        return None

    def _expert_rows(self, layer: _ExpertLayer, site: str, expert: int) -> Iterator[Tensor]:
        down = self.plan.sites[site].kind == "experts_down"
        for hidden, routed in zip(layer.hidden, layer.routed, strict=True):
            rows = hidden if self.all_tokens else hidden[(routed == expert).any(-1)]
            if rows.shape[0]:
                yield self.runner.expert_hidden(layer.module, expert, rows) if down else rows

    def _pooled(self, layer: _ExpertLayer, site: str) -> tuple[Tensor | None, int]:
        """The layer's own moment: of all tokens for the common input, of all experts together for the inner one."""
        if site not in layer.pooled:
            if self.plan.sites[site].kind == "experts_in":
                layer.pooled[site] = self._grams[site].result()
            else:
                together = Gram()
                for expert in sorted({e for _, e in self._members(site)}):
                    for rows in self._expert_rows(layer, site, expert):
                        together.add(rows)
                layer.pooled[site] = together.result()
        return layer.pooled[site]

    def _members(self, site: str) -> list[tuple[str, int]]:
        found = [self.plan.targets[name].expert for name in self.plan.sites[site].members]
        return [expert for expert in found if expert is not None]


def _kept(mask: Tensor, leading: torch.Size) -> Tensor | None:
    """bool [values]: no padding, for activations [*leading, features] whose axes hold those of the mask, or all flat.

    Axes of streams may stand before or behind. None when no axes are the mask's: nothing can be told apart.
    """
    for axis in range(len(leading) - 1):
        if leading[axis : axis + 2] == mask.shape:
            behind = (1,) * (len(leading) - axis - 2)
            return mask.bool().reshape(*mask.shape, *behind).expand(leading).reshape(-1)
    return mask.bool().reshape(-1) if leading.numel() == mask.numel() else None


class _ExpertTap:
    """Feeds one layer's experts into the statistics (the protocol of `model.experts.ExpertHandler`)."""

    def __init__(self, statistics: Statistics, prefix: str) -> None:
        self.statistics = statistics
        self.prefix = prefix
        self.layer = statistics._layers.setdefault(prefix, _ExpertLayer())
        self.site_in = statistics._expert_site(prefix, "experts_in")
        self.site_down = statistics._expert_site(prefix, "experts_down")
        self.kept: Tensor | None = None  # which tokens of this call are no padding; None: all
        self.routed: Tensor | None = None  # [tokens, k] of this call
        sites = [site for site in (self.site_in, self.site_down) if site]
        self.gram = any("gram" in statistics.needs.get(site.name, set()) for site in sites)
        for _, expert in statistics._members((self.site_in or self.site_down).name):  # type: ignore[union-attr]
            self.layer.tokens.setdefault(expert, 0)

    def observe(self, module: Any, hidden: Tensor, top_k_index: Tensor) -> None:
        rows, routed = hidden, top_k_index
        mask = self.statistics.mask
        self.routed = top_k_index
        self.kept = _kept(mask, hidden.shape[:-1]) if mask is not None else None
        if self.kept is not None:
            self.kept = self.kept.to(hidden.device)
            rows, routed = hidden[self.kept], top_k_index[self.kept]
        self.layer.module = module
        for expert, count in zip(*torch.unique(routed, return_counts=True), strict=True):
            self.layer.tokens[int(expert)] = self.layer.tokens.get(int(expert), 0) + int(count)
        if self.site_in:
            self.statistics._take(self.site_in.name, rows)
        if self.gram:
            self.layer.hidden.append(rows.clone())
            self.layer.routed.append(routed.clone())
        if self.site_down and self.statistics.all_tokens and self._wants_range():
            for expert in self.layer.tokens:
                inside = self.statistics.runner.expert_hidden(module, expert, rows)
                self.statistics._see(self.site_down.name, inside)

    def _wants_range(self) -> bool:
        return self.site_down is not None and bool(
            STATISTICS.keys() & self.statistics.needs.get(self.site_down.name, set())
        )

    def gate_up_input(self, expert: int, x: Tensor) -> Tensor:
        return x

    def down_input(self, expert: int, h: Tensor) -> Tensor:
        # With every token for every expert, `observe` has already seen these.
        if self.site_down and not self.statistics.all_tokens:
            self.statistics._see(self.site_down.name, self._unpadded(expert, h))
        return h

    def _unpadded(self, expert: int, h: Tensor) -> Tensor:
        """The rows of `h` that are no padding; they come by choice, then by token."""
        if self.kept is None or self.routed is None:
            return h
        tokens = self.routed.T.eq(expert).nonzero()[:, 1]
        return h[self.kept[tokens]]


def _with_prior(mean: Tensor | None, tokens: int, pooled: tuple[Tensor | None, int]) -> tuple[Tensor | None, int]:
    """Blend an expert's moment with its layer's when it saw fewer than two tokens per feature.

    The layer counts as one token per feature; an expert that saw nothing gets the layer's moment alone.
    """
    prior, _ = pooled
    if prior is None or (mean is not None and tokens >= 2 * mean.shape[0]):
        return mean, tokens
    if mean is None:
        return prior, 0
    weight = prior.shape[0]
    return (mean * tokens + prior * weight) / (tokens + weight), tokens


def site_parts(plan: Plan) -> dict[str, int]:
    """Part index by site name, those of outputs and attention included."""
    parts = {site.name: site.part for site in plan.sites.values()}
    parts.update({target.output_site: target.part for target in plan.quantized() if target.output_site is not None})
    for module in plan.attention.values():
        parts.update({f"{module.name}.{kind}": module.part for kind in module.slots})
    return parts
