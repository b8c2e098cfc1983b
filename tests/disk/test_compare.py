"""Two checkpoints tensor by tensor: the ratio against numpy's own arithmetic, and what is missing or another."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli.disk import compare as comparing
from quarkcli.disk import verify
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import CheckError
from tests import runs


def compared(a: Path, b: Path) -> comparing.Comparison:
    return comparing.compare(*(Checkpoint(Source.open(str(folder))) for folder in (a, b)))


def changed(folder: Path, to: Path, name: str, value: torch.Tensor | None) -> Path:
    """A copy of a model in one file with another tensor, or without it."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors.pop(name)
    save_file(tensors | ({} if value is None else {name: value}), to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return runs.build("qwen3_moe", tmp_path_factory.mktemp("moe") / "model")


def test_the_ratio_is_that_of_numpy(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    source = load_file(EMBEDDED / "model.safetensors")[name]
    noisy = source + 0.01 * torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    found = compared(EMBEDDED, changed(EMBEDDED, tmp_path / "noisy", name, noisy.bfloat16()))
    x, y = source.float().numpy().astype(np.float64), noisy.bfloat16().float().numpy().astype(np.float64)
    worst = found.rows[0]
    assert worst.name == name and not worst.identical
    assert worst.sqnr == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), abs=1e-9)
    assert worst.largest == np.abs(x - y).max()
    assert all(row.identical and row.sqnr == math.inf for row in found.rows[1:])
    assert found.sqnr == worst.sqnr and not found.identical


def test_chunks_change_no_ratio(monkeypatch):
    x, y = torch.randn(300, 7), torch.randn(300, 7)
    whole = comparing._difference(x, y)
    monkeypatch.setattr(comparing, "_CHUNK", 11)
    assert comparing._difference(x, y) == pytest.approx(whole, rel=1e-12)


def test_a_quantized_one_and_its_source_either_way(made_nvfp4):
    forward, back = compared(EMBEDDED, made_nvfp4), compared(made_nvfp4, EMBEDDED)
    assert (forward.reference, back.reference) == ("a", "b")
    assert forward.complete and len(forward.rows) == 39
    assert [row.sqnr for row in forward.rows] == [row.sqnr for row in back.rows]
    ratios = [row.sqnr for row in forward.rows if not row.identical]
    assert len(ratios) == 28 and ratios == sorted(ratios) and 15 < ratios[0] < ratios[-1] < 30


@pytest.fixture(scope="module")
def made_nvfp4(tmp_path_factory) -> Path:
    return runs.run("demo", tmp_path_factory.mktemp("nvfp4") / "out", scheme="nvfp4", **CALIBRATION).folder


CALIBRATION = {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 32, "offline": True}


def test_codes_and_scales_of_two_dialects(tmp_path, made_nvfp4):
    other = runs.run("demo", tmp_path / "other", scheme="nvfp4", dialect="quark", **CALIBRATION)
    found = compared(made_nvfp4, other.folder)
    assert found.complete and not found.scales
    assert sum(row.codes for row in found.rows) == 28  # one stores global scales, one their inverse
    assert all(row.identical or (row.codes and row.sqnr > 120) for row in found.rows)
    few = runs.run("demo", tmp_path / "few", scheme="nvfp4", **{**CALIBRATION, "calib_samples": 1})
    found = compared(made_nvfp4, few.folder)
    assert all(row.identical for row in found.rows)
    assert found.scales and all(name.endswith(".input") for name in found.scales)
    assert not found.identical


def test_the_same_codes_under_another_scale_are_not_equal(tmp_path, made_nvfp4):
    folder = shutil.copytree(made_nvfp4, tmp_path / "scaled")
    shard = folder / "model-block-00001.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("o_proj.weight_global_scale"))
    tensors[name] *= 2
    save_file(tensors, shard, {"format": "pt"})
    worst, *others = compared(made_nvfp4, folder).rows
    assert worst.name == name.replace("weight_global_scale", "weight")
    assert worst.sqnr == pytest.approx(10 * math.log10(4), abs=1e-6)  # half or double of everything
    assert not worst.codes and all(row.identical for row in others)


