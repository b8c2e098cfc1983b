"""Folders that hold something else than a model, and the model's class asked for any scheme."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import ModelError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 2471645608\n".format("4d" * 32)


@pytest.mark.parametrize("names", [["model.safetensors"], ["tokenizer.json"], ["config.json", "model.safetensors"]])
def test_pointers_of_git_lfs(names: list[str], tmp_path: Path) -> None:
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    for name in names:
        (model / name).write_text(POINTER)
    with pytest.raises(ModelError, match="holds git-LFS pointers instead of the files") as caught:
        Source.open(str(model))
    assert all(name in caught.value.what for name in names) and "git lfs pull" in caught.value.hint


@pytest.mark.parametrize("config", [True, False])
def test_folders_of_gguf_files(config: bool, tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF\3\0\0\0")
    if config:
        shutil.copy(EMBEDDED / "config.json", tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"only model-Q4_K_M\.gguf") as caught:
        Source.open(str(tmp_path))
    assert caught.value.code == 4 and "made from" in caught.value.hint


def test_a_gguf_beside_a_model_is_none_of_our_business(tmp_path: Path) -> None:
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    (model / "model-Q4_K_M.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert Source.open(str(model)).headers
