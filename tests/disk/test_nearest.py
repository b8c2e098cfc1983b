"""Damage to codes and scales that the noise of a whole weight hides, and the work of algorithms that looks like it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quarkcli.dialects.base import StoredTarget
from quarkcli.disk import nearest, verify
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.outputs import MANIFEST
from quarkcli.errors import CheckError
from quarkcli.numerics.quantize import Quantized, encode, make_qparams, quantize
from quarkcli.spec import PerChannel, PerGroup, PerTensor, ScaleSpec, TensorSpec
from tests import runs
from tests.dialects.plans import PAIRS

SPECS = {
    "int4": TensorSpec("int4", PerGroup(32), ScaleSpec("model")),
    "uint4": TensorSpec("uint4", PerGroup(32), ScaleSpec("model")),
    "int8": TensorSpec("int8", PerChannel(0), ScaleSpec("model")),
    "mxfp4": PAIRS["mxfp4"][0],
    "nvfp4": PAIRS["nvfp4"][0],
    "fp8": PAIRS["fp8"][0],
}


def weight(seed: int) -> Tensor:
    """A matrix with rows and columns of many sizes."""
    made = torch.Generator().manual_seed(seed)
    sizes = torch.randn(64, 1, generator=made).exp() * torch.randn(256, generator=made).exp()
    return torch.randn(64, 256, generator=made) * sizes


def stored(spec: TensorSpec) -> StoredTarget:
    return StoredTarget("m", spec, None, (64, 256), ())


@pytest.mark.parametrize("name", SPECS)
def test_codes_that_were_flipped_and_scales_of_another_weight(name: str) -> None:
    spec, source = SPECS[name], weight(0)
    good = quantize(source, spec)
    assert nearest.damage(stored(spec), good, source) == ""
    codes = good.codes.clone()
    place = source.abs().flatten().argmax()
    codes.view(torch.uint8).view(-1)[place] ^= 7 if codes.dtype == torch.int8 else 6
    found = nearest.damage(stored(spec), Quantized(codes, good.params), source)
    assert found == "1 code is far from the nearest, and all others are near"
    other = Quantized(good.codes, make_qparams(weight(1), spec))
    if not isinstance(spec.granularity, PerTensor):
        assert nearest.damage(stored(spec), other, source).startswith("its scales are not its own")


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("spread", [0.1, 0.35, 1.0, 4.0])
def test_errors_that_a_solver_hands_on_are_no_damage(name: str, spread: float) -> None:
    """Errors of columns before move what is rounded, here by a share of the step or by several steps."""
    spec, source = SPECS[name], weight(0)
    step = source.view(64, 8, 32).abs().amax(-1).repeat_interleave(32, 1) / 7
    moved = source + spread * step * torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    assert nearest.damage(stored(spec), quantize(moved, spec), source) == ""
    one = source.clone()
    one[:, 5] += 2 * spread * step[:, 5]  # a single column, by up to eight steps
    assert nearest.damage(stored(spec), Quantized(quantize(one, spec).codes, make_qparams(one, spec)), source) == ""


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.25])
def test_scales_that_were_searched_are_no_damage(factor: float) -> None:
    spec, source = SPECS["int4"], weight(0)
    params = make_qparams(source * factor, spec)
    assert nearest.damage(stored(spec), Quantized(encode(source, spec, params), params), source) == ""


@pytest.mark.parametrize("listed", [True, False])
def test_weights_that_a_manifest_lists_are_not_looked_at(
    listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hashes were compared before."""
    folder = runs.run("demo", tmp_path / "out", scheme="int4_wo_32").folder
    monkeypatch.setattr(nearest, "damage", lambda *given: "damaged")
    if listed:
        assert verify.directory(str(folder), str(EMBEDDED))
        return
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckError, match="28 weights have damaged codes or scales"):
        verify.directory(str(folder), str(EMBEDDED))
