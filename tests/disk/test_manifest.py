"""The manifest: what verify compares with it, and what of a replaced checkpoint is ours to remove."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quarkcli.cli import main
from quarkcli.disk import manifest
from quarkcli.errors import CheckError, ResourceError
from quarkcli.job import run as job
from quarkcli.job.options import Options


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "out"
    job.run(Options(model="demo", scheme="mxfp4", output=output))
    return output


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / manifest.MANIFEST
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


BLOCK = "model-block-00001.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "codes": (lambda f: flip(f / BLOCK, -1), f"1 files have other bytes than in the manifest: {BLOCK}"),
    "header": (lambda f: flip(f / BLOCK, 40), BLOCK),
    "longer": (lambda f: (f / "tokenizer.json").write_bytes(b"x"), "another size than in the manifest: tokenizer.json"),
    "lost": (lambda f: (f / "generation_config.json").unlink(), "missing: generation_config.json"),
    "folder": (lambda f: [(f / "README.md").unlink(), (f / "README.md").mkdir()], "missing: README.md"),
    "no object": (lambda f: (f / manifest.MANIFEST).write_text("[]"), "the manifest does not list any files"),
    "no JSON": (lambda f: (f / manifest.MANIFEST).write_bytes(b"\xff"), "cannot be read"),
    "outside": (lambda f: edit(f, lambda m: m["files"].update({"../x": "0"})), "the manifest does not list any files"),
    "absolute": (
        lambda f: edit(f, lambda m: m["files"].update({"/dev/zero": "0"})),
        "the manifest does not list any files",
    ),
    "numbers": (
        lambda f: edit(f, lambda m: m["sizes"].update({"config.json": "9"})),
        "the manifest does not list any files",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds_what_differs(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "files have the sizes and headers of the manifest" in out
    assert "files have the hashes of the manifest" in out
    change, text = DAMAGES[damage]
    change(folder)
    assert main.main(["verify", str(folder)]) == 8
    assert text in capsys.readouterr().err


def test_everything_that_is_wrong_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the files hold comes first, then what the manifest knows of them: one line each."""
    path = folder / BLOCK
    tensors = load_file(path)
    norm = next(name for name in tensors if name.endswith("input_layernorm.weight"))
    tensors[norm][0] = float("nan")
    tensors[next(name for name in tensors if name.endswith("gate_proj.weight_scale"))][:] = 255
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "README.md").unlink()
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert main.main(["verify", str(folder)]) == 8
    first, *also, hint = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {norm}: NaN or inf in a tensor that is not quantized")
    assert [line.partition(": ")[2].rpartition(":")[0] for line in also] == [
        "1 modules have a scale that is zero, negative, infinite, NaN or missing",
        "1 files have another size than in the manifest",
        "1 files have other bytes than in the manifest",
        "1 files of the manifest are missing",
    ]
    assert hint == "hint: repair the original model, or use --on-nonfinite keep to accept it"


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_a_damaged_length_of_a_header(folder: Path, length: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / BLOCK
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert main.main(["verify", str(folder)]) == 8
    err = capsys.readouterr().err
    assert f"also: 1 weight files have another header than in the manifest: {BLOCK}" in err


def test_hashes_are_compared_up_to_a_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(folder / BLOCK, -1)
    monkeypatch.setattr(manifest, "HASH_LIMIT", 1_000_000)
    assert main.main(["verify", str(folder)]) == 0
    assert "ok: hashes not compared (2.9 MB of files); --hashes compares" in capsys.readouterr().out
    assert main.main(["verify", str(folder), "--hashes"]) == 8
    monkeypatch.undo()
    assert main.main(["verify", str(folder), "--no-hashes"]) == 0
    assert main.main(["verify", str(folder)]) == 8
    assert manifest._shown(412_000_000_000) == "412 GB"


def test_headers_are_compared_without_hashes(folder: Path) -> None:
    listed = manifest.read(folder)
    assert listed is not None
    path = folder / BLOCK
    path.write_bytes(path.read_bytes().replace(b"_packed", b"_packeb", 1))
    with pytest.raises(CheckError, match=f"another header than in the manifest: {BLOCK}"):
        manifest.compare(folder, listed, hashes=False)


def test_what_was_added_is_mentioned(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    listed = manifest.read(folder)
    assert listed is not None
    assert manifest.compare(folder, listed)[-1] == "1 files are not in the manifest: notes.txt"


def test_a_checkpoint_without_a_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / manifest.MANIFEST).unlink()
    assert main.main(["verify", str(folder)]) == 0
    assert "no manifest" in capsys.readouterr().out
    assert main.main(["verify", str(folder), "--hashes"]) == 8


# ---- a checkpoint that was replaced


def test_a_checkpoint_is_removed_whole(folder: Path) -> None:
    assert manifest.remove_ours(folder) == []
    assert not folder.exists()


def test_what_somebody_added_or_changed_stays(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "thesis.tex").write_text("mine")
    (folder / "README.md").write_text("my own card")
    (folder / "link").symlink_to(folder / "sub")
    assert manifest.remove_ours(folder) == ["README.md", "link", "sub/thesis.tex"]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()) == [
        "README.md", "sub/thesis.tex",
    ]  # fmt: skip


@pytest.mark.parametrize("text", [None, "{}", "not JSON"])
def test_nothing_of_a_foreign_folder_is_removed(folder: Path, text: str | None) -> None:
    path = folder / manifest.MANIFEST
    path.unlink()
    if text is not None:
        path.write_text(text)
    before = sorted(folder.rglob("*"))
    assert BLOCK in manifest.remove_ours(folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("call", [1, 5, 14, 17, 18])
def test_an_interrupted_removal_is_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    count = iter(range(1, 100))

    def failing(real: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            if next(count) == call:
                raise OSError(5, "Input/output error")
            return real(*args, **kwargs)

        return function

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing(os.unlink))
        patch.setattr(os, "rmdir", failing(os.rmdir))
        with pytest.raises(OSError, match="Input/output"):
            manifest.remove_ours(folder)
    assert manifest.remove_ours(folder) == []
    assert not folder.exists()


def test_no_manifest_of_half_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("quark"):
            raise OSError(5, "Input/output error")
        return real(path)

    before = (folder / manifest.MANIFEST).read_bytes()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ResourceError, match="Input/output error"):
        manifest.write(folder, {}, {})
    assert (folder / manifest.MANIFEST).read_bytes() == before
