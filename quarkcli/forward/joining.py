"""Joins the statistics of several ranks, each of its own lanes, into those of all rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quarkcli.forward.moments import Moments
from quarkcli.forward.samples import MeanMagnitude
from quarkcli.forward.statistics import MOMENTS, Statistics
from quarkcli.plan.model import Target


def join(own: Statistics) -> None:
    """Puts what all ranks saw of their lanes in place of what this one saw.

    Second moments are joined when they are asked for, on all ranks at once, or by `hand_over`.
    """
    group = own.group
    for moments in (*own._fitted.values(), *own._held_out.values()):
        moments.close()
    if group.size == 1:
        return
    fields = ("_ranges", "_expert_ranges", "_samples", "outliers", "reached")
    said: dict[str, Any] = {name: getattr(own, name) for name in fields}
    said["magnitudes"] = {site: seen.sums.total() for site, seen in own._magnitudes.items()}
    said["moments"] = [list(own._fitted), list(own._held_out)]
    said["layers"] = {prefix: layer.bare() for prefix, layer in own.layers.items()}
    said["skipped"] = own.guard.skipped
    ranks = group.gather(said)
    for name in fields[:4]:
        found: dict[Any, Any] = {}
        for key, seen in (item for rank in ranks for item in rank[name].items()):
            if key in found:
                found[key].merge(seen)
            else:
                found[key] = seen
        setattr(own, name, found)
    own.reached = {site: None for rank in ranks for site in rank["reached"]}
    for site in {site: None for rank in ranks for site in rank["magnitudes"]}:
        totals = [rank["magnitudes"].get(site) for rank in ranks]
        own._magnitudes.setdefault(site, MeanMagnitude()).merge(totals, group.shares)
    for number, seen in enumerate((own._fitted, own._held_out)):
        named = {site: None for rank in ranks for site in rank["moments"][number]}
        ordered = {site: seen.get(site) or Moments(own.read(site)) for site in named}
        seen.clear()
        seen.update(ordered)
    for prefix, layer in own.layers.items():
        layer.merge([rank["layers"][prefix] for rank in ranks])
        layer.module = layer.module or own.runner.expert_module(layer.tensor)
    for site, what in (item for rank in ranks for item in rank["skipped"].items()):
        own.guard.note(site, what)


def hand_over(own: Statistics, targets: Iterable[Target], owners: Mapping[str, int]) -> None:
    """Joins the second moments of each site on the rank that solves it; the others forget them.

    Those of experts are made by whoever asks; those of a whole layer, where an expert has few tokens, by all ranks.

    targets   weights that are to be solved, and `owners`: their ranks
    """
    experts: dict[str, list[Target]] = {}
    for target in targets:
        if target.site is None or not MOMENTS & own.needs.get(target.site, set()):
            continue
        if target.expert is not None:
            experts.setdefault(target.site, []).append(target)
            continue
        for seen in (own._fitted, own._held_out):
            if target.site in seen:
                seen[target.site].collect(own.group, owners[target.name])
                if owners[target.name] != own.group.rank:
                    del seen[target.site]
    for site, members in experts.items():
        layer, apart = own.layers[own._layer_of(site)], own._apart(site)
        numbers = {target.expert[1] for target in members if target.expert is not None}
        if any(layer.wants_layer(number, members[0].shape[1], apart) for number in sorted(numbers)):
            layer.pool(own._kind(site) == "experts_down", apart, own.group)
