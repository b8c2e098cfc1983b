"""Holds the statistics of activations, by site.

A site is one activation tensor; every weight that reads it shares its statistics. Second moments are summed in float32
over fixed chunks of tokens, lane by lane (see `forward.lanes`); ranges and histograms are exact in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from quarkcli.algorithms.base import Moment
from quarkcli.errors import DataError
from quarkcli.forward import taps
from quarkcli.forward.balance import Balance
from quarkcli.forward.experts import ExpertLayer
from quarkcli.forward.group import Group
from quarkcli.forward.guard import HINT, UNSEEN_ATTENTION, UNSEEN_LINEAR, Guard, finite_rows, named
from quarkcli.forward.moments import Means, Moments, chosen, finite
from quarkcli.forward.outliers import Outliers, ends_of
from quarkcli.forward.samples import MeanMagnitude, Samples, picked
from quarkcli.forward.taps import Batch, ExpertTap, SourceExpertTap
from quarkcli.model.handlers import Handlers
from quarkcli.numerics.observers import STATISTICS, Histogram, MinMax, amax_of
from quarkcli.numerics.sample import Sample
from quarkcli.plan.model import Plan, Site
from quarkcli.plan.sites import reads, site_parts
from quarkcli.spec import TensorSpec

MOMENTS = {"gram", "gram_val", "cross"}
NOTHING = Means(None, None, 0)


class Statistics:
    """Statistics of one part. `needs`: kinds by site: `STATISTICS`, `gram`, `gram_val`, `cross`, `samples`, `mean_abs`.

    `gram_val` keeps held-out tokens out of `gram` and has a moment of its own for them; `cross` is the moment of the
    served stream's activation with the source stream's. Those of experts are of the tokens that the source stream
    routes to them, so that both streams' tokens line up.
    Sites of outputs are `<module>.output`, those of attention `<module>.q`, `.k`, `.v` and `.p`.

    runner      runs one expert for its inner activation (see `model.runner.Runner.expert_hidden`)
    all_tokens  every token feeds every expert's statistics (`--moe-calibration all`), not only the routed ones
    least       with fewer tokens an expert has no statistics of its own (`--min-expert-tokens`)
    guard       says what becomes of NaN and infinity; what it skips has ranges of finite rows alone
    group       the ranks whose lanes these are of, once `joining.join` has been called
    balance     how much each token counts in second moments, but for those held out; None: all alike
    one_moment  second moments of the activation that is reached first are all that is asked for
    """

    def __init__(
        self, plan: Plan, part: int, needs: Mapping[str, set[str]], runner: Any, all_tokens: bool = False,
        least: int = 1, guard: Guard | None = None, group: Group | None = None, balance: Balance | None = None,
        one_moment: bool = False,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.part = part
        self.needs = needs
        self.runner = runner
        self.all_tokens, self.least = all_tokens, least
        self.guard = guard or Guard()
        self.group = group or Group()
        self.balance = balance
        self.one_moment = one_moment
        self.batch = Batch()  # the one now running
        self._ranges: dict[tuple[str, str], MinMax | Histogram] = {}
        self._expert_ranges: dict[tuple[str, str, int | None], MinMax | Histogram] = {}
        self._fitted: dict[str, Moments] = {}
        self._held_out: dict[str, Moments] = {}
        self.source_rows: dict[str, Tensor] = {}
        self._reads = reads(plan, part)
        self.reached: dict[str, None] = {}  # sites in the order in which the forward came to them
        self.source_experts: dict[str, tuple[Tensor, Tensor]] = {}  # by experts prefix: tokens and routing
        self.outliers: dict[str, Outliers] = {}  # of sites, for the report
        self._samples: dict[str, Samples] = {}
        self._magnitudes: dict[str, MeanMagnitude] = {}
        self.layers: dict[str, ExpertLayer] = {}
        self._factors: dict[tuple[str, int | None], Tensor] = {}
        self._blocks: dict[str, int] = {}  # activations turned since, with the size of their block Hadamard

    # -- reading -------------------------------------------------------------------------------------------------

    def amax(self, site: str, spec: TensorSpec, expert: int | None = None) -> Tensor:
        """Returns the largest magnitude (float32 []) behind a static scale at a site, chosen by the spec's observer.

        expert   of the tokens of one expert alone; the site's when it saw none

        Raises DataError for a site that saw no token, or no finite one.
        """
        kind = spec.observer.statistic
        if kind == "absmax" and (site, expert) in self._factors:
            kind = "channel_absmax"
        seen = self._own(site, kind, expert) or self._ranges.get((site, kind))
        if seen is None and (lost := self.guard.lost(site)):
            what = f"calibration gives no finite value for it: {lost}"
            raise DataError(what, where=site, hint=HINT, kind="E-NONFINITE-ACTIVATION")
        if seen is None:
            unseen = UNSEEN_ATTENTION if site.rpartition(".")[0] in self.plan.attention else UNSEEN_LINEAR
            raise DataError("no calibration token reached it", where=site, hint=unseen, kind="E-DATA-NO-TOKEN")
        value = amax_of(seen, spec)
        return self._times(value, site, expert).max() if value.dim() else value

    def channel_amax(self, site: str, expert: int | None = None) -> Tensor | None:
        """Returns the largest magnitude of every channel of a site, float32 [features]; None without a token.

        expert   of the tokens of one expert alone
        """
        if self.guard.lost(site, expert):
            return None
        kind = "channel_absmax"
        seen = self._ranges.get((site, kind)) if expert is None else self._own(site, kind, expert)
        return self._times(seen.amax, site, expert) if seen is not None else None

    def _own(self, site: str, kind: str, expert: int | None) -> MinMax | Histogram | None:
        """Returns the range of an expert's own tokens; None without enough of them."""
        found = self._expert_ranges.get((site, kind, expert))
        few = found is not None and expert is not None and self.layers[self._layer_of(site)].few(expert)
        return None if few else found

    def mean_abs(self, site: str) -> Tensor | None:
        """Returns the mean magnitude of every channel, float32 [features]; None without a token.

        Of linears' inputs and of the common input of experts.
        """
        known = site in self._magnitudes and not self.guard.lost(site)
        seen = self._magnitudes[site].result() if known else None
        return self._times(seen, site) if seen is not None else None

    def samples(self, site: str, expert: int | None = None, held: bool = False) -> Sample | None:
        """Returns sampled rows of an activation; None where there are none.

        expert   of the tokens routed to one expert: its common or its inner input
        held     of the held-out tokens, instead of the others
        """
        if self.guard.lost(site, expert):
            return None
        if expert is not None:
            found = self._expert_samples(site, expert, held)
        else:
            found = self._samples[site].sample(held) if site in self._samples else None
        if found is None:
            return None
        found = found._replace(rows=found.rows.float())
        factor = self._factors.get((site, expert))
        return found if factor is None else found.times(factor)

    def _times(self, magnitudes: Tensor, site: str, expert: int | None = None) -> Tensor:
        """Returns magnitudes of channels as they are since channels were scaled."""
        factor = self._factors.get((site, expert))
        return magnitudes if factor is None else magnitudes * factor.abs()

    def moment(self, site: str, expert: int | None = None) -> Moment | None:
        """Returns the second moment of a site, or of one expert with the layer's as prior; None without a token.

        Raises DataError where squares of activations overflow.
        """
        if self.guard.lost(site, expert):
            return None
        apart = self._apart(site)
        fitted = self._means(site, expert, apart)
        if fitted.gram is None:
            return None
        held = self._means(site, expert, True) if apart is False else NOTHING
        moment = Moment(fitted.gram, fitted.tokens, fitted.cross, held.gram, held.cross)
        if not all(map(finite, moment.means())):
            self.guard.fault(named(site, expert), "squares of the calibration activations overflow")
            return None
        factor = self._factors.get((site, expert))
        if factor is not None:
            moment = moment.scaled(factor)
        return moment.turned(self._blocks[site]) if site in self._blocks else moment

    def forget(self, site: str) -> None:
        """Forgets the second moments of a site, which nobody will ask for again."""
        self._fitted.pop(site, None)
        self._held_out.pop(site, None)

    def _means(self, site: str, expert: int | None, held: bool | None) -> Means:
        """Returns the means of a site or of one expert, over tokens that are held out or not; None: over all.

        Those of experts are shrunk towards their layer's, but for held-out tokens.
        """
        if not self._of_experts(site):
            seen = (self._held_out if held else self._fitted).get(site)
            if seen is None:
                return NOTHING
            seen.spread(self.group)
            return seen.means()
        layer, inner = self.layers.get(self._layer_of(site)), self._kind(site) == "experts_down"
        if layer is None:
            return NOTHING
        if expert is None:
            return layer.layer(inner, held)
        return layer.own(expert, inner, held) if held else layer.shrunk(expert, inner, held)

    def _of_experts(self, site: str) -> bool:
        return site in self.plan.sites and self._kind(site) != "linear"

    def follow(self, scaled: Mapping[tuple[str, int | None], Tensor], outputs: bool) -> bool:
        """Takes over factors of channels, by activation and expert. Returns whether everything asked for follows.

        Second moments, samples and what is known of every channel do; other ranges do not.
        outputs   outputs of linears, and attention's operands, were scaled too
        """
        everything = dict(scaled)
        everything |= {(s, None): f for (s, e), f in scaled.items() if e is not None and self._kind(s) == "experts_in"}
        for key, factor in everything.items():
            known = self._factors.get(key)
            self._factors[key] = factor if known is None else known * factor
        sites = {site for site, _ in scaled}
        if outputs:
            sites |= {
                site
                for site, part in site_parts(self.plan).items()
                if part == self.part and site not in self.plan.sites
            }
        return all(map(self._follows, sites))

    def _follows(self, site: str) -> bool:
        kinds = set(self.needs.get(site, ()))
        if kinds & MOMENTS and self.read(site) is not None:
            return False  # what rounding adds to an input is another for scaled channels
        if site in self.plan.sites and self._kind(site) != "experts_down" and "channel_absmax" in kinds:
            kinds -= {"absmax", "channel_absmax", "mean_abs"}
        return kinds <= MOMENTS | {"samples", "mean_abs", "outputs"}

    def read(self, site: str) -> TensorSpec | None:
        """Returns how the quantized weights read a site, None where they read it as it is or each in its own way."""
        return self._reads.get(site)

    def _kind(self, site: str) -> str:
        return self.plan.sites[site].kind

    def turn(self, blocks: Mapping[str, int], needs: Mapping[str, set[str]]) -> bool:
        """Takes over block Hadamards, by activation, as the last change. Returns whether what is needed follows.

        Second moments do, nothing else does.
        needs   kinds by site that are still asked for
        """
        self._blocks = dict(blocks)
        if any(needs.get(site, set()) & MOMENTS and self.read(site) is not None for site in blocks):
            return False
        return all(needs.get(site, set()) <= MOMENTS for site in blocks)

    def expert_tokens(self) -> dict[str, dict[int, int]]:
        """Returns the routed tokens per expert, by experts prefix."""
        return {prefix: dict(sorted(layer.tokens.items())) for prefix, layer in self.layers.items()}

    # -- collecting ----------------------------------------------------------------------------------------------

    def handlers(self) -> Handlers:
        """Returns the handlers that feed these statistics."""
        linear: dict[str, Callable[[Tensor], None]] = {}
        experts: dict[str, Any] = {}
        attention: dict[str, Any] = {}
        softmax: dict[str, Any] = {}
        for site in self.plan.sites.values():
            if site.part != self.part or site.name not in self.needs:
                continue
            tensor = self._tensor(site)
            if site.kind == "linear":
                linear |= taps.site_taps(self, site, tensor)
            else:
                prefix = self._layer_of(site.name)
                experts.setdefault(prefix, (tensor, ExpertTap(self, prefix)))
        outputs = {
            target.view.tensor: taps.linear_tap(self, target.output_site)
            for target in self.plan.quantized(self.part)
            if target.output_site is not None and target.output_site in self.needs
        }
        for module in self.plan.attention.values():
            if module.part != self.part:
                continue
            tensor = self.plan.targets[module.k_proj].view.tensor
            if any(f"{module.name}.{kind}" in self.needs for kind in "qkv"):
                attention[tensor] = taps.attention_tap(self, module.name)
            if f"{module.name}.p" in self.needs:
                softmax[tensor] = taps.softmax_tap(self, module.name)
        for tensor, tap in experts.values():
            tap.layer.tensor = tensor
        return Handlers(linear, outputs, dict(experts.values()), attention, softmax)

    def source_handlers(self) -> Handlers:
        """Returns the handlers that note what linears and experts of the source stream read, for one batch."""
        linear: dict[str, Callable[[Tensor], None]] = {}
        experts: dict[str, Any] = {}
        for site in self.plan.sites.values():
            if site.part != self.part or "cross" not in self.needs.get(site.name, set()):
                continue
            if site.kind == "linear":
                linear[self._tensor(site)] = taps.source_tap(self, site.name)
            else:
                prefix = self._layer_of(site.name)
                experts.setdefault(prefix, (self._tensor(site), SourceExpertTap(self, prefix)))
        return Handlers(linear, experts=dict(experts.values()))

    def _tensor(self, site: Site) -> str:
        """Returns a file tensor that reads a site and that the model's class loads; see `job.reach.check_loaded`."""
        tensors = (self.plan.targets[member].view.tensor for member in site.members)
        return next(filter(self.runner.loads, tensors))

    def token_weights(self, site: str) -> Tensor | None:
        """Returns how much a token of each id counts in a site's second moments; None: all count alike."""
        table = self.balance.table(site) if self.balance is not None else None
        return table if table is None else table.to(self.runner.device)

    def take(
        self, site: str, rows: Tensor, held: Tensor | None = None, source: Tensor | None = None,
        weights: Tensor | None = None, first: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Feeds rows of a site into everything that is needed there.

        held     bool [tokens], which of them are held out; None: none
        source   the same tokens' rows in the source stream
        weights  how much the tokens count; None: all alike
        first    bool [tokens], which are first tokens of calibration rows; None: nothing is known of that
        """
        self.reached.setdefault(site)
        self.see(site, rows)
        if source is not None and "cross" in self.needs.get(site, set()):
            self.check_finite(site, source, " of the original model")
        if self.guard.lost(site):
            return
        kinds, lane = self.needs.get(site, set()), self.batch.lane
        if "samples" in kinds:
            self._samples.setdefault(site, Samples()).add(rows, held, lane, first)
        if "mean_abs" in kinds:
            self._magnitudes.setdefault(site, MeanMagnitude()).add(rows, lane)
        if not MOMENTS & kinds or self._of_experts(site):  # those of experts are made from what their layer keeps
            return
        if self.one_moment and site != next(iter(self.reached)):
            return
        if "cross" not in kinds:
            source = None
        fitted = self._fitted.setdefault(site, Moments(self.read(site)))
        if "gram_val" not in kinds or held is None:
            fitted.add(rows, source, lane, weights)
            return
        apart = self._held_out.setdefault(site, Moments(self.read(site), patient=True))
        apart.add(rows[held], chosen(source, held), lane)
        fitted.add(rows[~held], chosen(source, ~held), lane, chosen(weights, ~held))

    def see(self, site: str, x: Tensor, expert: int | None = None, told: bool = True) -> None:
        """Widens the range of a site, and counts its magnitudes, where that is needed; see `check_finite`.

        expert   whose input it is, where it is one expert's alone
        told     the report is to say how its channels differ
        """
        if not x.numel():
            return
        ends = ends_of(x)  # NaN and infinity are among them, so most of what looks at x needs no pass of its own
        if not self.check_finite(named(site, expert), ends, ""):
            self.see(site, finite_rows(x), expert, told)
            return
        for kind in STATISTICS.keys() & self.needs.get(site, set()):
            seen = self._ranges.setdefault((site, kind), STATISTICS[kind]())
            seen.observe(ends if isinstance(seen, MinMax) else x)
        if told:
            self.outliers.setdefault(site, Outliers()).observe(x, ends)

    def check_finite(self, site: str, x: Tensor, whose: str) -> bool:
        """Does as `Guard.is_finite`, with the batch that has it."""
        return self.guard.is_finite(site, x, f"{whose}{self.batch.name}")

    def see_expert(self, site: str, expert: int, x: Tensor) -> None:
        """Does as `see` for the input of one expert, where it has a scale of its own; for channels always."""
        kinds = STATISTICS.keys() if self.plan.own_expert_inputs else {"channel_absmax"}
        x = finite_rows(x) if self.guard.skip else x
        if x.numel():
            for kind in kinds & self.needs.get(site, set()):
                self._expert_ranges.setdefault((site, kind, expert), STATISTICS[kind]()).observe(x)

    # -- experts -------------------------------------------------------------------------------------------------

    def _layer_of(self, site: str) -> str:
        member = self.plan.targets[self.plan.sites[site].members[0]]
        assert member.expert is not None
        return member.expert[0]

    def expert_site(self, prefix: str, kind: str) -> Site | None:
        own = (site for site in self.plan.sites.values() if site.part == self.part and site.kind == kind)
        return next((site for site in own if self._layer_of(site.name) == prefix), None)

    def _expert_samples(self, site: str, expert: int, held: bool) -> Sample | None:
        """Returns rows of one expert's input; the rows are picked before the expert runs on them."""
        layer = self.layers[self._layer_of(site)]
        rows = picked(layer.rows(expert, held), held)
        if rows is None:
            return None
        return Sample.alike(rows if self._kind(site) == "experts_in" else layer.inside(expert, rows))

    def _apart(self, site: str) -> bool | None:
        """Returns False where held-out tokens stay out of the moment that a solver fits to; None where they do not."""
        return False if "gram_val" in self.needs.get(site, set()) else None

    def members(self, site: str) -> list[tuple[str, int]]:
        found = (self.plan.targets[name].expert for name in self.plan.sites[site].members)
        return [expert for expert in found if expert is not None]
