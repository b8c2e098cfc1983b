"""The targets of GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695): W s = Q x rather than W x = Q x.

x is the activation that the quantized blocks below hand on, s the same token's in the source model. With H = E[x x^T]
and D = E[(s - x) x^T], the float weights that come nearest to W s are W + W D (H + lam I)^-1. Every function takes D
times a strength as well: 0 aims for W itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quarkcli.numerics.solve import Factor

ROWS = 256  # rows of each weight that a distance is measured on


def deviation(gram: Tensor, cross: Tensor, dead: Tensor) -> Tensor:
    """Returns D = E[(s - x) x^T], float32 [N, N].

    gram   E[x x^T]
    cross  E[x s^T], over the same tokens
    dead   inputs that nothing is known of, bool [N]: nothing is to be made up for by them, and nothing for them
    """
    found = cross.T - gram
    found[dead] = 0.0
    found[:, dead] = 0.0
    return found


def least_squares(away: Tensor, factor: Factor) -> Tensor:
    """Returns D (H + lam I)^-1 [N, N], in the given order of columns.

    The same ridge stands in both moments: (C + lam I)(H + lam I)^-1 - I, so that no deviation means no shift.
    """
    if factor.order is None:
        return _divided(away, factor.upper)
    found = torch.empty_like(away)
    found[:, factor.order] = _divided(away[:, factor.order], factor.upper)
    return found


def feeds(away: Tensor, factor: Factor) -> Tensor:
    """Returns GPTAQ's P [N, N], strictly upper, in the factor's order.

    Row i is D[i, F] (H + lam I)[F, F]^-1 with F all columns behind i: what column i, as it is before it is rounded,
    adds to them.
    """
    if factor.order is not None:
        away = away.index_select(0, factor.order).index_select(1, factor.order)
    return _by(_by_transposed(away, factor.upper).triu_(1), factor.upper)


def _divided(rows: Tensor, upper: Tensor) -> Tensor:
    """Returns rows (V V^T)^-1."""
    return _by(_by_transposed(rows, upper), upper)


def _by(rows: Tensor, upper: Tensor) -> Tensor:
    """Returns rows V^-1."""
    return torch.linalg.solve_triangular(upper, rows, upper=True, left=False)


def _by_transposed(rows: Tensor, upper: Tensor) -> Tensor:
    """Returns rows V^-T."""
    return torch.linalg.solve_triangular(upper.T, rows, upper=False, left=False)


def first_rule(away: Tensor, gram: Tensor, factor: Factor) -> Tensor:
    """Returns a vector [N] whose product with W is what Qronos' correction adds to the column rounded first.

    That column is rounded for the best output while all others are still the source's.
    """
    first = int(factor.order[0]) if factor.order is not None else 0
    return away[:, first] / (gram[first, first] + factor.ridge)


def corrected(source: Tensor, rule: Tensor, factor: Factor) -> Tensor:
    """Returns what Qronos' correction rounds the first column of `source` [R, N] from, float32 [R].

    rule   see `first_rule`
    """
    first = int(factor.order[0]) if factor.order is not None else 0
    return torch.addmv(source[:, first], source, rule)


def distance(weights: Sequence[Tensor], shift: Tensor) -> float:
    """Returns |W @ shift| / |W| (Frobenius) over some rows of all weights."""
    rows = torch.cat([weight[:: max(1, len(weight) // ROWS)].float() for weight in weights])
    norm = float(rows.norm())
    return float((rows @ shift).norm()) / norm if norm > 0 else 0.0
