"""`--on-indivisible pad`: a last group that ends with its row, from the plan to the files and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from quarkcli import dialects
from quarkcli.cli import main
from quarkcli.dialects import AUTO
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.errors import ConfigError, ModelError
from quarkcli.evaluation.run import evaluate
from quarkcli.numerics.quantize import dequantize, quantize
from tests import runs

WIDTH, DOWN = 200, "model.layers.1.mlp.down_proj"
UP = "model.layers.1.mlp.up_proj"
# scheme -> its group
SCHEMES = {"int4_wo_128": 128, "uint4_wo_32": 32, "int3_wo_128": 128, "mxfp4_weight_only": 32, "nvfp4_weight_only": 16,
           "nvfp4_fp8": 16}  # fmt: skip
DATA = {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("llama", tmp_path_factory.mktemp("source") / "model", intermediate_size=WIDTH)


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(Source.open(str(folder)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_those_of_a_weight_that_goes_on_with_zeros(source: Path, tmp_path: Path, scheme: str) -> None:
    made = runs.run(source, tmp_path / "out", scheme=scheme, on_indivisible="pad", **DATA)
    target = made.prepared.plan.targets[UP]
    assert target.weight is not None
    size, weight = SCHEMES[scheme], load_file(source / "model.safetensors")[f"{DOWN}.weight"]
    longer = F.pad(weight, (0, -WIDTH % size))
    wanted = dequantize(quantize(longer, target.weight), target.weight)
    assert torch.equal(opened(made.folder).weight(DOWN), wanted[:, :WIDTH])
    assert not wanted[:, WIDTH:].any()
    shapes = {name.rpartition(".")[2]: tuple(tensor.shape) for name, tensor in runs.read_all(made.folder).items()
              if name.startswith(f"{DOWN}.")}  # fmt: skip
    assert (weight.shape[0], -(-WIDTH // size)) in (shapes["weight_scale"], shapes["weight_scale"][::-1])
    assert made.prepared.dialect.loaders(made.prepared.plan) == set()
    (line,) = [line for line in made.report["warnings"] if line.startswith("--on-indivisible pad")]
    assert f"gives 2 modules a last group of {WIDTH % size} of {size} features" in line
    assert any(line.startswith("no server loads this plan") for line in made.report["warnings"])
    assert main.main(["verify", str(made.folder), "--source", str(source)]) == 0


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "smoothquant,gptq"])
def test_algorithms_work_on_it_and_the_evaluation_agrees(source: Path, tmp_path: Path, algorithm: str) -> None:
    text = str(runs.text_file(tmp_path / "text.txt"))
    asked = {"scheme": "int4_wo_128", "on_indivisible": "pad", "calib_data": text, "calib_samples": 16,
             "calib_seqlen": 64, "settings": runs.quick(algorithm.rpartition(",")[2])}  # fmt: skip
    made = runs.run(source, tmp_path / "out", algorithm=algorithm, **asked)
    again = runs.run(source, tmp_path / "again", recipe=str(made.folder / "quark" / "recipe.yaml"),
                     **{key: asked[key] for key in ("calib_data",)})  # fmt: skip
    assert runs.same_files(made.folder, again.folder)
    found = evaluate(str(made.folder), baseline=str(source), text=text, max_tokens=300, device="cpu", tell=lambda e: 0)
    assert 0 <= found["kl"] < 0.1
    assert all(error < 0.3 for error in made.report["loss"]["output_errors"].values())


@pytest.mark.parametrize("scheme", ["int4_wo_32", "mxfp4_weight_only", "nvfp4_weight_only"])
def test_every_writer_holds_it_or_refuses_it(source: Path, scheme: str) -> None:
    """None of those that servers read do: their shapes would be others."""
    holds = set()
    for writer in dialects.writers():
        try:
            made = runs.prepare(source, scheme=scheme, on_indivisible="pad", dialect=writer.name)
        except ConfigError as error:
            assert "tile 1x" in str(error) and "down_proj" in str(error)
            assert f"use --dialect {AUTO}, which picks one that can" in error.hint
        else:
            assert not writer.loaders(made.plan)
            holds.add(writer.name)
    assert len(holds) == 1


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "int4_wa_64"])
def test_groups_of_inputs_are_not_padded(source: Path, scheme: str) -> None:
    with pytest.raises(ModelError, match=r"down_proj\.input_quantizer: its 200 input features") as caught:
        runs.prepare(source, scheme=scheme, on_indivisible="pad", **DATA)
    assert "--on-indivisible pad works only for weights" in caught.value.hint


def test_an_error_names_it_and_nothing_to_do_is_said(source: Path) -> None:
    with pytest.raises(ModelError, match="200 input features") as caught:
        runs.prepare(source, scheme="int4_wo_128")
    assert "--on-indivisible pad makes their last groups shorter" in caught.value.hint
    made = runs.prepare(source, scheme="int4_wo_per_channel", on_indivisible="pad")
    assert "--on-indivisible pad changes nothing: the group size divides every weight's width" in made.warnings
