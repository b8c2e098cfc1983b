"""GPTQ on the embedded model: better than rounding to nearest, in every format, on text it has not seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.evaluation.run import evaluate
from quarkcli.events import Event, PartDone
from tests import runs

HALF = 40  # of the reference topics; calibration reads those before, evaluation those after


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seen") / "seen.txt"
    path.write_text(runs.topics(0, HALF))
    return path


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unseen") / "unseen.txt"
    path.write_text(runs.topics(HALF, -1))
    return path


def measure(folder: Path, unseen: Path, tokens: int = 1024) -> tuple[float, list[float]]:
    """(KL per token, relative output error of every block), weights alone quantized."""
    errors: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, PartDone):
            errors.append(event.error)

    result = evaluate(
        str(folder), baseline=str(EMBEDDED), text=str(unseen), max_tokens=tokens, weights_only=True, device="cpu",
        tell=listen,
    )  # fmt: skip
    return result["kl"], errors


def test_at_least_a_third_less_is_lost_than_by_rounding(seen: Path, unseen: Path, tmp_path: Path) -> None:
    rounded = runs.run("demo", tmp_path / "rtn", scheme="int4_wo_128")
    solved = runs.run("demo", tmp_path / "gptq", recipe="int4_wo_128-gptq", **runs.data(seen, 32, 256))
    assert solved.report["algorithms"] == ["gptq"]
    (kl, _), (better, _) = measure(rounded.folder, unseen, 2048), measure(solved.folder, unseen, 2048)
    assert better <= 0.65 * kl
    # The layout is that of rounding: scales are fixed beforehand, groups keep their places.
    shapes = [{name: (t.dtype, t.shape) for name, t in runs.read_all(m.folder).items()} for m in (rounded, solved)]
    assert shapes[0] == shapes[1]
    assert rounded.prepared.forecast.output_bytes == solved.prepared.forecast.output_bytes


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_every_block_is_closer_in_fp4(scheme: str, seen: Path, unseen: Path, tmp_path: Path) -> None:
    data = runs.data(seen, 16, 128)
    rounded = runs.run("demo", tmp_path / "rtn", scheme=scheme, **(data if scheme == "nvfp4" else {}))
    solved = runs.run("demo", tmp_path / "gptq", scheme=scheme, algorithm="gptq", **data)
    (kl, before), (better, after) = measure(rounded.folder, unseen), measure(solved.folder, unseen)
    assert len(before) == len(after) == 4
    assert all(new < 0.9 * old for old, new in zip(before, after, strict=True))
    assert better < 0.8 * kl


@pytest.fixture(scope="module")
def first_block(unseen: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Output error of block 0 after rounding."""
    rounded = runs.run("demo", tmp_path_factory.mktemp("rtn") / "out", scheme="int4_wo_128")
    return measure(rounded.folder, unseen, 512)[1][0]


@pytest.mark.parametrize("parameters", ["act_order: false", "scale_search: false", "damp: 1e-1"])
def test_every_variant_beats_rounding(
    parameters: str, seen: Path, unseen: Path, first_block: float, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text(
        "schema: quark/recipe/1\nmetadata: {name: own}\nquantize:\n  scheme: int4_wo_128\n"
        f"  algorithm: [{{method: gptq, {parameters}}}]\n"
    )
    made = runs.run("demo", tmp_path / "out", recipe=str(tmp_path / "own.yaml"), **runs.data(seen, 16, 128))
    assert measure(made.folder, unseen, 512)[1][0] < 0.9 * first_block


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_inputs_that_never_moved(family: str, seen: Path, tmp_path: Path) -> None:
    """Some rows of up projections are zero, so that the down projection never reads those inputs; one whole matrix."""
    source = runs.build(family, tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    ups = [name for name in tensors if name.endswith("up_proj.weight") and ".layers.1." in name]
    for name in ups:
        tensors[name][::3] = 0
    whole = ups[0] if family == "llama" else None  # an expert with few tokens borrows from its layer
    if whole:
        tensors[whole].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    data = runs.data(seen, 16, 128)
    rounded = runs.run(source, tmp_path / "rtn", scheme="int4_wo_32")
    solved = runs.run(source, tmp_path / "gptq", scheme="int4_wo_32", algorithm="gptq", **data)
    plain, made = (Checkpoint(Source.open(str(folder))) for folder in (rounded.folder, solved.folder))
    dead = solved.report["dead_inputs"]["weights"]
    for up in ups:
        down = up.replace("up_proj.weight", "down_proj")
        weight, near = made.weight(down), plain.weight(down)
        columns = slice(None) if up == whole else slice(None, None, 3)
        assert dead[down] == weight[:, columns].shape[1]
        source_weight = tensors[f"{down}.weight"].float()[:, columns]
        error, least = ((w[:, columns] - source_weight).norm() for w in (weight, near))
        assert float(error) <= 1.02 * float(least)
        if up == whole:
            assert torch.equal(weight, near)
    (warning,) = [text for text in solved.report["warnings"] if "always zero in calibration" in text]
    assert f"{sum(dead.values()):,} inputs of {len(dead)} weights" in warning


def test_another_seed_gives_other_bytes(seen: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    options = {"scheme": "int4_wo_128", "algorithm": "gptq", **runs.data(seen, 8, 64)}
    one, other = (runs.run(source, tmp_path / f"{seed}", seed=seed, **options).folder for seed in (0, 1))
    assert not runs.same_files(one, other)
