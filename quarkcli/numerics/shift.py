"""Computes the targets of GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695): W s = Q x rather than W x = Q x.

x is the activation that the quantized blocks below hand on, s the same token's in the source model. With H = E[x x^T]
and D = E[(s - x) x^T], the float weights that come nearest to W s are W + W D (H + lam I)^-1. Neither D nor what it is
divided by H is ever formed: both moments are at hand, rows of weights are few, and a wide matrix more costs memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quarkcli.numerics.products import add_product_
from quarkcli.numerics.solve import Factor

ROWS = 256  # rows of each weight that a distance is measured on
PANEL = 256  # rows or columns of D that are formed at once


@dataclass(frozen=True)
class Drift:
    """D = E[(s - x) x^T], float32 [N, N], of which panels are formed.

    gram   E[x x^T]
    cross  E[x s^T], over the same tokens
    dead   inputs that nothing is known of, bool [N]: nothing is to be made up for by them, and nothing for them
    """

    gram: Tensor
    cross: Tensor
    dead: Tensor

    def rows(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns D[rows][:, columns]; both int64."""
        found = self.cross.T.index_select(0, rows).index_select(1, columns)
        found -= self.gram.index_select(0, rows).index_select(1, columns)
        found[self.dead[rows]] = 0.0
        found[:, self.dead[columns]] = 0.0
        return found

    def under(self, weight: Tensor) -> Tensor:
        """Returns weight [R, N] times D."""
        made = torch.empty_like(weight)
        for start in range(0, len(self.gram), PANEL):
            part = slice(start, start + PANEL)
            columns = self.cross[part] - self.gram[part]
            columns[:, self.dead] = 0.0
            columns[self.dead[part]] = 0.0
            add_product_(made[:, part], weight.T, columns.T, torch.float32, fresh=True)
        return made


def least_squares(weight: Tensor, drift: Drift, factor: Factor) -> Tensor:
    """Returns weight D (H + lam I)^-1 [R, N], in the given order of columns.

    The same ridge stands in both moments: (C + lam I)(H + lam I)^-1 - I, so that no deviation means no shift.
    """
    away = drift.under(weight)
    if factor.order is None:
        return _divide(away, factor.upper)
    away[:, factor.order] = _divide(away[:, factor.order], factor.upper)
    return away


def feeds(drift: Drift, factor: Factor, part: slice) -> Tensor:
    """Returns rows of GPTAQ's F [B, N - part.start], strictly upper, in the factor's order, from its diagonal on.

    Row i of F V^-1 is D[i, R] (H + lam I)[R, R]^-1 with R all columns behind i: what column i, as it is before it is
    rounded, adds to them.
    """
    order = _order(factor)
    behind = slice(part.start, None)
    away = drift.rows(order[part], order[behind])
    return _divide_by_transposed(away, factor.upper[behind, behind]).triu_(1)


def _order(factor: Factor) -> Tensor:
    if factor.order is not None:
        return factor.order
    return torch.arange(len(factor.upper), device=factor.upper.device)


def _divide(rows: Tensor, upper: Tensor) -> Tensor:
    """Returns rows (V V^T)^-1; overwrites them."""
    _divide_by_transposed(rows, upper)
    for start in range(0, len(upper), PANEL):
        own = slice(start, start + PANEL)
        add_product_(rows[:, own], rows[:, :start].T, upper[:start, own], torch.float32, -1)
        rows[:, own] = torch.linalg.solve_triangular(upper[own, own], rows[:, own], upper=True, left=False)
    return rows


def _divide_by_transposed(rows: Tensor, upper: Tensor) -> Tensor:
    """Returns rows V^-T; overwrites them. In panels, since torch would copy a V that is a part of another."""
    for start in reversed(range(0, len(upper), PANEL)):
        own, behind = slice(start, start + PANEL), slice(start + PANEL, None)
        add_product_(rows[:, own], rows[:, behind].T, upper[own, behind].T, torch.float32, -1)
        rows[:, own] = torch.linalg.solve_triangular(upper[own, own].T, rows[:, own], upper=False, left=False)
    return rows


def first_rule(drift: Drift, factor: Factor) -> Tensor:
    """Returns a vector [N] whose product with W is what Qronos' correction adds to the column rounded first.

    That column is rounded for the best output while all others are still the source's.
    """
    first = int(_order(factor)[0])
    away = (drift.cross[first] - drift.gram[first]).masked_fill_(drift.dead, 0.0)
    return away / (drift.gram[first, first] + factor.ridge)


def corrected(source: Tensor, rule: Tensor, factor: Factor) -> Tensor:
    """Returns what Qronos' correction rounds the first column of `source` [R, N] from, float32 [R].

    rule   see `first_rule`
    """
    return torch.addmv(source[:, int(_order(factor)[0])], source, rule)


def distance(weights: Sequence[Tensor], drift: Drift, factor: Factor) -> float:
    """Returns |W D (H + lam I)^-1| / |W| (Frobenius) over some rows of all weights."""
    rows = torch.cat([weight[:: max(1, len(weight) // ROWS)].float() for weight in weights])
    norm = float(rows.norm())
    return float(least_squares(rows, drift, factor).norm()) / norm if norm > 0 else 0.0
