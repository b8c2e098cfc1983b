"""Refinement: the loss of every row falls or stays, scales stay legal, and a single step is the one a formula gives."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quarkcli.numerics import refine as refine_module
from quarkcli.numerics.quantize import QParams, decode, decode_grid, encode, make_qparams
from quarkcli.numerics.refine import Columns, Rows, refine
from quarkcli.numerics.scales import decode_scale
from quarkcli.numerics.settle import Aim, Choices, Objective
from quarkcli.numerics.solve import codes_of, factorize, solve_values
from quarkcli.numerics.task import Task
from quarkcli.spec import PerChannel, PerGroup, PerTile, ScaleSpec, TensorSpec
from tests.numerics.columns import settle

N, R = 128, 24
SPECS = {
    "int4": TensorSpec("int4", PerGroup(32), ScaleSpec("bf16", "half_range")),
    "int3": TensorSpec("int3", PerGroup(64), ScaleSpec("f16", "half_range")),
    "uint4": TensorSpec("uint4", PerGroup(32), ScaleSpec("bf16"), zero_point="int"),
    "int4_row": TensorSpec("int4", PerChannel(0), ScaleSpec("f32", "half_range")),
    "nvfp4": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=ScaleSpec("f32"))),
    "amdfp4": TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e5m3")),
    "mxfp4": TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even")),
    "tile": TensorSpec("int4", PerTile(8, 32), ScaleSpec("f32", "half_range")),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def problem() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(500, 20, generator=g) @ torch.randn(20, N, generator=g) + 0.4 * torch.randn(500, N, generator=g)
    return torch.randn(R, N, generator=g) * 0.1, x.T @ x / 500


def loss(weight: Tensor, quantized: Tensor, gram: Tensor) -> Tensor:
    error = (quantized - weight).double()
    return ((error @ gram.double()) * error).sum(1)


def started(spec: TensorSpec) -> tuple[Rows, Tensor, QParams]:
    weight, gram = problem()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(N)
    params = make_qparams(weight, spec)
    task = Task([weight], [params], spec)
    rows = task.rows([(0, slice(0, R))])
    factor = factorize(gram)
    assert factor is not None
    rows.values, _ = solve_values(weight, factor, rows.grid())
    return rows, damped, params


@every_spec
def test_the_loss_of_every_row_falls_or_stays(spec: TensorSpec) -> None:
    rows, gram, params = started(spec)
    losses = [loss(rows.weight, rows.decoded(), gram)]
    for _ in range(3):
        refine(rows, spec, gram, 1)
        losses.append(loss(rows.weight, rows.decoded(), gram))
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert float(losses[-1].sum()) < 0.99 * float(losses[0].sum())
    # What is stored decodes to what was refined.
    stored = params if rows.stored is None else replace(params, scale=rows.stored)
    assert torch.equal(decode(codes_of(rows.values.clone(), rows.grid()), spec, stored), rows.decoded())


@every_spec
def test_a_column_takes_the_value_of_least_loss(spec: TensorSpec) -> None:
    """After descent no code can move by one step of its grid and lose less."""
    rows, gram, _ = started(spec)
    refine(rows, replace(spec), gram, 10)
    base = loss(rows.weight, rows.decoded(), gram)
    wide = rows.wide().expand(R, N)
    for column in (0, 17, 127):
        for step in (-0.5, 0.5, -1.0, 1.0):
            moved = rows.values.clone()
            moved[:, column] += step
            legal = codes_of(moved.clone(), rows.grid())
            again = rows.values.clone()
            values = codes_values(legal, rows)
            again[:, column] = values[:, column]
            other = loss(rows.weight, again * wide, gram)
            assert bool((other >= base * (1 - 1e-4)).all())


def codes_values(codes: Tensor, rows: Rows) -> Tensor:
    zero = rows.wide_zero()
    return decode_grid(codes, rows.element) if zero is None else codes.float() - zero


@pytest.mark.parametrize("name", ["int4", "int3", "uint4", "nvfp4", "amdfp4", "mxfp4", "int4_row"])
def test_scales_are_refitted_one_by_one(name: str) -> None:
    """Group by group in float64: the best scale for the codes, rounded to a legal one, where that loses less."""
    spec = SPECS[name]
    rows, gram, params = started(spec)
    values, real, size = rows.values.double(), rows.real.double().clone(), rows.size
    outer = 1.0 if params.global_scale is None else float(params.global_scale)
    legal = {"e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

    def nearest(scale: Tensor) -> Tensor:
        if spec.scale.dtype == "e8m0":
            low = torch.exp2(scale.log2().floor())
            return torch.where(scale / low > 1.5, 2 * low, low)
        if spec.scale.dtype == "e5m3":
            exponent = (scale / outer).log2().floor()
            return ((scale / outer) * torch.exp2(3 - exponent)).round() * torch.exp2(exponent - 3) * outer
        return (scale / outer).to(legal[spec.scale.dtype]).double() * outer

    moved = 0
    for group in range(real.shape[1]):
        wide = real.repeat_interleave(size, 1)
        z = torch.zeros_like(values)
        z[:, group * size : (group + 1) * size] = values[:, group * size : (group + 1) * size]
        error = values * wide - rows.weight.double()
        best = real[:, group] - (error @ gram.double() * z).sum(1) / (z @ gram.double() * z).sum(1)
        tried = real.clone()
        tried[:, group] = nearest(best)
        losses = [loss(rows.weight, values * r.repeat_interleave(size, 1), gram) for r in (real, tried)]
        better = losses[1] < losses[0]
        moved += int(better.sum())
        real = torch.where(better[:, None], tried, real)
    at = Columns.of(rows)
    pull = gram @ at.error
    if name == "int4_row":
        refine_module._refit_whole(at, spec, gram)
        pull = gram @ at.error
    else:
        refine_module._refit(at, spec, gram, pull, slice(0, N))
    at.put_back(rows)
    assert moved or name == "mxfp4"
    assert float((rows.real.double() - real).abs().gt(1e-6 * real).float().mean()) < 0.01
    assert torch.equal(decode_scale(rows.stored, spec.scale.dtype) * outer, rows.real)
    torch.testing.assert_close(pull.T, rows.decoded().sub_(rows.weight) @ gram, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_scales_keep_their_sign(name: str) -> None:
    """Those of groups of zeros too, whose codes a loop sends anywhere: kernels read scales as unsigned."""
    weight, gram = problem()
    weight[:, 32:64], weight[::2] = 0.0, 0.0
    rows = Task([weight], [make_qparams(weight, SPECS[name])], SPECS[name]).rows([(0, slice(0, R))])
    factor = factorize(gram)
    assert factor is not None
    rows.values, _ = solve_values(problem()[0], factor, rows.grid())
    refine(rows, SPECS[name], gram + 0.01 * torch.eye(N), 2)
    assert bool((rows.real > 0).all()) and bool((rows.stored > 0).all())


@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp4", "uint4"])
def test_settle_lowers_the_loss_below_the_loop_alone(name: str) -> None:
    spec = SPECS[name]
    weight, gram = problem()
    kept = gram.clone()
    results = {}
    for sweeps in (0, 2):
        task = Task(
            [weight[:10].bfloat16(), weight[10:].bfloat16()],
            [
                make_qparams(weight[:10].bfloat16(), spec, amax=weight.abs().max()),
                make_qparams(weight[10:].bfloat16(), spec, amax=weight.abs().max()),
            ],
            spec,
        )
        found = settle(task, gram, Choices((0.01,), (0.0,), sweeps, True, 500), lambda factor, strength: Aim(), None)
        assert found is not None and found.held_after is None
        done = torch.cat([decode(q.codes, spec, q.params) for q in found.quantized])
        results[sweeps] = float(loss(weight.bfloat16().float(), done, gram).sum())
        parts = zip(weight.bfloat16().float().split([10, R - 10]), done.split([10, R - 10]), strict=True)
        lost = sum(float(loss(w, q, gram).sum() / loss(w, torch.zeros_like(w), gram).sum()) for w, q in parts) / 2
        assert found.after == pytest.approx(lost, rel=1e-3)  # every row is in the sample
        assert found.before > found.after
    assert results[2] < results[0]
    assert torch.equal(gram, kept)


def test_nearest_is_written_and_told_as_it_was_judged() -> None:
    """Two tokens to fit to: nearest loses less on others, with the scales of the problem, which no amax gives."""
    spec = SPECS["int4"]
    g = torch.Generator().manual_seed(1)
    weight, few, val = (torch.randn(rows, N, generator=g) for rows in (R, 2, 4000))
    gram, held = few.T @ few / 2, val.T @ val / 4000
    params = make_qparams(weight, spec)
    params = replace(params, scale=0.9 * params.scale)
    choices = Choices((0.001,), (0.0,), 0, True, 2)
    found = settle(Task([weight], [params], spec), gram, choices, lambda factor, strength: Aim(), Objective(held))
    assert found is not None and found.nearest
    (made,) = found.quantized
    assert torch.equal(made.codes, encode(weight, spec, params))
    done = decode(made.codes, spec, made.params)
    for matrix, told in ((gram, found.after), (held, found.held_after)):
        lost = loss(weight, done, matrix).sum() / loss(weight, torch.zeros_like(weight), matrix).sum()
        assert told == pytest.approx(float(lost), rel=1e-3)


def test_damping_is_the_one_of_least_held_out_loss() -> None:
    """Few tokens to fit to: more damping is better on others, and is chosen; with many tokens less."""
    spec = SPECS["int4"]
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(N, N, generator=g) / N**0.5
    weight = torch.randn(R, N, generator=g) * 0.1
    val = torch.randn(4000, N, generator=g) @ mix
    held = val.T @ val / 4000
    chosen = {}
    for tokens in (40, 20000):
        x = torch.randn(tokens, N, generator=g) @ mix
        gram = x.T @ x / tokens
        task = Task([weight], [make_qparams(weight, spec)], spec)

        objective = Objective(held)
        losses = {}
        for damp in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
            alone = settle(task, gram, Choices((damp,), (0.0,), 0, True, tokens), lambda f, s: Aim(), objective)
            losses[damp] = alone.held_after
        found = settle(task, gram, Choices(tuple(losses), (0.0,), 0, True, tokens), lambda f, s: Aim(), objective)
        chosen[tokens] = found.damp
        assert found.held_after <= losses[0.01]
        assert found.held_after <= 1.02 * min(losses.values())
    assert chosen[40] > chosen[20000]
