"""GPTAQ and Qronos against float64 formulas that are written column by column, as the papers have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from quarkcli.numerics.grid import Grid
from quarkcli.numerics.shift import Drift, corrected, distance, feeds, first_rule, least_squares
from quarkcli.numerics.solve import Factor, factorize, solve_values
from quarkcli.spec import ELEMENTS

INT3 = ELEMENTS["int3"]
N, R, DAMP = 32, 12, 0.01
Quantizer = Callable[[Tensor, int], Tensor]


class Case(NamedTuple):
    """Weights [R, N], H = E[x x^T] and E[x s^T] of two streams, float64, and one scale per row."""

    weight: Tensor
    gram: Tensor
    cross: Tensor
    scale: Tensor

    @property
    def drift(self) -> Drift:
        return Drift(self.gram, self.cross, torch.zeros(len(self.gram), dtype=torch.bool))

    @property
    def drift32(self) -> Drift:
        return Drift(self.gram.float(), self.cross.float(), torch.zeros(len(self.gram), dtype=torch.bool))

    @property
    def grid(self) -> Grid:
        return Grid(INT3, self.scale.float(), self.weight.shape[1])

    def rounded(self, column: Tensor, _: int = 0) -> Tensor:
        return (column / self.scale[:, 0]).round().clamp(-4, 3) * self.scale[:, 0]

    def lost(self, quantized: Tensor) -> float:
        """||W s - Q x||^2, less what no choice changes."""
        quantized = quantized.double()
        return float((quantized @ self.gram * quantized).sum() - 2 * (self.weight @ self.cross.T * quantized).sum())


def case(seed: int = 0, mismatch: float = 0.5, cols: int = N, rows: int = R) -> Case:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, cols, generator=g, dtype=torch.float64)
    s = torch.randn(8 * cols, 8, generator=g, dtype=torch.float64) @ mix
    s += 0.3 * torch.randn(s.shape, generator=g, dtype=torch.float64)
    blur = torch.eye(cols, dtype=torch.float64) + mismatch / cols * torch.randn(cols, cols, generator=g).double()
    x = s @ blur + 0.3 * mismatch * torch.randn(s.shape, generator=g, dtype=torch.float64)
    # Exact in float32, so that both precisions solve the same problem.
    weight = (torch.randn(rows, cols, generator=g) * 0.05).double()
    scale = (weight.abs().amax(1, keepdim=True) / 3).float().double()
    gram, cross = ((x.T @ y / len(x)).float().double() for y in (x, s))
    return Case(weight, (gram + gram.T) / 2, cross, scale)


def factor64(gram: Tensor, act_order: bool) -> Factor:
    """The factor, in float64."""
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else None
    ridge = DAMP * float(gram.diagonal().mean())
    damped = (gram if order is None else gram[order][:, order]) + ridge * torch.eye(len(gram), dtype=torch.float64)
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return Factor(upper, order, torch.zeros(len(gram), dtype=torch.bool), DAMP, 1, ridge)


def loop64(
    start: Tensor, factor: Factor, quantizer: Quantizer, feed: Tensor | None = None, first: Tensor | None = None
) -> Tensor:
    """The papers' column loop without blocks, float64, in the given order of columns."""
    upper = torch.linalg.inv(factor.upper)
    order = factor.order if factor.order is not None else torch.arange(start.shape[1])
    left, out = start[:, order].clone(), torch.empty_like(start)
    for i, column in enumerate(order.tolist()):
        before = left[:, i].clone()
        out[:, column] = quantizer(before if i or first is None else first, column)
        error = (before - out[:, column]) / upper[i, i]
        left[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
        if feed is not None:
            left[:, i + 1 :] += before[:, None] * feed[i, i + 1 :]
    return out


def ordered(problem: Case, factor: Factor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, C + lam I [source, served], H + lam I, all in the factor's order, and the order."""
    order = factor.order if factor.order is not None else torch.arange(len(problem.gram))
    ridge = factor.ridge * torch.eye(len(order), dtype=torch.float64)
    both = problem.cross.T[order][:, order] + ridge, problem.gram[order][:, order] + ridge
    return problem.weight[:, order], *both, order


def qronos64(problem: Case, factor: Factor, quantizer: Quantizer) -> Tensor:
    """Correction and diffusion, by turns, for every column."""
    weight, cross, gram, order = ordered(problem, factor)
    total, left, done = weight @ cross, weight.clone(), torch.zeros_like(weight)
    for t in range(len(order)):
        best = (total[:, t] - done[:, :t] @ gram[:t, t] - left[:, t + 1 :] @ gram[t + 1 :, t]) / gram[t, t]
        done[:, t] = quantizer(best, int(order[t]))
        if t + 1 < len(order):
            rest = total[:, t + 1 :] - done[:, : t + 1] @ gram[: t + 1, t + 1 :]
            left[:, t + 1 :] = torch.linalg.solve(gram[t + 1 :, t + 1 :], rest, left=False)
    return torch.empty_like(done).index_copy_(1, order, done)


@pytest.mark.parametrize("act_order", [True, False])
def test_qronos_fast_is_textbook(act_order: bool) -> None:
    problem = case()
    factor = factor64(problem.gram, act_order)
    target = problem.weight + least_squares(problem.weight, problem.drift, factor)
    rule = first_rule(problem.drift, factor)
    fine = lambda column, _: (column / 1e-3).round() * 1e-3  # noqa: E731
    for quantizer in (problem.rounded, fine):  # on the fine grid nothing clips, and every column counts
        fast = loop64(target, factor, quantizer, first=corrected(problem.weight, rule, factor))
        torch.testing.assert_close(fast, qronos64(problem, factor, quantizer), rtol=0, atol=1e-9)


@pytest.mark.parametrize("act_order", [True, False])
def test_qronos_in_float32_has_the_textbooks_codes(act_order: bool) -> None:
    problem = case()
    factor = factorize(problem.gram.float(), damp=DAMP, act_order=act_order)
    assert factor is not None
    drift, weight = problem.drift32, problem.weight.float()
    start = weight + least_squares(weight, drift, factor)
    first = corrected(weight, first_rule(drift, factor), factor)
    values, _ = solve_values(start, factor, problem.grid, first=first)
    wanted = qronos64(problem, factor64(problem.gram, act_order), problem.rounded)
    assert torch.equal(values.double(), (wanted / problem.scale).round())


def _handed_on(drift: Drift, factor: Factor) -> Tensor:
    """P, what one unit of a column as it was before it was rounded adds to the others: F V^-1."""
    fed = feeds(drift, factor, slice(0, len(drift.gram)))
    return torch.linalg.solve_triangular(factor.upper, fed, upper=True, left=False)


@pytest.mark.parametrize("act_order", [True, False])
def test_gptaq_hands_on_what_each_input_lost(act_order: bool) -> None:
    """P is solved row by row here: D[i, F] Hd[F, F]^-1."""
    problem = case()
    factor = factor64(problem.gram, act_order)
    _, cross, gram, _ = ordered(problem, factor)
    wanted = torch.zeros(N, N, dtype=torch.float64)
    for i in range(N - 1):
        behind = slice(i + 1, N)
        wanted[i, behind] = torch.linalg.solve(gram[behind, behind], (cross - gram)[i, behind])
    torch.testing.assert_close(_handed_on(problem.drift, factor), wanted, rtol=0, atol=1e-9)
    rows = feeds(problem.drift, factor, slice(8, 20))
    assert torch.equal(rows, feeds(problem.drift, factor, slice(8, 20)).triu(1))
    whole = feeds(problem.drift, factor, slice(0, N))
    torch.testing.assert_close(rows, whole[8:20, 8:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 8, 50, 128])
def test_gptaq_does_not_depend_on_the_block_size(columns: int) -> None:
    """What is handed on is the column before it is rounded, in every block."""
    problem = case(cols=128)
    factor = factorize(problem.gram.float(), damp=DAMP)
    assert factor is not None
    values, _ = solve_values(
        problem.weight.float(), factor, problem.grid, columns=columns,
        feed=lambda part: feeds(problem.drift32, factor, part),
    )  # fmt: skip
    exact = factor64(problem.gram, True)
    wanted = loop64(problem.weight, exact, problem.rounded, _handed_on(problem.drift, exact)) / problem.scale
    assert float((values.double() == wanted.round()).double().mean()) > 0.99  # but for ties


def test_equal_streams_are_gptq() -> None:
    problem = case(mismatch=0.0)
    problem = problem._replace(cross=problem.gram)
    factor = factorize(problem.gram.float(), damp=DAMP)
    assert factor is not None
    drift, weight = problem.drift32, problem.weight.float()
    assert not bool(drift.under(weight).any())
    plain, _ = solve_values(weight, factor, problem.grid)
    rule = first_rule(drift, factor)
    target = weight + least_squares(weight, drift, factor)
    corrected_first = solve_values(target, factor, problem.grid, first=corrected(weight, rule, factor))
    assert torch.equal(corrected_first[0], plain)
    assert torch.equal(
        solve_values(weight, factor, problem.grid, feed=lambda part: feeds(drift, factor, part))[0], plain
    )


@pytest.mark.parametrize("seed", range(3))
def test_each_comes_nearer_to_the_source(seed: int) -> None:
    problem = case(seed, mismatch=1.0, cols=96, rows=40)
    factor = factor64(problem.gram, True)
    feed = _handed_on(problem.drift, factor)
    target = problem.weight + least_squares(problem.weight, problem.drift, factor)
    first = corrected(problem.weight, first_rule(problem.drift, factor), factor)
    nearest = torch.stack([problem.rounded(column) for column in problem.weight.T], 1)
    gptq = loop64(problem.weight, factor, problem.rounded)
    gptaq = loop64(problem.weight, factor, problem.rounded, feed)
    qronos = loop64(target, factor, problem.rounded, first=first)
    losses = [problem.lost(each) for each in (qronos, gptaq, gptq, nearest)]
    assert losses == sorted(losses) and losses[0] < losses[3]


def test_without_rounding_the_shift_is_the_best_there_is() -> None:
    problem = case(mismatch=1.0)
    factor = factor64(problem.gram, True)
    target = problem.weight + least_squares(problem.weight, problem.drift, factor)
    ridge = factor.ridge * torch.eye(N, dtype=torch.float64)
    wanted = torch.linalg.solve(problem.gram + ridge, problem.weight @ (problem.cross.T + ridge), left=False)
    torch.testing.assert_close(target, wanted, rtol=0, atol=1e-9)
    assert distance([problem.weight], problem.drift32, factorize(problem.gram.float(), damp=DAMP)) == pytest.approx(
        float((target - problem.weight).norm() / problem.weight.norm()), rel=1e-4
    )


def test_inputs_that_never_moved_take_no_part() -> None:
    """Nothing is made up for by a dead input, and nothing for one, whatever the source's stream has there."""
    problem = case()
    gram, cross = problem.gram.clone(), problem.cross.clone()
    gram[5], gram[:, 5] = 0.0, 0.0
    cross[5] = 0.0
    dead = torch.arange(N) == 5
    factor = factorize(gram.float(), damp=DAMP)
    assert factor is not None and factor.order is not None
    drift = Drift(gram.float(), cross.float(), dead)
    every = torch.eye(N)
    away = drift.under(every)
    assert bool((cross.T - gram)[5].any()) and not bool(away[5].any()) and not bool(away[:, 5].any())
    assert torch.equal(away, drift.rows(torch.arange(N), torch.arange(N)))
    shift, feed = least_squares(every, drift, factor), feeds(drift, factor, slice(0, N))
    place = int((factor.order == 5).nonzero())
    assert not bool(shift[5].any()) and not bool(shift[:, 5].any())
    assert not bool(feed[place].any()) and not bool(feed[:, place].any())
    assert not bool(first_rule(drift, factor)[5])
