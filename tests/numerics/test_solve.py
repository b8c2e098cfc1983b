"""The GPTQ loop: identities that hold for any correct implementation, for integer and float formats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quarkcli.errors import DataError
from quarkcli.numerics import solve as solve_module
from quarkcli.numerics.quantize import decode, encode, grid, make_qparams
from quarkcli.numerics.solve import Factor, dead_inputs, factorize
from quarkcli.spec import PerChannel, PerGroup, PerTensor, PerTile, ScaleSpec, TensorSpec
from tests.numerics.columns import Solved, solve

SPECS = {
    "int4": TensorSpec("int4", PerGroup(32), ScaleSpec("bf16", "half_range")),
    "nvfp4": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=ScaleSpec("f32"))),
    "mxfp4": TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even")),
    "fp8": TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32")),
    "int8": TensorSpec("int8", PerChannel(0), ScaleSpec("f32", "half_range")),
    "tile": TensorSpec("int4", PerTile(16, 80), ScaleSpec("f32", "half_range")),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
N, R = 192, 40


def problem(seed: int = 0, cols: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [R, cols] and the second moment of correlated inputs with outlier channels."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, cols, generator=g)
    x = torch.randn(4 * cols, 24, generator=g) @ mix + 0.3 * torch.randn(4 * cols, cols, generator=g)
    x *= torch.exp(0.7 * torch.randn(cols, generator=g))
    return torch.randn(R, cols, generator=g) * 0.05, x.T @ x / len(x)


def run(
    weight: torch.Tensor, gram: torch.Tensor, spec: TensorSpec, columns: int = 128, act_order: bool = True
) -> tuple[Solved, torch.Tensor, Factor]:
    """Codes, the dequantized weight, the factor."""
    factor = factorize(gram, act_order=act_order)
    assert factor is not None
    params = make_qparams(weight, spec)
    solved = solve(weight, factor, grid(params, spec, weight.shape), columns=columns)
    return solved, decode(solved.codes, spec, params), factor


def rtn(weight: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return encode(weight, spec, make_qparams(weight, spec))


def error(weight: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) in float64."""
    d = (weight - rounded).double()
    return float((d @ gram.double() * d).sum())


