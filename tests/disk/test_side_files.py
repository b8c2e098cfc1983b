"""What is copied beside the weights, and what is not."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from quarkcli.cli import main
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.side_files import BROKEN, LIMIT, OUTSIDE, SideFiles, gather
from quarkcli.disk.source import Source
from quarkcli.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_SECRET"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model, and a file of the user's beside its folder."""
    shutil.copytree(EMBEDDED, tmp_path / "model")
    (tmp_path / "token").write_text(SECRET)
    return tmp_path / "model"


def gathered(model: Path) -> SideFiles:
    return gather(Source.open(str(model)))


def copied(model: Path) -> set[str]:
    return {path.as_posix() for path in gathered(model).copied}


EMBEDDED_FILES = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_what_is_copied(model: Path) -> None:
    kept = ["LICENSE", "chat_template.jinja", "sub/config.json", "sub/README.md", "state/lock", "sub/quark/x"]
    kept += ["sub/quantization_config.json"]
    dropped = "README.md .gitattributes .git/config sub/.cache/x.json original/params.json sub/original/x a.bin B.PT"
    dropped += " c.pth d.gguf e.onnx f.h5 g.msgpack sub/h.safetensors x.safetensors.index.json y.bin.index.json"
    dropped += " quantization_config.json i.ckpt j.pkl k.pickle l.joblib m.PKL"
    for name in kept + dropped.split():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("x")
    for name, size in [("large.json", LIMIT + 1), ("limit.json", LIMIT)]:
        (model / name).touch()
        os.truncate(model / name, size)
    found = gathered(model)
    assert list(found.copied) == sorted(Path(name) for name in {*kept, *EMBEDDED_FILES, "limit.json"})
    assert found.left_out == {"larger than 64 MiB": ["large.json"]}
    assert found.readme == model / "README.md"


