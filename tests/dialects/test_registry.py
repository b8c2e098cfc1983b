"""Dialects are found by their files, `auto` chooses as it is written down, and a member may only write or only read."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quarkcli import dialects
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import ConfigError, ModelError, UsageError
from quarkcli.numerics.packing import pack_bits
from quarkcli.numerics.quantize import dequantize, quantize
from tests import runs
from tests.dialects import auto
from tests.dialects.plans import MXFP4, Module, plan
from tests.golden import sources

TOY = '''
"""Holds everything, and says that everybody loads it."""

from tests.plain import Plain, PlainReader


class ToyReader(PlainReader):
    name = quant_method = "aaa"


class Toy(Plain):
    name = "aaa"
    reader = {reader}
    preferences = {preferences}

    def loaders(self, plan):
        return {{"vllm", "transformers"}}

    def config(self, plan):
        return {{**super().config(plan), "quant_method": "aaa"}}
'''
WRITTEN = [member.name for member in dialects.writers()]
READ = [member.name for member in dialects.readers()]
WRITES, READS = "\n\nWRITER = Toy()\n", "\n\nREADER = ToyReader()\n"
FUSED_READER = '''
"""gpt-oss as it is published: 4-bit blocks of all experts in one tensor, gate and up row by row in turn."""

from quarkcli.dialects.base import Decoded, Reader, StoredTarget, StoredView
from quarkcli.family import WeightView
from tests.dialects.plans import MXFP4

BLOCKS, SCALES = "_blocks", "_scales"


class Blocks(Reader):
    name = "aaa"

    def matches(self, config, headers):
        return any(name.endswith(BLOCKS) for name in headers)

    def view(self, config, headers):
        view = StoredView()
        for name, header in headers.items():
            fused = name.removesuffix(BLOCKS)
            prefix, _, leaf = fused.rpartition(".")
            projections = ["down_proj"] if leaf == "down_proj" else ["gate_proj", "up_proj"]
            for expert in range(header.shape[0] if fused != name else 0):
                for start, projection in enumerate(projections):
                    rows = (start, header.shape[1], len(projections))
                    shape = (header.shape[1] // len(projections), header.shape[2] * 32)
                    view.targets[f"{prefix}.{expert}.{projection}"] = StoredTarget(
                        f"{prefix}.{expert}.{projection}", MXFP4, None, shape, (fused + BLOCKS, fused + SCALES),
                        places={end: WeightView(fused + end, expert, rows=rows) for end in (BLOCKS, SCALES)},
                    )
        return view

    def decode(self, stored, tensors):
        from quarkcli.numerics.packing import unpack_bits
        from quarkcli.numerics.quantize import QParams, Quantized

        own = stored.own(tensors)
        codes = own[BLOCKS].reshape(stored.shape[0], -1).contiguous()
        return Decoded(Quantized(unpack_bits(codes, 4, stored.shape[1]), QParams(own[SCALES].contiguous())))


READER = Blocks()
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return auto.build(tmp_path_factory.mktemp("models"))


@pytest.fixture
def drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a file beside the other dialects, or another in its place."""
    folder = tmp_path / "members"
    folder.mkdir()
    monkeypatch.setattr(dialects, "__path__", [*dialects.__path__, str(folder)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a second file of the same second would not be seen

    def put(code: str, name: str = "aaa") -> None:
        (folder / f"{name}.py").write_text(code)
        importlib.invalidate_caches()
        sys.modules.pop(f"quarkcli.dialects.{name}", None)

    yield put
    for file in folder.glob("*.py"):
        sys.modules.pop(f"quarkcli.dialects.{file.stem}", None)
        vars(dialects).pop(file.stem, None)


def toy(*, reads: bool = True, preferences: str = "{}") -> str:
    return TOY.format(reader="ToyReader()" if reads else "None", preferences=preferences)


# --- what auto chooses


def test_what_auto_chooses_is_pinned(models: dict[str, str]) -> None:
    assert auto.rows(models) == auto.read(), "python -m tests.dialects.auto rewrites it; the commit says why"


def test_the_pinned_choices_are_of_every_kind() -> None:
    assert {tuple(row) for row in auto.read().values()} >= {
        ("compressed-tensors", "auto: loads in vLLM and transformers"),
        ("compressed-tensors", "auto: loads in vLLM only"),
        ("quark", "auto: loads in vLLM only"),
        ("quark", "auto: no server loads it; for measurements only"),
    }


@pytest.mark.parametrize("code", [toy() + WRITES + READS, toy(reads=False) + WRITES, toy() + READS])
def test_a_new_file_changes_nobodys_default(code: str, drop: Callable[..., None], models: dict[str, str]) -> None:
    """The first of the alphabet, which holds everything and which everybody loads."""
    drop(code)
    assert "aaa" in dialects.names()
    assert auto.rows(models) == auto.read()


def test_preference_is_of_kinds_of_weights(drop: Callable[..., None]) -> None:
    drop(toy(preferences='{"mxfp4": 30}') + WRITES)
    assert auto.row("demo", "mxfp4") == ["aaa", "auto: loads in vLLM and transformers"]
    assert auto.row("demo", "fp8") == auto.read()["demo fp8"]
    drop(toy(preferences='{"any": 30, "mxfp4": 15}') + WRITES)
    assert auto.row("demo", "mxfp4") == auto.read()["demo mxfp4"]  # below the first, which vLLM and transformers load
    assert auto.row("demo", "fp8")[0] == "aaa"


def test_what_no_other_can_hold(drop: Callable[..., None]) -> None:
    made = plan([Module("m", (64, 48), "o")], lambda module: (MXFP4, None))
    with pytest.raises(
        ConfigError, match=r"no checkpoint format can hold this plan: .*compressed-tensors: m: 48 input features"
    ):
        dialects.choose("auto", made)
    drop(toy() + WRITES)
    assert dialects.choose("auto", made)[0].name == "aaa"


def test_names_are_those_of_the_files() -> None:
    members = [*dialects.writers(), *dialects.readers()]
    assert {member.name for member in members} == set(dialects.names()) >= {"compressed-tensors", "quark"}
    for writer in dialects.writers():
        assert writer.reader in (None, *dialects.readers())
        assert dialects.writer(writer.name.replace("-", "_")) is writer


def test_no_two_writers_are_preferred_alike() -> None:
    """A tie would be decided by the alphabet. Those without a preference are taken where nothing else holds a plan."""
    made = plan([Module("m", (64, 64), "o")], lambda module: (MXFP4, None))
    preferences = [writer.preference(made) for writer in dialects.writers() if writer.preference(made)]
    assert len(preferences) == len(set(preferences)) >= 2


# --- members


def test_a_dialect_that_is_written_and_read(drop: Callable[..., None], tmp_path: Path) -> None:
    """Calibrated: every block reads what the ones below decode to."""
    drop(toy() + WRITES + READS)
    made = runs.run(
        "demo", tmp_path / "out", scheme="nvfp4", dialect="aaa", calib_data="builtin", calib_samples=2, calib_seqlen=16
    )
    assert made.report["dialect"]["name"] == "aaa"
    checkpoint = Checkpoint(Source.open(str(made.folder)))
    assert checkpoint.reader is not None and checkpoint.reader.name == "aaa"
    assert set(checkpoint.view.targets) == {target.name for target in made.prepared.plan.quantized()}
    drop(toy() + READS)
    with pytest.raises(UsageError, match="quark can read checkpoint format 'aaa' but not write it") as caught:
        dialects.writer("aaa")
    assert caught.value.hint == f"use one of: {', '.join(WRITTEN)}, auto"
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(Checkpoint(Source.open(str(made.folder))).weight(name), checkpoint.weight(name))


def test_a_dialect_that_is_only_written(drop: Callable[..., None], tmp_path: Path) -> None:
    drop(toy(reads=False) + WRITES)
    made = runs.run("demo", tmp_path / "out", scheme="mxfp4", dialect="aaa")
    assert "scales were not read back: quark cannot read checkpoint format aaa" in made.report["checks"]
    assert json.loads((made.folder / "config.json").read_text())["quantization_config"]["quant_method"] == "aaa"
    with pytest.raises(ModelError, match="quantized with 'aaa', which quark cannot read") as caught:
        Checkpoint(Source.open(str(made.folder)))
    assert caught.value.hint == f"use one of these methods: {', '.join(READ)}"
    with pytest.raises(ConfigError, match="cannot be read back, and calibration continues with the weights read back"):
        runs.prepare("demo", scheme="fp8", dialect="aaa", calib_data="builtin")


def test_a_checkpoint_that_two_readers_take_for_theirs(drop: Callable[..., None]) -> None:
    drop(toy() + READS)
    drop(toy() + READS.replace("ToyReader()", "ToyReader()\nREADER.name = 'bbb'"), "bbb")
    with pytest.raises(ModelError, match="is quantized with 'aaa', a name that several checkpoint formats use"):
        dialects.reader({"quant_method": "aaa"}, {})
    assert dialects.reader({}, {}) is None


# --- files


FILES = """

def files(self, plan):
    return {"config.json": {"quantization_config": {"quant_method": "aaa"}}, "hf_quant_config.json": {"a": 1}}

Toy.files = files
"""


def test_a_writer_says_which_files_describe_a_checkpoint(drop: Callable[..., None], tmp_path: Path) -> None:
    drop(toy(reads=False) + FILES + WRITES)
    source = tmp_path / "model"
    shutil.copytree(EMBEDDED, source)
    (source / "hf_quant_config.json").write_text("of another checkpoint")
    made = runs.run(source, tmp_path / "out", scheme="mxfp4", dialect="aaa")
    config = json.loads((made.folder / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "aaa"}
    assert config == json.loads((source / "config.json").read_text())
    assert json.loads((made.folder / "hf_quant_config.json").read_text()) == {"a": 1}
    assert not (made.folder / "quantization_config.json").exists()


# --- weights that lie in a larger tensor


def test_a_reader_of_one_tensor_for_all_experts(
    drop: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's fused tensors come back as they were rounded; each packed tensor is read once for all experts."""
    drop(FUSED_READER)
    source = sources.build("fused", tmp_path / "model")
    tensors = runs.read_all(source)
    wanted: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        turned = tensors.pop(name).mT.contiguous()  # [experts, out, in]
        made = [quantize(expert, MXFP4) for expert in turned]
        wanted[name] = torch.stack([dequantize(one, MXFP4) for one in made]).mT.to(torch.bfloat16)
        codes = torch.stack([pack_bits(one.codes, 4) for one in made])
        tensors[f"{name}_blocks"] = codes.reshape(*turned.shape[:2], -1, 16)
        tensors[f"{name}_scales"] = torch.stack([one.params.scale for one in made])
    save_file(tensors, source / "model.safetensors")

    checkpoint = Checkpoint(Source.open(str(source)))
    assert checkpoint.quantized and len(wanted) == 2 * sources.LAYERS
    kept = {name for name in tensors if not name.endswith(("_blocks", "_scales"))}
    assert set(checkpoint.headers) == kept | set(wanted)
    counted: list[str] = []
    read_many = Source.read_many
    monkeypatch.setattr(Source, "read_many", lambda self, names: counted.extend(names) or read_many(self, names))
    for name, tensor in checkpoint.read_many(wanted).items():
        assert torch.equal(tensor, wanted[name]), name
    assert sorted(counted) == sorted(f"{name}{end}" for name in wanted for end in ("_blocks", "_scales"))
