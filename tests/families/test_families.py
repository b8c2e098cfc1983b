"""Every family, scheme and dialect from source to measured checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quarkcli.disk import verify
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.evaluation.run import evaluate
from quarkcli.events import silent
from tests import runs
from tests.products import each_once

from .conftest import NAMES

# KL per token, in nats, of these random models: about three times what each scheme costs them.
LIMITS = {"nvfp4": 0.05, "fp8": 0.006, "mxfp4": 0.08, "int4_wo_128": 0.04, "gptq": 0.01}


def options(kind: str, text: Path) -> dict:
    scheme = "int4_wo_128" if kind == "gptq" else kind
    algorithm = {"algorithm": "gptq"} if kind == "gptq" else {}
    data = runs.data(text, 24) if kind == "gptq" or kind in runs.CALIBRATED else {}
    return {"scheme": scheme, **algorithm, **data}


@pytest.mark.parametrize(("name", "kind"), each_once(NAMES, list(LIMITS)))
def test_a_family_in_both_dialects(
    name: str, kind: str, sources: dict[str, Path], text: Path, page: Path, tmp_path: Path
) -> None:
    source = sources[name]
    both = []
    for dialect in ("compressed-tensors", "quark"):
        made = runs.run(source, tmp_path / dialect, dialect=dialect, **options(kind, text))
        check_report(made, experts="llama" not in name and name != "qwen3")
        check_files(made)
        checks = verify.directory(str(made.folder), str(source))
        assert checks[-1] == f"all {len(runs.read_all(source))} tensors of the original model are there"
        both.append(made)
    losses = [loss(made, page) for made in (both if kind == "nvfp4" else both[:1])]
    assert 0 < losses[0] < LIMITS[kind]
    assert losses[-1] == pytest.approx(losses[0], rel=1e-3)
    check_same_numbers(*both)


def loss(made: runs.Made, page: Path) -> float:
    options = {"text": str(page), "window": 64, "device": "cpu", "tell": silent}
    result = evaluate(str(made.folder), baseline=str(made.source), **options)
    assert result["tokens"] == 63 * (700 // 64)
    return result["kl"]


def check_same_numbers(one: runs.Made, other: runs.Made) -> None:
    """Two layouts of the same codes and scales; a global scale stored as a reciprocal may differ in its last bit."""
    first, second = (Checkpoint(Source.open(str(made.folder))) for made in (one, other))
    assert first.view.targets.keys() == second.view.targets.keys()
    for name, stored in first.view.targets.items():
        one, other = first.decode(stored), second.decode(second.view.targets[name])
        (ours, ours_input), (theirs, theirs_input) = (one.weight, one.input), (other.weight, other.input)
        assert runs.same_bytes(ours.codes, theirs.codes), name
        assert runs.same_bytes(ours.params.scale, theirs.params.scale), name
        torch.testing.assert_close(ours.params.global_scale, theirs.params.global_scale, rtol=2**-22, atol=0)
        torch.testing.assert_close(ours_input, theirs_input, rtol=2**-22, atol=0)


def check_report(made: runs.Made, experts: bool) -> None:
    found = made.report["experts"]
    assert found["share_quantized"] == (1.0 if experts else None)
    # 2 layers, 4 experts, 3 projections of 256 x 128
    assert found["parameters"] == found["quantized_parameters"] == (2 * 4 * 3 * 256 * 128 if experts else 0)
    assert runs.warnings_but(runs.UNSERVED, made) == []
    assert len(made.report["warnings"]) == (made.report["model"]["family"] == "gpt_oss")


def check_files(made: runs.Made) -> None:
    """Sizes as forecast, kept tensors byte for byte, config and side files as they were."""
    sizes = [file.stat().st_size for file in made.folder.glob("*.safetensors")]
    assert made.prepared.forecast.output_bytes == sum(sizes) == made.report["size"]["output_bytes"]
    assert not made.folder.with_name(f"{made.folder.name}.partial").exists()
    written, before = runs.read_all(made.folder), runs.read_all(made.source)
    index = json.loads((made.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(written)
    for name in made.report["kept"]:
        assert runs.same_bytes(written[name], before[name]), name
    check_accounts(made, written, before)
    check_config(made)


def check_accounts(made: runs.Made, written: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    """A source tensor is kept, split into experts, or replaced by codes with a scale; nothing else is written."""
    kept, split = made.report["kept"], made.report["split"]
    packed = {name.removesuffix(".weight_scale") for name in written if name.endswith(".weight_scale")}
    for name in before:
        module = name.removesuffix(".weight")
        ways = [name in kept, name in split, module in packed]
        assert sum(ways) == 1, name
    for name in split:
        stem = name.rpartition(".experts.")[0]
        assert sum(module.startswith(f"{stem}.experts.") for module in packed) == 4 * 3
    assert all(name in kept or name.rpartition(".")[0] in packed for name in written)


def check_config(made: runs.Made) -> None:
    text = (made.folder / "config.json").read_text()
    source = (made.source / "config.json").read_text()
    config = json.loads(text)
    assert list(config) == [*json.loads(source), "quantization_config"]
    own = config.pop("quantization_config")
    assert json.loads((made.folder / "quantization_config.json").read_text()) == own
    assert json.dumps(config, indent=2) + "\n" == source  # word for word, as transformers wrote it
    for file in made.source.rglob("*"):
        name = file.relative_to(made.source)
        if file.is_dir() or file.suffix == ".safetensors" or file.name == "config.json":
            continue
        copy = made.folder / ("quark/source_README.md" if file.name == "README.md" else name)
        assert copy.read_bytes() == file.read_bytes(), name