def test_pickles_are_known_by_their_content(model: Path) -> None:
    (model / "ranks.dat").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(model / "state.dat", "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    with zipfile.ZipFile(model / "voices.zip", "w") as archive:
        archive.writestr("voice.wav", b"x")
    (model / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    found = gathered(model)
    assert {path.name for path in found.copied} == EMBEDDED_FILES | {"voices.zip", "broken.zip"}
    assert list(found.left_out.values()) == [["ranks.dat", "state.dat"]]


def test_an_adapter_is_left_out_with_its_config(model: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "lora/adapter_config.json", "adapter_notes.md"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    assert copied(model) == EMBEDDED_FILES | {"adapter_notes.md"}
    assert "adapter_config.json, adapter_model.safetensors, lora/adapter_config.json" in gathered(model).warnings()[0]


def test_links_are_followed_inside_the_folder_only(model: Path) -> None:
    (model / "LICENSE").write_text("free")
    (model / ".cache").mkdir()
    (model / ".cache" / "key").write_text(SECRET)
    (model / "weights.bin").write_text("x")
    (model / "sub").mkdir()
    (model / "loop").symlink_to(model / "loop")
    (model / "folder").symlink_to(model.parent)
    (model / "inner").symlink_to(model / "sub")
    for name, target in {
        "a-licence": "LICENSE", "sub/b-licence": "../LICENSE", "notes.txt": "../token", "README.md": "../token",
        "twice": "notes.txt", "absolute": "/etc/passwd", "gone": "nothing", "key": ".cache/key", "data": "weights.bin",
    }.items():  # fmt: skip
        (model / name).symlink_to(target)
    found = gathered(model)
    assert {path.as_posix() for path in found.copied} == EMBEDDED_FILES | {"LICENSE", "a-licence", "sub/b-licence"}
    assert found.readme is None
    assert found.left_out == {
        OUTSIDE: ["README.md", "absolute", "notes.txt", "twice"],
        BROKEN: ["gone", "loop"],
        "linked folders": ["folder", "inner"],
        "links to files that are not copied": ["data", "key"],
    }
    assert f"not copied to the output ({BROKEN}): gone, loop" in found.warnings()


def test_pipes_and_the_like(model: Path) -> None:
    os.mkfifo(model / "pipe")
    (model / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    (model / "quark").mkdir()
    (model / "zero").symlink_to("/dev/zero")
    found = gathered(model)
    assert {path.as_posix() for path in found.copied} == EMBEDDED_FILES
    names = [name for names in found.left_out.values() for name in names]
    assert sorted(names) == ["caf\\xe9.txt", "pipe", "quark", "zero"]


def snapshot(model: Path) -> Path:
    """The model as the hub's cache holds it."""
    repo = model.parent / "models--org--tiny"
    (repo / "blobs").mkdir(parents=True)
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for file in model.iterdir():
        file.rename(repo / "blobs" / file.name)
        (folder / file.name).symlink_to(Path("../../blobs") / file.name)
    return folder


def test_a_hub_snapshot_takes_from_its_blobs(model: Path) -> None:
    folder = snapshot(model)
    (folder / "notes.txt").symlink_to(model.parent / "token")
    (folder / "other.txt").symlink_to(folder.parents[1] / "refs")
    (folder.parents[1] / "refs").write_text(SECRET)
    found = gathered(folder)
    assert {path.as_posix() for path in found.copied} == EMBEDDED_FILES
    assert found.left_out == {OUTSIDE: ["notes.txt", "other.txt"]}


def test_blobs_that_are_a_link_are_not_the_hubs(model: Path) -> None:
    folder = snapshot(model)
    mine = model.parent / "mine"
    mine.mkdir()
    (mine / "token").write_text(SECRET)
    blobs = folder.parents[1] / "blobs"
    for file in list(folder.iterdir()):
        target = file.resolve()
        file.unlink()
        shutil.copy(target, file)
    shutil.rmtree(blobs)
    blobs.symlink_to(mine)
    (folder / "notes.txt").symlink_to("../../blobs/token")
    assert gathered(folder).left_out == {OUTSIDE: ["notes.txt"]}


def test_a_config_from_elsewhere_is_refused(model: Path) -> None:
    (model / "config.json").rename(model.parent / "config.json")
    (model / "config.json").symlink_to("../config.json")
    with pytest.raises(ModelError, match=r"config\.json: a link out of the model folder"):
        Source.open(str(model))


def test_weights_may_lie_on_another_disk(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "w.safetensors")
    (model / "model.safetensors").symlink_to("../w.safetensors")
    assert copied(model) == EMBEDDED_FILES
    assert gathered(model).left_out == {}


@pytest.mark.parametrize("name", ["README.md", "quantization_config.json", "model-embed.safetensors"])
def test_a_folder_where_a_file_is_written_is_refused(model: Path, name: str) -> None:
    (model / name).mkdir()
    with pytest.raises(ModelError, match=rf"{re.escape(name)}: is a folder") as caught:
        gathered(model)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["generation_config.json", "sub"])
def test_what_cannot_be_read_is_named(model: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Root may read everything, so that the refusal is put in by hand."""
    (model / "sub").mkdir()

    def refusing(real):  # type: ignore[no-untyped-def]
        def call(path, *args, **kwargs):  # type: ignore[no-untyped-def]
            if Path(os.fspath(path)).name == name:
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return real(path, *args, **kwargs)

        return call

    source = Source.open(str(model))
    monkeypatch.setattr(Path, "open", refusing(Path.open))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    with pytest.raises(ModelError, match=rf"{re.escape(name)}: cannot be read: Permission denied"):
        gather(source)


# ---- as a user sees it


def run(tmp_path: Path, *argv: str) -> int:
    return main.main(["quantize", "--model", str(tmp_path / "model"), *argv, "-o", str(tmp_path / "out"), "-q"])


def test_no_foreign_byte_reaches_the_checkpoint(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("notes.txt", "README.md", "vocab.txt"):
        (model / name).symlink_to(tmp_path / "token")
    (model / "state").mkdir()
    (model / "state" / "journal.json").write_text("{}")
    assert run(tmp_path, "--scheme", "mxfp4") == 0, capsys.readouterr().err
    out = tmp_path / "out"
    assert not [path for path in out.rglob("*") if path.is_file() and SECRET in path.read_text("latin-1")]
    assert (out / "state" / "journal.json").read_text() == "{}"
    report = (out / "quark" / "report.json").read_text()
    assert f"not copied to the output ({OUTSIDE}): README.md, notes.txt, vocab.txt" in report


@pytest.mark.parametrize("target", ["gone", "../tokenizer.json"])
def test_a_calibrated_run_needs_its_tokenizer(
    model: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (model / "tokenizer.json").symlink_to(target)
    assert run(tmp_path, "--scheme", "fp8", "--calib-data", "builtin") == 4
    assert f"error: {model}/tokenizer.json: a file of the tokenizer is among the links" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()
    assert run(tmp_path, "--scheme", "mxfp4") == 0


def test_gathering_needs_no_torch(model: Path) -> None:
    code = "import sys; from quarkcli.disk.source import Source; from quarkcli.disk.side_files import gather; "
    code += "gather(Source.open(sys.argv[1])); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(model)], check=False).returncode == 0