def same_codes(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of equal codes."""
    return float((a.view(torch.uint8) == b.view(torch.uint8)).float().mean())


def test_factor_is_that_of_the_damped_moment() -> None:
    _, gram = problem()
    factor = factorize(gram)
    assert factor is not None
    assert factor.order is not None
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(N, dtype=torch.float64)
    ordered = damped[factor.order][:, factor.order]
    upper = factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.allclose(upper @ upper.T, ordered, rtol=1e-5, atol=1e-6 * float(ordered.abs().max()))
    assert torch.equal(factor.order, torch.argsort(gram.diagonal(), descending=True, stable=True))


@every_spec
@pytest.mark.parametrize("act_order", [True, False])
def test_identity_gram_is_rounding_to_nearest(spec: TensorSpec, act_order: bool) -> None:
    weight, _ = problem()
    solved, _, _ = run(weight, torch.eye(N), spec, act_order=act_order)
    assert torch.equal(solved.codes.view(torch.uint8), rtn(weight, spec).view(torch.uint8))


@every_spec
def test_result_does_not_depend_on_the_block_size(spec: TensorSpec) -> None:
    weight, gram = problem()
    base, rounded, _ = run(weight, gram, spec, columns=128)
    for columns in (1, 8, 50, 192):
        other, again, _ = run(weight, gram, spec, columns=columns)
        assert same_codes(base.codes, other.codes) > 0.99  # a tie that falls the other way moves later columns
        assert error(weight, again, gram) == pytest.approx(error(weight, rounded, gram), rel=0.02)
        assert other.loss == pytest.approx(base.loss, rel=0.02)


@every_spec
@pytest.mark.parametrize("act_order", [True, False])
def test_loss_is_the_damped_objective(spec: TensorSpec, act_order: bool) -> None:
    weight, gram = problem()
    solved, rounded, factor = run(weight, gram, spec, act_order=act_order)
    damped = gram.double() + factor.damp * gram.diagonal().double().mean() * torch.eye(N, dtype=torch.float64)
    assert solved.loss == pytest.approx(error(weight, rounded, damped), rel=1e-5)


@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp4"])
def test_error_is_at_most_half_of_rounding_to_nearest(name: str) -> None:
    weight, gram = problem()
    spec = SPECS[name]
    _, rounded, _ = run(weight, gram, spec)
    nearest = decode(rtn(weight, spec), spec, make_qparams(weight, spec))
    assert error(weight, rounded, gram) < 0.5 * error(weight, nearest, gram)


@every_spec
def test_reordering_leaves_the_stored_groups_alone(spec: TensorSpec) -> None:
    """With scales fixed beforehand the codes fit the scales of rounding to nearest: values stay near the weight."""
    weight, gram = problem()
    _, rounded, factor = run(weight, gram, spec, act_order=True)
    assert factor.order is not None
    assert not torch.equal(factor.order, torch.arange(N))
    assert float((rounded - weight).norm() / weight.norm()) < 0.5


def test_permuted_inputs_give_permuted_codes() -> None:
    """Needs one scale per row, so that no group changes its members."""
    weight, gram = problem()
    spec = SPECS["int8"]
    mixed = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    base, _, _ = run(weight, gram, spec)
    other, _, _ = run(weight[:, mixed], gram[mixed][:, mixed], spec)
    assert same_codes(other.codes, base.codes[:, mixed]) > 0.99


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
@pytest.mark.parametrize("act_order", [True, False])
def test_dead_columns(name: str, act_order: bool) -> None:
    spec = SPECS[name]
    weight, gram = problem()
    dead = torch.zeros(N, dtype=torch.bool)
    dead[[3, 40, 41, 190]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    solved, rounded, factor = run(weight, gram, spec, act_order=act_order)
    assert torch.equal(factor.dead, dead)
    assert bool(rounded.isfinite().all())
    # Nothing is known of them: their weights are the nearest values of their groups' grids.
    assert same_codes(solved.codes[:, dead], rtn(weight, spec)[:, dead]) == 1.0
    # The same problem without these columns, with the scales of the whole weight per column.
    at = grid(make_qparams(weight, spec), spec, weight.shape)
    per_column = at.scale.repeat_interleave(spec.group_size or N, 1)[:, ~dead]
    small = factorize(gram[~dead][:, ~dead], act_order=act_order)
    assert small is not None
    alone = solve(weight[:, ~dead].contiguous(), small, replace(at, scale=per_column, size=1))
    assert same_codes(solved.codes[:, ~dead], alone.codes) > 0.99
    assert solved.loss == pytest.approx(alone.loss, rel=0.01)


@every_spec
def test_all_inputs_dead(spec: TensorSpec) -> None:
    weight, _ = problem()
    solved, _, _ = run(weight, torch.zeros(N, N), spec)
    assert same_codes(solved.codes, rtn(weight, spec)) == 1.0
    assert solved.loss == 0


@pytest.mark.parametrize("tiny", [0.0, 1e-44, 1e-20])
def test_what_float32_cannot_tell_from_zero_is_dead(tiny: float) -> None:
    _, gram = problem()
    gram[5] *= tiny**0.5
    gram[:, 5] *= tiny**0.5
    assert dead_inputs(gram).nonzero().tolist() == [[5]]
    assert dead_inputs(gram * 1e-30).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("share", [1e-10, 1e-8, 1e-6])
def test_nearly_dead_inputs_keep_their_weights(share: float) -> None:
    """Tiny energy, fully correlated with the others: errors are not made up for in weights that cost nothing."""
    spec = SPECS["int4"]
    weight, gram = problem()
    gram[7] *= share**0.5
    gram[:, 7] *= share**0.5
    assert not bool(dead_inputs(gram).any())
    _, rounded, _ = run(weight, gram, spec)
    step = make_qparams(weight, spec).scale.float()[:, 0]
    assert bool(((rounded - weight)[:, 7].abs() <= 1.5 * step).all())


@every_spec
def test_codes_and_scales_dequantize_to_what_the_solver_compensated(
    spec: TensorSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid values times the scale, as used inside the loop, are the decoded weight bit for bit."""
    weight, gram = problem()
    seen: list[torch.Tensor] = []
    original = solve_module._solve_block

    def spy(targets, current, couplings, at, feeds):
        values, differences = original(targets, current, couplings, at, feeds)
        seen.append(values * at.scale)
        return values, differences

    monkeypatch.setattr(solve_module, "_solve_block", spy)
    _, rounded, factor = run(weight, gram, spec)
    assert factor.order is not None
    assert torch.equal(torch.cat(seen)[:, 0].t(), rounded[:, factor.order])


def test_rows_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several linears with the same input can be solved at once; chunks of rows change nothing."""
    spec = SPECS["nvfp4"]
    weight, gram = problem()
    whole, _, factor = run(weight, gram, spec)
    at = grid(make_qparams(weight, spec), spec, weight.shape)
    halves = [solve(weight[a:b], factor, replace(at, scale=at.scale[a:b])) for a, b in ((0, 15), (15, R))]
    assert same_codes(whole.codes, torch.cat([half.codes for half in halves])) > 0.99
    assert whole.loss == pytest.approx(sum(half.loss for half in halves), rel=0.01)
    monkeypatch.setattr(solve_module, "cpu_rows", lambda width: 16)
    parts, _, _ = run(weight, gram, spec)
    assert same_codes(whole.codes, parts.codes) > 0.99


def test_the_scale_of_the_gram_does_not_matter() -> None:
    weight, gram = problem()
    base, _, _ = run(weight, gram, SPECS["int4"])
    other, _, _ = run(weight, gram * 128, SPECS["int4"])
    assert torch.equal(base.codes, other.codes)


def test_the_weight_and_the_gram_are_left_alone() -> None:
    weight, gram = problem()
    before = weight.clone(), gram.clone()
    run(weight, gram, SPECS["int4"])
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_a_singular_gram_is_damped() -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    factor = factorize(x.T @ x)
    assert factor is not None
    assert factor.attempts == 1
    assert factor.damp == 0.01


def test_damping_grows_until_the_factorization_succeeds() -> None:
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 1.05  # one eigenvalue is -0.05
    factor = factorize(gram, damp=0.01)
    assert factor is not None
    assert factor.damp == pytest.approx(0.1)
    assert factor.attempts == 2
    gram[0, 1] = gram[1, 0] = 1e9
    assert factorize(gram, damp=0.01) is None


def test_float64_rescues_what_float32_cannot_factor() -> None:
    """1 + 1e-9 is 1 in float32, so a matrix of ones stays singular there."""
    factor = factorize(torch.ones(8, 8), damp=1e-9)
    assert factor is not None
    assert factor.attempts == 1
    assert factor.damp == 1e-9
    assert bool(factor.upper.isfinite().all())


def test_equal_diagonals_keep_their_order() -> None:
    gram = torch.eye(200)
    factor = factorize(gram)
    assert factor is not None
    assert factor.order is not None
    assert torch.equal(factor.order, torch.arange(200))


def test_a_non_finite_gram_is_refused() -> None:
    gram = torch.eye(4)
    gram[2, 1] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        factorize(gram)


def test_group_order_keeps_groups_together() -> None:
    _, gram = problem()
    factor = factorize(gram, act_order="group", group=32)
    assert factor is not None
    groups = factor.order.view(-1, 32)
    diagonal = gram.diagonal()
    assert bool((groups // 32 == groups[:, :1] // 32).all())
    inside = diagonal[groups]
    assert bool((inside.diff(dim=1) <= 0).all())
    assert bool((inside[:, 0].diff() <= 0).all())


@pytest.mark.parametrize("columns", [1, 32, 192])
def test_what_columns_feed_forward_is_their_value_before_rounding(columns: int) -> None:
    """Column by column in float64, for several sizes of the lazy block."""
    weight, gram = problem()
    spec = SPECS["int8"]
    factor = factorize(gram)
    assert factor is not None
    feed = 0.02 * torch.randn(N, N, generator=torch.Generator().manual_seed(9)).triu(1)
    at = grid(make_qparams(weight, spec), spec, weight.shape)
    rows = feed @ factor.upper  # the loop takes F, of which P = F V^-1
    solved = solve(weight, factor, at, columns=columns, feed=lambda part: rows[part, part.start :])
    left = weight.double()[:, factor.order]
    upper = torch.linalg.inv(factor.upper.double())  # the loop of the papers
    codes = torch.empty(R, N)
    for i in range(N):
        before = left[:, i].clone()
        code = (before / at.scale[:, 0]).round().clamp(-128, 127)
        codes[:, factor.order[i]] = code.float()
        error = (before - code * at.scale[:, 0]) / upper[i, i]
        left[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
        left[:, i + 1 :] += before[:, None] * feed[i, i + 1 :].double()
    assert float((solved.codes == codes).float().mean()) > 0.99
