"""The search for scales, and what GPTQ does when there is nothing to solve with."""

from __future__ import annotations

import pytest
import torch

from quarkcli.algorithms.base import Moment, Problem
from quarkcli.algorithms.gptq import GPTQ, SHRINKS, column_importance, searched_qparams
from quarkcli.errors import DataError
from quarkcli.family import WeightView
from quarkcli.numerics.quantize import Quantized, dequantize, encode, make_qparams, quantize
from quarkcli.plan.model import Decision, Target
from quarkcli.recipe.attributes import native
from quarkcli.recipe.recipe import scheme_model
from quarkcli.spec import PerChannel, ScaleSpec, TensorSpec

ROWS, COLUMNS = 24, 256


def spec_of(scheme: str) -> TensorSpec:
    return native.to_spec(scheme_model(scheme).weight)


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Heavy tails, and one group of zeros."""
    made = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    made = made * (1 + made.abs())
    made[3, :128] = 0
    return made.to(dtype)


def importance() -> torch.Tensor:
    return torch.rand(COLUMNS, generator=torch.Generator().manual_seed(2)) ** 4 * 10


def errors(source: torch.Tensor, spec: TensorSpec, params: object) -> torch.Tensor:
    """Importance-weighted squared error of every group, float64."""
    codes = encode(source, spec, params)
    lost = (source.double() - dequantize(Quantized(codes, params), spec).double()) ** 2 * importance().double()
    return lost.view(ROWS, -1, spec.group_size).sum(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ["int4_wo_128", "nvfp4", "mxfp4"])
def test_no_group_gets_worse(scheme: str, dtype: torch.dtype) -> None:
    spec, source = spec_of(scheme), weight(dtype)
    plain = make_qparams(source, spec)
    found = searched_qparams(source, spec, None, importance())
    assert (found.scale.dtype, found.scale.shape) == (plain.scale.dtype, plain.scale.shape)
    before, after = errors(source, spec, plain), errors(source, spec, found)
    assert bool((after <= before * (1 + 1e-6)).all())  # chosen by sums in float32
    assert float(after.sum()) < 0.97 * float(before.sum())
    if plain.global_scale is not None:
        assert torch.equal(found.global_scale, plain.global_scale)


@pytest.mark.parametrize("scheme", ["int4_wo_128", "nvfp4", "mxfp4"])
def test_every_group_gets_the_best_factor_there_is(scheme: str) -> None:
    """Tried one by one, with every group's scale made from its own shrunk weights."""
    spec, source = spec_of(scheme), weight(torch.float32)
    amax = source.abs().max()
    tried = [errors(source, spec, make_qparams(source * shrink, spec, amax=amax)) for shrink in SHRINKS]
    found = errors(source, spec, searched_qparams(source, spec, amax, importance()))
    torch.testing.assert_close(found, torch.stack(tried).amin(0), rtol=1e-5, atol=1e-12)


def test_nothing_to_search() -> None:
    source = weight()
    for spec in (spec_of("fp8"), TensorSpec("int8", PerChannel(0), ScaleSpec("f32", "half_range"))):
        assert torch.equal(searched_qparams(source, spec, None, importance()).scale, make_qparams(source, spec).scale)
    spec = spec_of("int4_wo_128")
    assert torch.equal(searched_qparams(source, spec, None, None).scale, make_qparams(source, spec).scale)


def problem(gram: torch.Tensor | None, scheme: str) -> Problem:
    spec = spec_of(scheme)
    slots = {kind: Decision(spec if kind == "weight" else None, 0) for kind in ("weight", "input", "output", "bias")}
    target = Target("m", WeightView("m.weight"), (ROWS, COLUMNS), "BF16", "up", 0, "s", "m", None, None, slots=slots)
    moment = None if gram is None else Moment(gram, 5)
    return Problem("s", None, 0, (target,), (weight(),), (None,), moment, lambda text: None)


def solve(gram: torch.Tensor, scheme: str = "int4_wo_128", scale_search: bool = False) -> Quantized | None:
    solved = GPTQ(0.01, True, scale_search).solve(problem(gram, scheme))
    return None if solved is None else solved[0]


def rounded(scheme: str = "int4_wo_128") -> Quantized:
    return quantize(weight(), spec_of(scheme))


@pytest.mark.parametrize("scheme", ["int4_wo_128", "uint4_wo_128", "nvfp4", "mxfp4", "fp8", "int8"])
def test_a_site_that_never_moved_is_rounded(scheme: str) -> None:
    found = solve(torch.zeros(COLUMNS, COLUMNS), scheme, scale_search=True)
    assert torch.equal(found.codes.view(torch.uint8), rounded(scheme).codes.view(torch.uint8))
    assert torch.equal(found.params.scale.float(), rounded(scheme).params.scale.float())


@pytest.mark.parametrize("energy", [0.0, 1e-12, 1e-7])
@pytest.mark.parametrize("scheme", ["int4_wo_128", "nvfp4", "mxfp4"])
def test_the_search_does_not_clip_weights_that_calibration_did_not_see(scheme: str, energy: float) -> None:
    """A large weight in every group whose input hardly moved: only shrinking its range would help the others."""
    spec = spec_of(scheme)
    group = spec.group_size
    assert group is not None
    source = weight(torch.float32).clamp_(-1, 1)
    source[:, ::group] = 4.5
    seen = torch.ones(COLUMNS)
    seen[::group] = energy
    gram = torch.diag(seen)
    blind = searched_qparams(source, spec, None, gram.diagonal())
    found = searched_qparams(source, spec, None, column_importance(gram))
    # As if these inputs were like the others.
    assert torch.equal(found.scale.float(), searched_qparams(source, spec, None, torch.ones(COLUMNS)).scale.float())
    lost = [dequantize(Quantized(encode(source, spec, p), p), spec) - source for p in (blind, found)]
    worst = [float(error[:, ::group].abs().max()) for error in lost]
    assert worst[0] > 1.1 > worst[1]


def test_inputs_that_moved_weigh_what_they_moved() -> None:
    gram = torch.diag(importance() + 0.01)
    assert torch.equal(column_importance(gram), gram.diagonal())


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    found = solve(torch.eye(COLUMNS) * 3)
    assert torch.equal(found.codes, rounded().codes)


def test_a_moment_that_cannot_be_factorized() -> None:
    """Symmetric, but with eigenvalues of both signs far apart: no damping that is tried makes it definite."""
    gram = torch.eye(COLUMNS)
    gram[0, 1] = gram[1, 0] = 1e9
    assert solve(gram) is None


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        solve(torch.eye(COLUMNS).fill_(float("nan")))
