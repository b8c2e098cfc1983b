"""Experts that no token reaches, and what the job does about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli.errors import DataError
from tests import runs

from .watch import ROWS, close, collect, hooked, inner, moment, plan

FIRST, LAYER = (f"model.layers.{index}.block_sparse_moe.experts" for index in range(2))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of two blocks whose second router never chooses experts 2 and 3: of t, -t, 0, 0 one is above 0."""
    folder = runs.build("mixtral", tmp_path_factory.mktemp("narrow") / "m", torch.float32, num_experts_per_tok=1)
    tensors = load_file(folder / "model.safetensors")
    router = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    tensors["model.layers.1.block_sparse_moe.gate.weight"] = router[:1] * torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_layer_stands_in(narrow: Path, text: Path) -> None:
    statistics = collect(plan(narrow, text))[1]
    hidden, index, _ = hooked(narrow)["model.layers.1.mlp.experts"]
    assert set(index.unique().tolist()) == {0, 1}
    inside = [inner(runs.read_all(narrow), f"{LAYER}.{e}", hidden[(index == e).any(-1)], ("w1", "w3")) for e in (0, 1)]
    for expert in (2, 3):
        mean, tokens = statistics.kept[f"{LAYER}.input", expert]
        assert tokens == 0
        close(mean, moment(hidden))
        mean, tokens = statistics.kept[f"{LAYER}.w2.input", expert]
        assert tokens == 0
        close(mean, moment(torch.cat(inside)))
    counts = statistics.expert_tokens()[LAYER]
    assert counts == {0: len(inside[0]), 1: len(inside[1]), 2: 0, 3: 0}
    assert sum(counts.values()) == ROWS.numel()


def test_the_job_says_so(narrow: Path, text: Path, tmp_path: Path) -> None:
    made = runs.run(narrow, tmp_path / "out", scheme="nvfp4", algorithm="gptq", **runs.data(text))
    warnings = [warning for warning in made.report["warnings"] if LAYER in warning]
    assert len(warnings) == 1
    assert "2 of 4 experts saw no calibration token (2, 3)" in warnings[0]
    assert made.report["experts"]["share_quantized"] == 1.0
    counts = json.loads((made.folder / "quark" / "report.json").read_text())["experts"]["calibration_tokens"][LAYER]
    assert (counts["2"], counts["3"]) == (0, 0) and counts["0"] > 0 and counts["1"] > 0
    scales = runs.read_all(made.folder)
    inputs = {float(scales[f"{LAYER}.{e}.w1.input_global_scale"]) for e in range(4)}
    assert len(inputs) == 1  # seen or not, the layer's


def test_strict_refuses(narrow: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 4 experts saw no calibration token"):
        runs.run(narrow, tmp_path / "out", scheme="nvfp4", strict=True, **runs.data(text))
    assert not (tmp_path / "out").exists()


def test_all_tokens_change_the_statistics_but_not_the_counts(narrow: Path, text: Path, tmp_path: Path) -> None:
    both = {
        mode: runs.run(narrow, tmp_path / mode, scheme="nvfp4", moe_calibration=mode, **runs.data(text))
        for mode in ("routed", "all")
    }
    counts = [made.report["experts"]["calibration_tokens"] for made in both.values()]
    assert counts[0]["model.layers.0.block_sparse_moe.experts"] == counts[1]["model.layers.0.block_sparse_moe.experts"]
    name = "model.layers.0.block_sparse_moe.experts.0.{}.input_global_scale"
    routed, everything = (runs.read_all(made.folder) for made in both.values())
    assert torch.equal(routed[name.format("w1")], everything[name.format("w1")])
    # Global scales are divisors: more tokens, larger amax, smaller number.
    assert float(everything[name.format("w2")]) < float(routed[name.format("w2")])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_asked_batch_changes_no_file(family: str, text: Path, tmp_path: Path) -> None:
    """On a CPU; the flag is for GPUs."""
    source = runs.build(family, tmp_path / "m", torch.float32, num_hidden_layers=1)
    options = {"scheme": "nvfp4", "algorithm": "gptq", "device": "cpu", **runs.data(text, 12, 64)}
    one, three = (runs.run(source, tmp_path / str(batch), calib_batch=batch, **options) for batch in (1, 3))
    assert runs.same_files(one.folder, three.folder)
    assert one.report["calibration"]["digest"] == three.report["calibration"]["digest"]


def test_the_layer_stands_in_for_experts_with_few_tokens(narrow: Path, text: Path) -> None:
    """Those below the number have its moments exactly; those above keep what they had."""
    usual = collect(plan(narrow, text))[1]
    counts = usual.expert_tokens()[LAYER]
    fewer, more = sorted((0, 1), key=lambda expert: counts[expert])
    raised = collect(plan(narrow, text), least=counts[fewer] + 1)[1]
    assert raised.expert_tokens()[LAYER] == counts
    for site in (f"{LAYER}.input", f"{LAYER}.w2.input"):
        assert torch.equal(raised.kept[site, fewer][0], usual.kept[site, 2][0])  # as one that saw no token
        assert not torch.equal(raised.kept[site, fewer][0], usual.kept[site, fewer][0])
        assert torch.equal(raised.kept[site, more][0], usual.kept[site, more][0])
        assert raised.channel_amax(site, fewer) is None
        assert raised.samples(site, fewer) is None if site in raised._samples else True


def test_an_input_scale_of_its_own_needs_enough_tokens(narrow: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "schema: quark/recipe/1\nmetadata: {description: x}\nquantize: {scheme: fp8}\nexpert_inputs: own\n"
        "calibration: {min_expert_tokens: 1}\n"
    )
    folders = {
        least: runs.run(
            narrow, tmp_path / str(least), recipe=str(recipe), min_expert_tokens=least, **runs.data(text)
        ).folder
        for least in (None, 10**6)
    }
    scales = {
        least: [float(runs.read_all(folder)[f"{FIRST}.{expert}.w2.input_scale"]) for expert in range(4)]
        for least, folder in folders.items()
    }
    assert len(set(scales[None])) > 1
    assert scales[10**6] == [max(scales[None])] * 4


def test_the_number_is_in_warnings_report_and_recipe(narrow: Path, text: Path, tmp_path: Path) -> None:
    few = {"scheme": "int4_wo_32", "algorithm": "gptq", "min_expert_tokens": 10**6, **runs.data(text)}
    made = runs.run(narrow, tmp_path / "out", **few)
    assert any("4 of 4 experts saw fewer than 1000000 calibration tokens" in line for line in made.report["warnings"])
    assert made.report["calibration"]["min_expert_tokens"] == 10**6
    again = runs.run(narrow, tmp_path / "again", recipe=str(made.folder / "quark" / "recipe.yaml"))
    assert runs.same_files(made.folder, again.folder)
    usual = runs.run(narrow, tmp_path / "usual", **{**few, "min_expert_tokens": None})
    assert not runs.same_files(made.folder, usual.folder)
    with pytest.raises(DataError, match="experts saw fewer than 1000000 calibration tokens"):
        runs.run(narrow, tmp_path / "strict", strict=True, **few)
