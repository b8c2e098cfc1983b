"""Conversions keep every code and scale, whole checkpoints come of them, and what cannot be held is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quarkcli import dialects
from quarkcli.disk import compare as comparing
from quarkcli.disk import verify
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.disk.writer import partial_path
from quarkcli.errors import ConfigError, DataError, ModelError, UsageError
from quarkcli.job import convert as converting
from quarkcli.recipe import catalog
from tests import runs

DATA = {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 32, "offline": True}


def converted(folder: Path, to: str, output: Path) -> dict[str, Any]:
    found: dict[str, Any] = converting.convert(Source.open(str(folder)), to, output)
    return found


def compared(a: Path, b: Path) -> comparing.Comparison:
    return comparing.compare(*(Checkpoint(Source.open(str(folder))) for folder in (a, b)))


def check_equal(a: Path, b: Path) -> None:
    """Codes and block scales bit for bit, scales of a tensor within one unit in the last place, all else as it was."""
    found = compared(a, b)
    assert found.complete and not found.scales
    assert all(row.identical or row.codes for row in found.rows)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("llama", tmp_path_factory.mktemp("llama") / "m")


def held(scheme: str, source: Path, folder: Path) -> dict[str, Path]:
    """A model in a scheme, in every dialect that holds it and is read, from one run."""
    names = []
    for writer in dialects.writers():
        if writer.reader is None:
            continue
        try:
            runs.prepare(source, scheme=scheme, dialect=writer.name, **DATA)
        except ConfigError:
            continue
        names.append(writer.name)
    made = runs.run(source, folder, scheme=scheme, dialect=",".join(names), **DATA)
    return {name: made.folder / name for name in names} if len(names) > 1 else dict.fromkeys(names, made.folder)


def _pairs(names: list[str]) -> Iterable[tuple[str, str]]:
    """Ordered pairs of dialects, each once on either side."""
    return zip(names, names[1:] + names[:1], strict=True) if len(names) > 1 else ()


@pytest.mark.parametrize("scheme", catalog.files("schemes"))
def test_every_scheme_between_all_dialects_that_hold_it(tmp_path, scheme, llama):
    """What is converted is what the job itself writes in that dialect, and the way back gives the same bytes."""
    try:
        made = held(scheme, llama, tmp_path / "made")
    except (ModelError, DataError) as error:
        pytest.skip(f"not for this model: {error}")
    for before, after in _pairs(list(made)):
        there, back = tmp_path / f"{before}-{after}", tmp_path / f"{before}-{after}-{before}"
        summary = converted(made[before], after, there)
        assert (summary["from"], summary["to"], summary["directory"]) == (before, after, str(there))
        check_equal(made[after], there)
        check_equal(made[before], there)
        assert verify.directory(str(there), str(llama), hashes=True)
        if len(made) == 2 and runs.same_files(made[after], there):
            continue  # the other pair is the way back
        converted(there, before, back)
        check_equal(made[before], back)
        if not summary["one_ulp_off"]:
            assert runs.same_files(made[before], back)
    for name in set(dialects.names()) - set(made):
        for before in list(made)[:1]:
            with pytest.raises((ModelError, UsageError)) as refused:
                converted(made[before], name, tmp_path / "refused")
            assert not (tmp_path / "refused").exists()
            assert refused.value.code == (4 if isinstance(refused.value, ModelError) else 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return runs.run("demo", tmp_path_factory.mktemp("made") / "out", scheme="mxfp4").folder


@pytest.fixture(scope="module")
def other(made) -> str:
    """A dialect that holds the plan and is not the one it is written in."""
    return next(
        name for name in held_by(made) if name != Source.open(str(made)).config["quantization_config"]["quant_method"]
    )


def held_by(folder: Path) -> list[str]:
    checkpoint = Checkpoint(Source.open(str(folder)))
    plan = checkpoint.plan(checkpoint.layout)
    return [w.name for w in dialects.writers() if w.reader is not None and not w.refusals(plan)]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", runs.FUSED])
def test_experts(tmp_path, family):
    source = runs.build(family, tmp_path / "source")
    options: dict[str, Any] = {"scheme": "mxfp4", "exclude": ["*layers.0.*experts.1.*"], "target": "none"}
    one = runs.run(source, tmp_path / "one", dialect="compressed-tensors", **options).folder
    summary = converted(one, "quark", tmp_path / "two")
    converted(tmp_path / "two", "compressed-tensors", tmp_path / "three")
    assert summary["weights"] > 8 and summary["one_ulp_off"] == []
    assert runs.same_files(one, tmp_path / "three")
    check_equal(one, tmp_path / "two")


def test_static_inputs_and_a_cache(tmp_path):
    one = runs.run("demo", tmp_path / "one", scheme="fp8", kv_cache="fp8", dialect="compressed-tensors", **DATA).folder
    converted(one, "quark", tmp_path / "two")
    assert Source.open(str(tmp_path / "two")).config["quantization_config"]["quant_method"] == "quark"
    check_equal(one, tmp_path / "two")
    converted(tmp_path / "two", "compressed-tensors", tmp_path / "three")
    assert runs.same_files(one, tmp_path / "three")


def test_scales_of_keys_and_values_are_not_joined(tmp_path):
    """One linear makes both; format quark has one scale for its output. One of two values of a cache would be wrong."""
    source = runs.build("dbrx", tmp_path / "m")
    made = runs.run(source, tmp_path / "one", scheme="fp8", kv_cache="fp8", dialect="compressed-tensors", **DATA).folder
    (keys, *_), (values, *_) = (
        [(name, float(t)) for name, t in runs.read_all(made).items() if name.endswith(kind)]
        for kind in ("k_scale", "v_scale")
    )
    module = keys[0].rpartition(".")[0]
    assert values[0] == f"{module}.v_scale" and keys[1] != values[1]
    with pytest.raises(ModelError, match=r"the scale of [kv] would be another.*one scale") as error:
        converted(made, "quark", tmp_path / "two")
    assert error.value.where == module and error.value.kind == "E-CONVERT-CANNOT"
    assert not (tmp_path / "two").exists()


def test_the_rest_of_the_directory(tmp_path, other):
    """Side files, report and recipe go with it; of the old dialect's description nothing is left."""
    source = runs.build("llama", tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# it\n")
    one = runs.run(source, tmp_path / "one", scheme="mxfp4").folder
    two = tmp_path / "two"
    converted(one, other, two)
    files = {path.relative_to(two).as_posix() for path in two.rglob("*") if path.is_file()}
    before = {path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file()}
    assert before - files == {"quark/quark.log"}
    assert (two / "notes" / "licence.txt").read_bytes() == b"as it is\r\n\xff"
    assert (
        json.loads((two / "config.json").read_text())["quantization_config"]["quant_method"]
        != (json.loads((one / "config.json").read_text())["quantization_config"]["quant_method"])
    )
    report = json.loads((two / "quark" / "report.json").read_text())
    assert report["dialect"]["name"] == other and report["checks"]
    stored = {}
    for file in two.glob("*.safetensors"):
        stored |= load_file(file)
    assert sum(row["bytes"] for row in report["tensors"]) == sum(tensor.nbytes for tensor in stored.values())
    assert sum(row["bytes"] for row in report["parts"]) == report["size"]["output_bytes"]
    again = runs.run(source, tmp_path / "again", recipe=str(two / "quark" / "recipe.yaml"))
    assert runs.same_files(again.folder, two)
    card = (two / "README.md").read_text()
    assert "base_model: source" in card and "license: mit" in card
    assert not partial_path(two).exists() and not (tmp_path / "two.partial.state").exists()


def test_a_dialect_that_cannot_say_it_is_refused_before_the_work(tmp_path):
    made = runs.run("demo", tmp_path / "made", scheme="mxfp4", algorithm="hadamard").folder
    with pytest.raises(ModelError, match=r"cannot hold this checkpoint.*rotated while the model runs"):
        converted(made, "quark", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not partial_path(tmp_path / "out").exists()


def test_codes_that_would_not_be_kept_are_named(tmp_path, made, other, monkeypatch):
    """A writer that loses one bit of one weight leaves nothing behind."""
    writer = dialects.writer(other)
    tensors = type(writer).tensors
    name = "model.layers.2.mlp.up_proj"

    def lossy(self: Any, target: Any, quantized: Any, *rest: Any) -> Any:
        if target.name == name:
            quantized.codes.view(torch.uint8)[3, 5] ^= 1
        return tensors(self, target, quantized, *rest)

    monkeypatch.setattr(type(writer), "tensors", lossy)
    decode = converting.Checkpoint.decode
    monkeypatch.setattr(converting.Checkpoint, "decode", lambda self, stored: _copied(decode(self, stored)))
    real = converting._lost
    monkeypatch.setattr(converting, "_lost", lambda ours, theirs: real(kept.pop(), theirs))
    with pytest.raises(ModelError, match="does not keep its codes") as refused:
        converted(made, other, tmp_path / "out")
    assert refused.value.where == name
    assert not (tmp_path / "out").exists() and not partial_path(tmp_path / "out").exists()


kept: list[Any] = []


def _copied(decoded: Any) -> Any:
    from copy import deepcopy

    kept[:] = [deepcopy(decoded)]
    return decoded


def test_a_killed_conversion_goes_on(tmp_path, made, other):
    output = tmp_path / "out"
    runs.killed(2, lambda: converted(made, other, output))
    assert partial_path(output).is_dir() and not output.exists()
    stamp = next(partial_path(output).glob("model-embed*")).stat().st_mtime_ns
    converted(made, other, output)
    assert next(output.glob("model-embed*")).stat().st_mtime_ns == stamp
    converted(made, other, tmp_path / "whole")
    assert runs.same_files(output, tmp_path / "whole")
    assert verify.directory(str(output), hashes=True)


def test_what_is_refused(tmp_path, made, other):
    with pytest.raises(ModelError, match="not quantized"):
        converted(EMBEDDED, other, tmp_path / "out")
    with pytest.raises(UsageError, match="unknown checkpoint format") as unknown:
        converted(made, "nope", tmp_path / "out")
    assert unknown.value.where == "--to"
    with pytest.raises(UsageError, match="already"):
        converted(made, Source.open(str(made)).config["quantization_config"]["quant_method"], tmp_path / "out")
    shutil.copytree(made, tmp_path / "there")
    with pytest.raises(UsageError, match="exists"):
        converted(made, other, tmp_path / "there")
    with pytest.raises(UsageError, match="is inside the model's directory"):
        converted(made, other, made / "out")


def test_a_block_that_config_json_does_not_count_is_refused(tmp_path, made, other):
    """As quantize, eval and verify do: no server would read the block from the new directory either."""
    model = shutil.copytree(made, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is one block too many: config\.json has "):
        converted(model, other, tmp_path / "out")


def test_overwriting(tmp_path, made, other):
    shutil.copytree(made, tmp_path / "there")
    converting.convert(Source.open(str(made)), other, tmp_path / "there", overwrite=True)
    check_equal(made, tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
