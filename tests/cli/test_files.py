"""Files that commands write because somebody asked for them: whole, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

FULL = OSError(errno.ENOSPC, "No space left on device")
WRITERS = {
    "convert": (("recipes", "convert", "NVFP4_DEFAULT_CFG"), "-o"),
    "copy": (("recipes", "copy", "nvfp4"), ""),
    "init": (("init", "demo", "--gpu", "h100", "--server", "vllm"), "-o"),
    "infer": (("models", "infer", "demo"), "-o"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_nothing_and_the_command_can_be_repeated(
    name: str, quark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, flag = WRITERS[name]
    command = (*words, *([flag] if flag else []), str(tmp_path / "new.yaml"))
    with monkeypatch.context() as full:

        def fsync(descriptor: int) -> None:
            raise FULL

        full.setattr(os, "fsync", fsync)
        code, _, err = quark(*command)
    assert code == 6
    assert "the disk is full" in err and "E-DISK-FULL" in err
    assert list(tmp_path.iterdir()) == []
    assert quark(*command).code == 0
    assert (tmp_path / "new.yaml").stat().st_size > 0
    assert "E-OUTPUT-FILE" in quark(*command).err


LONG = "\N{SNOWMAN}" * 84  # 252 bytes; a name on the way to it has more
SEARCH = ("search", "--model", "none", "--schemes", "fp8,nvfp4", "--budget", "5")
BEFORE = {
    "quantize": ("quantize", "--model", "none", "--scheme", "fp8", "-o"),
    "plan": ("plan", "--model", "none", "--scheme", "fp8", "-o"),
    "search": (*SEARCH, "-o"),
    "scores": (*SEARCH, "--scores"),
    "copy": ("recipes", "copy", "nvfp4"),
    "schema": ("recipes", "schema", "-o"),
    "recipe": ("recipes", "convert", "none", "-o"),
    "init": ("init", "none", "--gpu", "h100", "-o"),
    "infer": ("models", "infer", "none", "-o"),
    "compare": ("compare", "none", "none", "--html"),
    "report": ("report", "none", "--html"),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_name_that_is_too_long_is_said_before_anything_is_read(name: str, quark, tmp_path: Path) -> None:
    """There is no model, recipe or checkpoint of this name, which would be said otherwise."""
    code, _, err = quark(*BEFORE[name], LONG)
    assert code == 2, err
    assert "the name of the output is too long; at most 2" in err
    assert "E-OUTPUT-" in err and "hint: choose" in err
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_ends_like_a_directory_is_one(quark, tmp_path: Path) -> None:
    code, _, err = quark("recipes", "copy", "nvfp4", f"{tmp_path}/none/")
    assert code == 2
    assert f"{tmp_path}/none: there is no such directory" in err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "none").mkdir()
    assert quark("recipes", "copy", "nvfp4", f"{tmp_path}/none/").code == 0
    assert [file.name for file in (tmp_path / "none").iterdir()] == ["nvfp4.yaml"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "x"])
@pytest.mark.parametrize("command", [("compare", "demo", "demo"), ("verify", "demo", "--source", "demo")])
def test_a_limit_is_a_finite_number(command: tuple[str, ...], value: str, quark) -> None:
    code, _, err = quark(*command, f"--min-sqnr={value}")
    assert code == 2
    assert f"invalid value for '--min-sqnr': '{value}' is not a finite number" in err


def test_a_pipe_is_no_place_for_a_checkpoint(quark, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for more in ((), ("--overwrite",)):
        code, _, err = quark("quantize", "--model", "demo", "--scheme", "mxfp4", "-o", str(tmp_path / "pipe"), *more)
        assert code == 2
        assert "is neither a file nor a directory [E-OUTPUT-PLACE]" in err
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_a_file_holds_no_checkpoint(quark, tmp_path: Path) -> None:
    """Nor any other file; it was an error of the system, without a hint, and plan saw nothing."""
    (tmp_path / "file").touch()
    said = f"file/in/out: cannot be made, because {tmp_path / 'file'} is not a directory"
    assert said in quark("plan", "--model", "demo", "--scheme", "mxfp4", "-o", "file/in/out").err
    code, _, err = quark("recipes", "schema", "-o", "file/schema.json")
    assert (code, "error: file: is a file, not a directory [E-OUTPUT-FILE]" in err) == (2, True)
