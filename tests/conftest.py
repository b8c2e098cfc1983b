"""The surroundings of every test, what `tests/test_suite.py` reads of a session, and what its summary lists."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Forks

OWN_FAILURE = "fails without quark"  # of a model, in transformers alone; a property of the tests that expect it
COLLECTED = pytest.StashKey[list[pytest.Item]]()
HOME = pytest.StashKey[Path]()
OWN_FILES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_TOKEN", "XDG_CACHE_HOME")
SURROUNDINGS = {
    "OMP_NUM_THREADS": "1",  # tiny models are faster on one thread, and sums of one thread are the same everywhere
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # as ranks set it before they import torch, which prepared processes have done
}


def pytest_configure(config: pytest.Config) -> None:
    """One thread, no network and an empty home, before torch or huggingface_hub is imported; processes inherit them."""
    home = config.stash[HOME] = Path(tempfile.mkdtemp(prefix="quark-home-"))
    for name in OWN_FILES:
        os.environ.pop(name, None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    os.environ.update(SURROUNDINGS, HOME=str(home), QUARK_HOME=str(home / "quark"))
    os.fsync = lambda descriptor: None  # a test never loses power; that files are synced is asked by watching the calls


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[HOME], ignore_errors=True)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """One prepared process for all command lines of this session that need a process of their own."""
    started = Forks(tmp_path_factory.mktemp("home"))
    yield started
    started.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """Imports and ten thousand cases make millions of objects, and hardly a cycle."""
    gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before -m and -k take some away."""
    config.stash[COLLECTED] = list(items)


def pytest_collection_finish() -> None:
    """What is there by now stays, so nobody looks through it for garbage again."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The models that transformers cannot run, each once."""
    passed = terminalreporter.getreports("passed")
    found = sorted({value for report in passed for key, value in report.user_properties if key == OWN_FAILURE})
    if found:
        import transformers

        terminalreporter.section(
            f"fail in transformers {transformers.__version__} itself, and in quark with exit code 4"
        )
        for line in found:
            terminalreporter.write_line(line)
