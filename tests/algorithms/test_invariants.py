"""What holds of every registered algorithm, on a model with dense blocks and experts.

Bytes do not depend on the run, the batch or a kill; what is stored is what the last step chose; bad numbers end the
run, and the error names module and batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli import algorithms
from quarkcli.algorithms.base import Solver, Tuner
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.errors import DataError, Stopped
from quarkcli.job import pieces, preflight
from quarkcli.numerics.quantize import Quantized, dequantize
from tests import runs
from tests.families import models
from tests.forks import Forks, at

NAMES = algorithms.names()
SCHEME, ROWS, TOKENS = "int4_wo_32", 64, 64  # two batches of 2,048 tokens


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build("qwen3_moe", tmp_path_factory.mktemp("source") / "qwen3_moe")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def plain(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run of every algorithm, made when it is first asked for, with the codes and scales that were packed."""
    root = tmp_path_factory.mktemp("plain")

    class Runs(dict[str, tuple[runs.Made, dict[str, Quantized]]]):
        def __missing__(self, name: str) -> tuple[runs.Made, dict[str, Quantized]]:
            with pytest.MonkeyPatch.context() as patch:
                packed = watch_packing(patch)
                self[name] = runs.run(source, root / name, **options(name, text)), packed
            return self[name]

    return Runs()


def options(name: str, text: Path) -> dict[str, Any]:
    return {"scheme": SCHEME, "algorithm": name, "settings": runs.quick(name), **runs.data(text, ROWS, TOKENS)}


