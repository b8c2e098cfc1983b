"""The command line in this process: exit code, stdout and stderr apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from quarkcli.cli import main

HUSHED = (
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
    "TQDM_DISABLE",
    "TRANSFORMERS_VERBOSITY",
)


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Quark = Callable[..., Answer]


@pytest.fixture
def quark(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Quark:
    """`quark("plan", "--model", "demo")`, in an empty directory, offline and without colour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUARK_HOME", str(tmp_path / "home"))
    for name in HUSHED:
        monkeypatch.setenv(name, "1" if name != "TRANSFORMERS_VERBOSITY" else "error")  # restored afterwards
    for name in ("NO_COLOR", "FORCE_COLOR", "QUARK_DEBUG", "CI"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> Answer:
        capsys.readouterr()
        code = main.main(arguments)
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished checkpoint: the embedded model in mxfp4."""
    output = tmp_path_factory.mktemp("made") / "demo-mxfp4"
    code = main.main(["quantize", "--model", "demo", "--scheme", "mxfp4", "-o", str(output), "-q"])
    assert code == 0
    return output