def test_experts_fused_or_one_by_one(tmp_path, moe):
    together = runs.build(runs.FUSED, tmp_path / "fused")
    assert compared(moe, together).identical
    one = runs.run(moe, tmp_path / "one", scheme="mxfp4").folder
    found = compared(one, together)
    assert found.complete
    quantized = [row for row in found.rows if not row.identical]
    assert sum(".experts." in row.name for row in quantized) == 2 * 4 * 3
    assert min(row.sqnr for row in quantized) > 15


def test_what_only_one_has_and_other_shapes(tmp_path, moe):
    lost = changed(moe, tmp_path / "lost", "model.layers.0.self_attn.q_norm.weight", None)
    other = changed(moe, tmp_path / "other", "model.layers.0.self_attn.q_norm.weight", torch.ones(3).bfloat16())
    found = compared(moe, lost)
    assert found.only_a == ["model.layers.0.self_attn.q_norm.weight"] and not found.identical
    assert compared(lost, moe).only_b == found.only_a
    assert compared(moe, other).shapes == {"model.layers.0.self_attn.q_norm.weight": ((64,), (3,))}
    comparing.check(found, None)
    with pytest.raises(CheckError, match="tensors are only in one checkpoint or have another shape in the other"):
        comparing.check(found, 1.0)


@pytest.mark.parametrize(
    ("values", "other", "ratio"),
    [
        ([0.0, 0.0], [0.0, 0.0], math.inf),
        ([0.0, 0.0], [0.0, 1.0], -math.inf),
        ([math.nan, 1.0], [math.nan, 1.0], math.inf),
        ([math.inf, 1.0], [math.inf, 1.0], math.inf),
        ([1.0, 1.0], [math.nan, 1.0], -math.inf),
        ([1.0, 1.0], [math.inf, 1.0], -math.inf),
        ([2.0, 0.0], [1.0, 0.0], 10 * math.log10(4)),
    ],
)
def test_values_without_a_ratio(values, other, ratio):
    signal, noise, largest = comparing._difference(torch.tensor(values), torch.tensor(other))
    assert comparing.Row("x", "", "", signal, noise, largest, False).sqnr == pytest.approx(ratio)


def test_turned_weights_are_turned_back(tmp_path):
    """What a server multiplies with turned inputs is the source's weight turned; the ratio is that of the weight."""
    scheme = {"scheme": "mxfp4", "exclude": ["*layers.0*"]}
    turned = runs.run("demo", tmp_path / "turned", algorithm="hadamard", **scheme)
    found = compared(EMBEDDED, turned.folder)
    assert len(found.turned) > 3
    assert min(row.sqnr for row in found.rows) > 15


def test_what_an_algorithm_rewrote_is_named(tmp_path):
    """Factors that a norm takes over change a weight and not the model; its own ratio says nothing of the loss."""
    text = runs.text_file(tmp_path / "t.txt")
    smooth = runs.run("demo", tmp_path / "s", scheme="int8_dynamic", algorithm="smoothquant", **runs.data(text, 8, 32))
    plain = runs.run("demo", tmp_path / "p", scheme="int8_dynamic")
    found = compared(smooth.folder, EMBEDDED)
    assert "model.layers.0.mlp.gate_proj.weight" in found.rewritten
    assert "model.layers.0.self_attn.o_proj.weight" not in found.rewritten
    with pytest.raises(CheckError) as caught:
        comparing.check(found, 15.0)
    assert caught.value.hint == "measure the loss with 'quark eval': an algorithm rewrote the tensor"
    assert caught.value.result["rewritten"] == found.rewritten
    assert compared(plain.folder, EMBEDDED).rewritten == []


def test_a_kept_expert_of_a_rewritten_tensor_is_no_damage(tmp_path):
    """The report names the tensor of all experts; the one that is kept lies in a tensor of its own in the files."""
    source = runs.build(runs.FUSED, tmp_path / "m", num_hidden_layers=1)
    made = runs.run(
        source, tmp_path / "o", scheme="mxfp4", algorithm="rotation", exclude=["*.experts.0.*"], target="none"
    )
    assert "model.layers.0.mlp.experts.gate_up_proj" in made.report["changed"]
    lines = verify.directory(str(made.folder), str(source), "none")
    assert any("kept tensors have other values, because an algorithm rewrote them" in line for line in lines)
