"""Round to nearest, with scales that data chooses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quarkcli import algorithms
from quarkcli.algorithms.base import Moment, Problem
from quarkcli.errors import ConfigError
from quarkcli.numerics.quantize import Quantized, dequantize, quantize
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.attributes import to_spec
from quarkcli.spec import TensorSpec
from tests import runs

ROWS, COLUMNS, TOKENS = 24, 128, 600
SCHEMES = ("int4_wo_32", "nvfp4_weight_only", "mxfp4_weight_only")


def spec_of(scheme: str) -> TensorSpec:
    (cfg,) = [e.cfg for e in recipes.from_scheme(scheme).entries if e.quantizer_path == "*.weight_quantizer"]
    assert cfg is not None
    return to_spec(cfg, weight=True)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def gram() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(TOKENS, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    mixed *= torch.linspace(0.2, 4, COLUMNS)
    return mixed.T @ mixed / TOKENS


def problem(spec: TensorSpec, weight: torch.Tensor, gram: torch.Tensor | None) -> Problem:
    target = type("Target", (), {"name": "w", "weight": spec, "input": None})()
    moment = None if gram is None else Moment(gram, TOKENS)
    return Problem("w.input", None, 0, (target,), (weight,), (None,), moment, lambda text: None)


def lost(weight: torch.Tensor, found: Quantized, spec: TensorSpec, gram: torch.Tensor) -> torch.Tensor:
    """e^T H e of every row and group, in float64."""
    size = spec.group_size or COLUMNS
    error = (dequantize(found, spec).double() - weight.double()).view(ROWS, -1, size)
    blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, COLUMNS, size)]).double()
    return torch.einsum("rgi,gij,rgj->rg", error, blocks, error)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_group_loses_more_and_many_lose_less(scheme: str, weight: torch.Tensor, gram: torch.Tensor) -> None:
    spec = spec_of(scheme)
    (found,) = algorithms.create("rtn", {"scale_search": True}).solve(problem(spec, weight, gram))
    before, after = lost(weight, quantize(weight, spec), spec, gram), lost(weight, found, spec, gram)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.99 * float(before.sum())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_the_nearest_to_these_scales(scheme: str, weight: torch.Tensor, gram: torch.Tensor) -> None:
    spec = spec_of(scheme)
    (found,) = algorithms.create("rtn", {"scale_search": True}).solve(problem(spec, weight, gram))
    values = dequantize(found, spec).double()
    for step in (-1, 1):
        codes = (found.codes.to(torch.int16) + step).clamp(-8, 7).to(found.codes.dtype)
        if spec.format.kind == "float":  # fp4: sign and magnitude
            codes = (found.codes & 8) | ((found.codes & 7).to(torch.int16) + step).clamp(0, 7).to(found.codes.dtype)
        moved = dequantize(Quantized(codes, found.params), spec).double()
        assert bool(((values - weight.double()).abs() <= (moved - weight.double()).abs() + 1e-9).all())


def test_without_data_it_is_what_it_was(weight: torch.Tensor) -> None:
    spec = spec_of("int4_wo_32")
    plain = quantize(weight, spec)
    for asked in ({}, {"scale_search": True}):
        (found,) = algorithms.create("rtn", asked).solve(problem(spec, weight, None))
        assert runs.same_bytes(found.codes, plain.codes) and runs.same_bytes(found.params.scale, plain.params.scale)


def test_its_parameter() -> None:
    with pytest.raises(ConfigError, match="rtn scale_search must be true or false, not 'yes'"):
        algorithms.create("rtn", {"scale_search": "yes"})


def test_modelopts_local_hessian_runs_on_it(tmp_path: Path) -> None:
    """A preset of theirs: block scales of weights by the block's output, inputs as usual."""
    weight = {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "static", "scale_bits": [4, 3]}}
    config = {
        "quant_cfg": [
            {"quantizer_path": "*", "enable": False},
            {"quantizer_path": "*proj.weight_quantizer", "cfg": weight},
        ],
        "algorithm": {"method": "local_hessian", "fp8_scale_sweep": True},
    }
    (tmp_path / "theirs.json").write_text(json.dumps(config))
    data = {"calib_data": "builtin", "calib_samples": 8, "calib_seqlen": 64}
    made = runs.run("demo", tmp_path / "out", recipe=str(tmp_path / "theirs.json"), **data)
    assert [(step.name, step.parameters) for step in made.prepared.plan.algorithms] == [("rtn", {"scale_search": True})]
    assert {kind for kinds in made.prepared.needs.values() for kind in kinds} == {"gram"}
    plain = runs.run("demo", tmp_path / "plain", recipe=str(tmp_path / "theirs.json"), algorithm="rtn",
                     settings=["rtn.scale_search=false"])  # fmt: skip
    assert plain.prepared.calibration is None and not runs.same_files(made.folder, plain.folder)
