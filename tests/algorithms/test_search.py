"""The search for scales, and what GPTQ does when there is nothing to solve with or to choose by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quarkcli.algorithms.base import Moment, Problem
from quarkcli.algorithms.gptq import GPTQ
from quarkcli.errors import ConfigError, DataError
from quarkcli.family import WeightView
from quarkcli.numerics.fit import FACTORS, column_importance, diagonal_blocks, fitted
from quarkcli.numerics.quantize import Quantized, dequantize, encode, make_qparams, quantize
from quarkcli.numerics.scales import decode_scale
from quarkcli.plan.model import Decision, Target
from quarkcli.recipe.attributes import native
from quarkcli.recipe.recipe import scheme_model
from quarkcli.spec import PerChannel, ScaleSpec, TensorSpec
from tests import runs

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
    found = fitted(source, spec, None, importance())
    assert (found.scale.dtype, found.scale.shape) == (plain.scale.dtype, plain.scale.shape)
    before, after = errors(source, spec, plain), errors(source, spec, found)
    assert bool((after <= before * (1 + 1e-6)).all())  # chosen by sums in float32
    assert float(after.sum()) < 0.97 * float(before.sum())
    if plain.global_scale is not None:
        assert torch.equal(found.global_scale, plain.global_scale)


def candidates(scheme: str, source: torch.Tensor, spec: TensorSpec, signed: bool) -> list[torch.Tensor]:
    """Real scales that the search is to try at least, [rows, groups], each from a formula of its own."""
    runs = source.double().view(ROWS, -1, spec.group_size)
    amax = runs.abs().amax(-1)
    if scheme == "nvfp4":
        outer = amax.max() / (6 * 448)
        code = (amax / 6 / outer).to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8).int()
        codes = [(code + d).clamp(1, 126).to(torch.uint8) for d in range(-6, 6)]
        return [c.view(torch.float8_e4m3fn).double() * outer for c in codes]
    if scheme == "mxfp4":
        own = make_qparams(source, spec).scale.int()
        return [torch.exp2((own + d - 127).double()) for d in (-1, 0, 1)]
    tried = [amax / 7.5 * f for f in FACTORS]
    if signed:
        extreme = runs.gather(-1, runs.abs().argmax(-1, keepdim=True)).squeeze(-1)
        tried += [sign * extreme / 8 * f for f in FACTORS for sign in (1, -1)]
    return tried


@pytest.mark.parametrize("blocks", [False, True], ids=["diagonal", "blocks"])
@pytest.mark.parametrize(
    ("scheme", "signed"), [("int4_wo_128", False), ("int4_wo_128", True), ("nvfp4", False), ("mxfp4", False)]
)
def test_no_candidate_is_better_than_what_is_found(scheme: str, signed: bool, blocks: bool) -> None:
    """In float64: e^T H e of every group, for every candidate by hand."""
    spec, source = spec_of(scheme), weight(torch.float32)
    size = spec.group_size
    gram = moment()
    cost = diagonal_blocks(gram, size) if blocks else gram.diagonal()
    whole = (
        diagonal_blocks(gram, size).double() if blocks else torch.diag_embed(gram.diagonal().double().view(-1, size))
    )
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    levels = torch.arange(-8, 8).double() if scheme == "int4_wo_128" else torch.cat([-levels, levels])

    def lost(scale: torch.Tensor) -> torch.Tensor:
        runs = source.double().view(ROWS, -1, size)
        unit = runs / scale.double()[..., None]
        nearest = levels[(unit[..., None] - levels).abs().argmin(-1)]
        e = nearest * scale.double()[..., None] - runs
        return torch.einsum("rgi,gij,rgj->rg", e, whole, e)

    found = fitted(source, spec, None, cost, signed=signed)
    real = decode_scale(found.scale, spec.scale.dtype).double() * (
        1 if found.global_scale is None else found.global_scale
    )
    least = torch.stack([lost(scale) for scale in candidates(scheme, source, spec, signed)]).amin(0)
    assert bool((lost(real) <= least * (1 + 1e-5) + 1e-12).all())
    assert bool((real < 0).any()) == signed


def moment() -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(600, 40, generator=g) @ torch.randn(40, COLUMNS, generator=g) + torch.randn(
        600, COLUMNS, generator=g
    )
    return x.T @ x / 600


def test_nothing_to_search() -> None:
    source = weight()
    for spec in (
        spec_of("fp8"),
        TensorSpec("int8", PerChannel(0), ScaleSpec("f32", "half_range")),
        replace(spec_of("nvfp4"), scale=ScaleSpec("e4m3", "sweep", global_scale=ScaleSpec("f32"))),
    ):
        assert torch.equal(fitted(source, spec, None, importance()).scale, make_qparams(source, spec).scale)


def problem(gram: torch.Tensor | None, scheme: str) -> Problem:
    spec = spec_of(scheme)
    slots = {kind: Decision(spec if kind == "weight" else None, 0) for kind in ("weight", "input", "output", "bias")}
    target = Target("m", WeightView("m.weight"), (ROWS, COLUMNS), "BF16", "up", 0, "s", "m", None, None, slots=slots)
    moment = None if gram is None else Moment(gram, 5)
    return Problem("s", None, 0, (target,), (weight(),), (None,), moment, lambda text: None)


def solve(gram: torch.Tensor, scheme: str = "int4_wo_128", scale_search: bool = False) -> Quantized | None:
    solved = gptq(damp=0.01, scale_search=scale_search, refine="off").solve(problem(gram, scheme))
    return None if solved is None else solved[0]


def gptq(**parameters: object) -> GPTQ:
    return GPTQ(**{**GPTQ.parameters, **parameters})


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
    blind = fitted(source, spec, None, gram.diagonal())
    found = fitted(source, spec, None, column_importance(gram))
    # As if these inputs were like the others.
    assert torch.equal(found.scale.float(), fitted(source, spec, None, torch.ones(COLUMNS)).scale.float())
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


@pytest.mark.parametrize(
    "bad",
    [
        {"damp": 0}, {"damp": "much"}, {"damp": True}, {"act_order": "yes"}, {"act_order": 1}, {"refine": -1},
        {"refine": "on"}, {"refine": True}, {"refine": 11}, {"holdout": 4}, {"signed": "maybe"}, {"scale_search": 1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_parameters_are_named(bad: dict[str, object]) -> None:
    (key,) = bad
    with pytest.raises(ConfigError, match=f"gptq {key} must be"):
        gptq(**bad)


def test_what_yaml_reads_as_booleans() -> None:
    assert gptq(refine=False).refine == 0
    assert gptq(signed=True).signed == "on"
    assert gptq(signed=False).signed == "off"
    assert gptq(refine=0).refine == 0


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [("nvfp4_weight_only", []), ("uint4_wo_128", []), ("int4_wo_128", ["gptq.scale_search=false"])],
)
def test_negative_scales_that_cannot_come_are_refused(scheme: str, settings: list[str]) -> None:
    given = {"algorithm": "gptq", "calib_data": "builtin", "settings": ["gptq.signed=on", *settings]}
    with pytest.raises(ConfigError, match="gptq signed: on changes nothing") as caught:
        runs.prepare("demo", scheme=scheme, **given)
    assert caught.value.kind == "E-ALGORITHM-IDLE"
    assert runs.prepare("demo", scheme="int4_wo_128", **given | {"settings": ["gptq.signed=on"]})


@pytest.mark.parametrize(("name", "scheme"), [("gptq", "fp8"), ("gptaq", "int8"), ("qronos", "fp8_block128")])
def test_an_order_inside_groups_needs_groups(name: str, scheme: str) -> None:
    given = {"algorithm": name, "calib_data": "builtin"}
    with pytest.raises(ConfigError, match=f"{name} act_order: group changes nothing") as caught:
        runs.prepare("demo", scheme=scheme, settings=[f"{name}.act_order=group"], **given)
    assert caught.value.kind == "E-ALGORITHM-IDLE"
    assert runs.prepare("demo", scheme=scheme, settings=[f"{name}.act_order=true"], **given)
    one_group = {"exclude": ["*down_proj"]}  # the other weights are as wide as a group
    with pytest.raises(ConfigError, match="no weight has more than one group of columns"):
        runs.prepare("demo", scheme="int4_wo_128", settings=[f"{name}.act_order=group"], **given, **one_group)
    mixed = {"layers": ["*down_proj=int4_wo_128"]}
    assert runs.prepare("demo", scheme=scheme, settings=[f"{name}.act_order=group"], **given, **mixed)
