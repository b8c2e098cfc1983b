"""Groups the weights of a part into problems: one activation, one expert, one stage, one spec each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING

from quarkcli.algorithms.base import Moment, Needs, Outcome, Problem
from quarkcli.plan.model import QuantizedTarget

if TYPE_CHECKING:
    from torch import Tensor

Group = tuple[str | None, int | None]  # activation and expert


def problems(
    targets: Iterable[QuantizedTarget],
    needs: Needs,
    moment: Callable[[str, int | None], Moment | None],
    weight: Callable[[QuantizedTarget], Tensor],
    amax: Callable[[QuantizedTarget], Tensor | None],
    warn: Callable[[str], None],
    report: Callable[[Sequence[QuantizedTarget], Outcome], None],
    stage: int = 0,
) -> Iterator[Problem]:
    """Yields the problems that `targets` make, activation by activation in plan order.

    needs    statistics that the solver asked for, by site; a moment is taken only where it did
    moment   second moment of a site, or of one expert's part of it
    """
    for (site, expert), members in _groups(targets):
        seen = moment(site, expert) if site is not None and needs.get(site) else None
        groups = _same_spec(members)
        for same in groups:
            yield Problem(
                site, expert, stage, tuple(same), tuple(map(weight, same)), tuple(map(amax, same)),
                seen if same is groups[-1] else copy(seen), warn, partial(report, same),
            )  # fmt: skip


def _groups(targets: Iterable[QuantizedTarget]) -> Iterator[tuple[Group, list[QuantizedTarget]]]:
    """Yields weights that read one activation of one expert. Those without a known activation stand alone."""
    sites: dict[str, dict[int | None, list[QuantizedTarget]]] = {}
    alone: list[QuantizedTarget] = []
    for target in targets:
        if target.site is None:
            alone.append(target)
            continue
        experts = sites.setdefault(target.site, {})
        experts.setdefault(target.expert[1] if target.expert else None, []).append(target)
    for site, experts in sites.items():
        for expert, members in experts.items():
            yield (site, expert), members
    for target in alone:
        yield (None, None), [target]


def _same_spec(members: list[QuantizedTarget]) -> list[list[QuantizedTarget]]:
    found: dict[object, list[QuantizedTarget]] = {}
    for target in members:
        found.setdefault(target.weight, []).append(target)
    return list(found.values())
