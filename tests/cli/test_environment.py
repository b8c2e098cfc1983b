"""Homes, streams, names and signals as containers, CI and users make them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quarkcli.cli import main, output
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.recipe import catalog
from tests.forks import Forks, at

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
QUANTIZE = ("quantize", "--model", "demo", "--scheme", "mxfp4", "-q")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUARK_HOME", str(tmp_path / "home"))
    return tmp_path


def process(*argv: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own; `shell` is what a shell adds behind it."""
    code = "from quarkcli.cli.main import run\nrun()"
    line = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-c", code, *argv]
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)


# ---- homes


@pytest.mark.parametrize("kind", ["none", "not searchable", "relative"])
def test_a_home_that_is_not_ones_own(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Containers run under other users; what cannot be looked into has no recipes of ours."""
    monkeypatch.delenv("QUARK_HOME")
    if kind == "none":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    elif kind == "relative":
        monkeypatch.setenv("HOME", "")
    else:
        real = os.stat

        def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
            if ".config" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "stat", refuse)
    for argv in (["plan", "--model", "demo", "--scheme", "mxfp4"], ["schemes", "list"], ["recipes", "list"], ["env"]):
        assert main.main(argv) == 0


def test_a_folder_of_the_users_that_is_there_is_used(folder: Path) -> None:
    (folder / "home" / "schemes").mkdir(parents=True)
    (folder / "home" / "schemes" / "mine.yaml").write_text("weight: {dtype: int8}\n")
    assert "mine" in catalog.files("schemes")


# ---- names


@pytest.mark.parametrize(
    ("output", "code", "text"),
    [
        ("loop", 2, "is a link that leads to itself"),
        ("a" * 250, 2, "the name of the output is too long"),
        ("a" * 300, 2, "the name of the output is too long"),
        (f"{'a' * 300}/out", 2, "the name of a directory is too long"),
        ("/".join(["b" * 200] * 18), 2, "the name of the output is too long"),
        ("file/out", 2, "file is not a directory"),
        ("/proc/none/out", 6, " free"),
    ],
)
def test_outputs_that_cannot_be(folder: Path, output: str, code: int, text: str, capsys: Any) -> None:
    Path("loop").symlink_to("loop")
    Path("file").touch()
    assert main.main([*QUANTIZE, "-o", output]) == code
    error = capsys.readouterr().err
    assert "internal error" not in error
    assert text in error or (code == 6 and "writing failed" in error)
    assert {path.name for path in folder.iterdir()} == {"loop", "file"}


@pytest.mark.parametrize("output", [".", ".."])
def test_the_directory_of_the_command_is_no_output(folder: Path, output: str, capsys: Any) -> None:
    """Its shell would stand in a directory that is gone."""
    assert main.main([*QUANTIZE, "-o", output, "--overwrite"]) == 2
    assert "is the directory that you work in" in capsys.readouterr().err
    assert not [*folder.iterdir()] and not [*folder.parent.glob(f"{folder.name}.*")]


def test_a_tilde_that_no_shell_has_seen(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HOME", str(folder / "me"))
    assert main.main([*QUANTIZE, "--output=~/out"]) == 0
    capsys.readouterr()
    assert main.main(["verify", "~/out"]) == 0
    assert "no manifest" not in capsys.readouterr().out
    assert not (folder / "~").exists()


@pytest.mark.parametrize("flag", ["--model", "--recipe"])
def test_what_may_not_be_looked_at(folder: Path, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    real = os.stat

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith("closed/x"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    flags = {"--model": "demo", "--recipe": "mxfp4", flag: "closed/x"}
    code = main.main(["plan", *(word for pair in flags.items() for word in pair)])
    assert code == (5 if flag == "--model" else 6)
    assert "closed/x: " in capsys.readouterr().err


def test_a_model_in_a_folder_whose_name_is_no_text(folder: Path) -> None:
    model = folder / os.fsdecode(b"caf\xe9")
    shutil.copytree(EMBEDDED, model)
    out = folder / os.fsdecode(b"\xe9")
    assert main.main(["quantize", "--model", str(model), "--scheme", "mxfp4", "-q", "-o", str(out)]) == 0
    report = json.loads((out / "quark" / "report.json").read_text())
    assert os.fsencode(report["model"]["name"]) == b"caf\xe9"
    assert main.main(["verify", str(out), "--source", str(model)]) == 0
    assert main.main(["report", str(out)]) == 0
    assert main.main(["convert", str(out), "--to", "quark", "-o", "converted"]) == 0
    assert Path("converted/quark/report.json").is_file()


# ---- streams


FULL = "/dev/full"


def check_output(folder: Path) -> None:
    assert (folder / "out" / "quark" / "manifest.json").is_file()
    assert main.main(["verify", "out"]) == 0
    assert {path.name for path in folder.iterdir()} == {"out"}


@pytest.mark.parametrize("streams", [{1: None}, {2: None}, {1: None, 2: None}, {1: FULL}, {2: FULL}], ids=str)
def test_a_checkpoint_stands_whatever_the_streams_are(
    folder: Path, forks: Forks, streams: dict[int, str | None]
) -> None:
    done = forks(*QUANTIZE, "-o", "out", cwd=folder, streams=streams)
    assert done.code == 0, done.err
    check_output(folder)
    if streams == {1: FULL}:
        assert "warning: the answer could not be written to standard output: No space left on device" in done.err


def test_a_checkpoint_stands_where_an_interpreter_starts_without_streams(folder: Path) -> None:
    done = process(*QUANTIZE, "-o", "out", shell="<&- >&- 2>&-")
    assert done.returncode == 0
    check_output(folder)


def test_an_answer_that_is_lost_is_an_error() -> None:
    done = process("schemes", "list", shell=">/dev/full")
    assert done.returncode == 6
    assert "the answer could not be written to standard output" in done.stderr
    assert "Traceback" not in done.stderr
    assert process("schemes", "list", shell=">&-").returncode == 0


def test_a_name_that_is_no_text_is_printed_escaped(folder: Path, capsys: Any) -> None:
    output.reset([])
    output.note(os.fsdecode(b"caf\xe9"))
    assert capsys.readouterr().err == "caf\\udce9\n"


# ---- after the renaming


def test_what_fails_behind_a_checkpoint_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from quarkcli.cli import summary

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(summary, "lines", fail)
    assert main.main([*QUANTIZE[:-1], "-o", "out"]) == 0
    assert "warning: out is complete" in capsys.readouterr().err


def test_a_state_that_cannot_be_removed_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = shutil.rmtree

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith(".partial.state"):
            raise OSError(5, "Input/output error")
        real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        assert main.main([*QUANTIZE, "-o", "out"]) == 0
    assert (
        "warning: the checkpoint is complete, but some temporary files beside it were not deleted"
        in capsys.readouterr().err
    )
    assert (
        "the checkpoint is complete, but some temporary files beside it were not deleted"
        in (folder / "out" / "quark" / "quark.log").read_text()
    )
    assert (folder / "out.partial.state").is_dir()
    assert main.main([*QUANTIZE, "-o", "out"]) == 2  # it exists; what was left beside it is removed all the same
    assert {path.name for path in folder.iterdir()} == {"out"}


# ---- signals


@pytest.mark.parametrize("delay", ["0.0", "0.02"])
def test_two_interrupts_are_one(folder: Path, forks: Forks, delay: str) -> None:
    line = ["quantize", "--model", str(EMBEDDED), "--scheme", "fp8", "--calib-data", "builtin", "--calib-samples", "4"]
    hook = at("quarkcli.disk.journal.Journal.finish", after=True, what=f"SIGINT {delay} SIGINT")
    done = forks(*line, "--calib-seqlen", "32", "-o", "out", cwd=folder, hook=hook)
    assert done.code == 130
    assert "Traceback" not in done.err
    assert "stopped: interrupted" in done.err
    assert not (folder / "out").exists()


def test_a_name_that_the_locale_cannot_write(folder: Path) -> None:
    recipe = "schema: quark/recipe/1\nmetadata: {name: h\u00e9}\nquantize: {scheme: mxfp4}\n"
    (folder / "r.yaml").write_text(recipe, encoding="utf-8")
    code = "from quarkcli.cli.main import run; run()"
    command = [sys.executable, "-c", code, "plan", "--model", "demo", "--recipe", "r.yaml"]
    ascii_only = {**ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only, timeout=120, check=False)
    assert done.returncode == 6
    assert done.stderr.startswith("error: the locale's character set 'ascii' has no letters for '")
    assert "hint: set LC_ALL=C.UTF-8" in done.stderr and "E-SYSTEM" in done.stderr


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_launch_without_numbers(quark: Any, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    answer = quark(command, "--model", "demo", "--scheme", "mxfp4")
    assert answer.code == 2
    assert answer.err.startswith("error: RANK=0 and WORLD_SIZE=x do not give a process")


# ---- variables of libraries


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HF_HUB_OFFLINE", "banana", "HF_HUB_OFFLINE: 'banana' is neither on nor off"),
        ("HF_DATASETS_OFFLINE", "yep", "HF_DATASETS_OFFLINE: 'yep' is neither on nor off"),
        ("HF_HUB_DISABLE_TELEMETRY", "2", "HF_HUB_DISABLE_TELEMETRY: '2' is neither on nor off"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1s", "HF_HUB_DOWNLOAD_TIMEOUT: '1s' is not a number"),
        ("HF_HUB_ETAG_TIMEOUT", "", "HF_HUB_ETAG_TIMEOUT: '' is not a number"),
        ("HF_HUB_OFFLINE", "", ""), ("HF_HUB_OFFLINE", "True", ""), ("HF_HUB_DISABLE_XET", "off", ""),
        ("HF_HUB_ETAG_TIMEOUT", "9", ""), ("HF_DATASETS_OFFLINE", "n", ""),
    ],
)  # fmt: skip
def test_a_variable_that_a_library_would_misread(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A switch with an unknown word counted as off, and a number that is none ended as an internal error."""
    monkeypatch.setenv(name, value)
    assert main.main(["inspect", "demo"]) == (2 if said else 0)
    line = capsys.readouterr().err.partition("\n")[0]
    assert line == (f"error: {said} [E-FLAG-VALUE]" if said else "")
    for local in (["schemes", "show", "fp8"], ["data", "list"], ["plan", "--help"], ["--version"]):
        assert main.main(local) == 0


def test_a_short_word_is_on_for_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and our flags take y for on, huggingface_hub and datasets for off: the model was downloaded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "y")
    assert main.main(["inspect", "demo"]) == 0
    assert os.environ["HF_HUB_OFFLINE"] == "1"