def watch_packing(patch: pytest.MonkeyPatch) -> dict[str, Quantized]:
    """Codes and scales by weight as they come to be packed."""
    seen: dict[str, Quantized] = {}
    measure = pieces.weight_errors

    def watched(rows: list[Any]) -> list[float]:
        seen.update({target.name: quantized for target, _, quantized in rows})
        return measure(rows)

    patch.setattr(pieces, "weight_errors", watched)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bytes_whatever_the_batch_and_after_a_kill(
    name: str, plain: Any, text: Path, tmp_path: Path, forks: Forks
) -> None:
    made, _ = plain[name]
    asked = options(name, text)
    settings = [word for text in asked["settings"] for word in ("--set", text)]
    command = [
        "quantize", "--model", str(made.source), "--scheme", SCHEME, "--algorithm", name, *settings, "--device", "cpu",
        "--calib-data", str(text), "--calib-samples", str(ROWS), "--calib-seqlen", str(TOKENS), "-o", "out",
        "--calib-batch", "24",
    ]  # fmt: skip
    kill = at("quarkcli.disk.journal.Journal.finish", call=3, after=True)
    assert forks(*command, cwd=tmp_path, hook=kill).code == -9
    done = forks(*command, "--resume", "require", cwd=tmp_path)
    assert done.code == 0 and "3 of" in done.err
    assert runs.same_files(made.folder, tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_what_was_chosen(name: str, plain: Any) -> None:
    """Codes and scales are read back as they were packed, and dequantize to the same values."""
    made, packed = plain[name]
    checkpoint = Checkpoint(Source.open(str(made.folder)))
    targets = {target.name: target for target in made.prepared.plan.quantized()}
    assert packed.keys() == targets.keys() == checkpoint.view.targets.keys()
    for weight, chosen in packed.items():
        read = checkpoint.decode(checkpoint.view.targets[weight]).weight
        assert runs.same_bytes(read.codes, chosen.codes), weight
        assert runs.same_bytes(read.params.scale, chosen.params.scale), weight
        assert torch.equal(checkpoint.weight(weight).float(), dequantize(chosen, targets[weight].weight).float()), (
            weight
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_last_word_is_the_members(name: str, source: Path, text: Path, tmp_path: Path) -> None:
    """What a solver returns, or a tuner that comes last, is what is packed."""
    member = type(algorithms.create(name, {}))
    if not issubclass(member, Solver | Tuner):
        assert algorithms.create(name, {}).kind in {"transform", "refiner"}
        return
    said: dict[str, Quantized] = {}
    with pytest.MonkeyPatch.context() as patch:
        packed = watch_packing(patch)
        method = "solve_many" if issubclass(member, Solver) else "tune"
        patch.setattr(member, method, listening(getattr(member, method), said))
        runs.run(source, tmp_path / "out", **options(name, text))
    assert said or issubclass(member, Tuner)  # which may find nothing better in so few steps
    for weight, quantized in said.items():
        assert runs.same_bytes(packed[weight].codes, quantized.codes), weight
        assert runs.same_bytes(packed[weight].params.scale, quantized.params.scale), weight


def listening(method: Any, said: dict[str, Quantized]) -> Any:
    def heard(self: Any, what: Any, *more: Any) -> Any:
        found = method(self, what, *more)
        if isinstance(found, list):
            for problem, own in zip(what, found, strict=True):
                said.update(zip((target.name for target in problem.targets), own or (), strict=own is not None))
        elif found is not None:
            said.update(found.weights)
        return found

    return heard


# ---- bad numbers


@pytest.fixture(scope="module")
def poisoned(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source with NaN for a token that the second batch of calibration rows alone has."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][TOKEN] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


TOKEN = runs.tokenizer()("\x07", add_special_tokens=False)["input_ids"][0]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of text of which one, in the third batch, has the token."""
    found = [("\x07" if row == 40 else "a") * TOKENS for row in range(ROWS)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(f'{{"text": "{row}"}}' for row in found).replace("\x07", "\\u0007"))
    return file


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_in_one_batch_ends_the_run(name: str, poisoned: Path, rows: Path, tmp_path: Path) -> None:
    asked = {**options(name, rows), "scheme": "nvfp4", "on_nonfinite": "keep"}
    with pytest.raises(DataError, match=r"batch 3 of 4 \(rows 33 to 48\)") as caught:
        runs.run(poisoned, tmp_path / "out", **asked)
    assert str(caught.value.where).startswith("model.layers.0.")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def overflowing(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source in float16, which the experts of block 1 leave for one token, whose channel no other token has."""
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    channel = 5
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight"):
            tensor[:, channel] = 0
            tensor[TOKEN] = 0
            tensor[TOKEN, channel] = 1
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[channel] = 0
        elif "layers.1." in name and name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor[:, channel] = 100
    config = (folder / "config.json").read_text().replace("bfloat16", "float16")
    (folder / "config.json").write_text(config)
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_what_overflows_is_passed_over_where_that_is_asked_for(
    name: str, overflowing: Path, rows: Path, tmp_path: Path
) -> None:
    """Nothing that is written is NaN, and the report lists what was passed over."""
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[33:49]))
    asked = {**options(name, rows), "scheme": "nvfp4", "calib_samples": 16}
    made = runs.run(overflowing, tmp_path / "out", on_nonfinite="skip-algorithm", **asked)
    skipped = made.report["skipped"]
    assert skipped and not any(".layers.0." in what for what in skipped)
    assert any(
        "algorithms skip it, and ranges use only its finite values" in warning for warning in made.report["warnings"]
    )
    checkpoint = Checkpoint(Source.open(str(made.folder)))
    assert all(bool(checkpoint.weight(target).isfinite().all()) for target in checkpoint.view.targets)


def test_what_is_passed_over_is_rounded_to_nearest_and_the_rest_is_solved(
    overflowing: Path, rows: Path, tmp_path: Path
) -> None:
    made = runs.run(overflowing, tmp_path / "out", on_nonfinite="skip-algorithm", **options("gptq", rows))
    nearest = runs.run(overflowing, tmp_path / "nearest", **options("rtn", rows))
    ours, theirs = (Checkpoint(Source.open(str(run.folder))) for run in (made, nearest))
    same = {name for name in ours.view.targets if torch.equal(ours.weight(name), theirs.weight(name))}
    skipped = made.report["skipped"].keys() & ours.view.targets.keys()
    assert len(skipped) > 4 and skipped <= same
    assert not any(".layers.0." in name for name in same)


def test_a_run_that_stops_does_not_publish_what_another_passed_over(
    overflowing: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="NaN or inf") as caught:
        runs.run(overflowing, tmp_path / "stop", **options("gptq", rows))
    assert "('quark quantize' also takes --on-nonfinite skip-algorithm)" in caught.value.hint
    asked = {**options("gptq", rows), "resume": "auto"}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(preflight, "reason_to_stop", lambda *given: Stopped("enough") if given[-1] < 2 else None)
        runs.run(overflowing, tmp_path / "out", on_nonfinite="skip-algorithm", **asked)
    with pytest.raises(DataError, match="the calibration activations") as caught:
        runs.run(overflowing, tmp_path / "out", **asked)
    assert "--resume never" in caught.value.hint
