"""A job reads from a quantized checkpoint as it reads from a model's files: what comes is in source form."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from quarkcli import algorithms, family
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.journal import Journal
from quarkcli.disk.source import Source
from quarkcli.disk.weights import WeightSource
from quarkcli.job.part import PartWorker
from quarkcli.job.pipeline import Pipeline
from quarkcli.numerics.quantize import quantize
from quarkcli.plan.compose import Overrides
from quarkcli.plan.resolve import resolve
from quarkcli.recipe import recipe as recipes
from tests import runs
from tests.golden import sources

DATA = {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    fused = sources.build("fused", tmp_path_factory.mktemp("models") / "fused", vocabulary(EMBEDDED))
    return {"demo": str(EMBEDDED), "fused": str(fused)}


def vocabulary(folder: Path) -> int:
    size: int = Source.open(str(folder)).config["vocab_size"]
    return size


def quantized(source: str, folder: Path) -> Checkpoint:
    runs.run(source, folder, scheme="int8_dynamic")
    return Checkpoint(Source.open(str(folder)))


@pytest.mark.parametrize("model", ["demo", "fused"])
def test_a_checkpoint_has_the_names_and_shapes_of_its_source(
    model: str, models: dict[str, str], tmp_path: Path
) -> None:
    source: WeightSource = Source.open(models[model])
    checkpoint: WeightSource = quantized(models[model], tmp_path / "int8")

    def facts(weights: WeightSource) -> dict[str, Any]:
        return {name: (header.dtype, tuple(header.shape)) for name, header in weights.headers.items()}

    assert facts(checkpoint) == facts(source)
    names = list(reversed(source.headers))
    ours, theirs = checkpoint.read_many(names), source.read_many(names)
    assert list(ours) == list(theirs) == names
    assert all((ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape) for name in names)
    again = checkpoint.read_many(names[:1])[names[0]]
    ours[names[0]].zero_()
    assert again.any()  # of memory of its own


def test_parts_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    """Int8 read as a source and written as mxfp4: the decoded weights, quantized."""
    checkpoint = quantized("demo", tmp_path / "int8")
    config = checkpoint.source.config
    layout = family.lay_out(*family.for_checkpoint(config, checkpoint.headers), config, checkpoint.headers)
    plan = resolve(recipes.from_scheme("mxfp4"), Overrides(), layout)
    dialect = runs.prepare("demo", scheme="mxfp4").dialect
    worker = PartWorker(
        plan, dialect, algorithms.pipeline(plan), {}, checkpoint, None, lambda event: None,
        roles=layout.tensor_roles,
    )  # fmt: skip
    made = {}
    with (
        Journal.lock(tmp_path / "out.partial", resume="never") as journal,
        Pipeline(checkpoint, tmp_path / "out.partial", journal, "cpu") as pipeline,
    ):
        for part in plan.parts:
            made |= worker.work(part, pipeline.read(part, None)).tensors
    assert len(list(plan.quantized())) == 28
    for target in plan.quantized():
        assert target.weight is not None
        weight = checkpoint.read_many([f"{target.name}.weight"])[f"{target.name}.weight"]
        for name, tensor in dialect.tensors(target, quantize(weight, target.weight), {}).items():
            assert runs.same_bytes(made.pop(name), tensor), name
    source = runs.read_all(EMBEDDED)
    assert made and all(runs.same_bytes(tensor, source[name]) for name, tensor in made.items())


@pytest.mark.parametrize(
    ("model", "asked"),
    [("demo", {"scheme": "nvfp4", "algorithm": "gptq"}), ("fused", {"scheme": "fp8", "kv_cache": "fp8"})],
)
def test_a_calibrated_job_on_a_quantized_checkpoint(
    model: str, asked: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    """Every byte as if the decoded weights were the model's files."""
    checkpoint = quantized(models[model], tmp_path / "int8")
    decoded = tmp_path / "decoded"
    shutil.copytree(models[model], decoded, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(checkpoint.read_many(checkpoint.headers), decoded / "model.safetensors", metadata={"format": "pt"})
    wanted = runs.run(decoded, tmp_path / "wanted", **asked, **DATA)
    found = runs.run(tmp_path / "int8", tmp_path / "found", **asked, **DATA)
    assert runs.same_files(found.folder, wanted.folder)
    plain = runs.run(models[model], tmp_path / "plain", **asked, **DATA)
    assert not runs.same_files(plain.folder, wanted.folder)
