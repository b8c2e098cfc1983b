"""The benchmark of the kernels runs, at a size that measures nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import kernels

from .interpreter import Interpreter


def check(lines: list[str]) -> None:
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {name}" for name in kernels.NAMES]


def lines() -> list[str]:
    return list(kernels.table(2, 64, "cpu", 1))


def test_it_runs_under_the_interpreter(interpreter: Interpreter) -> None:
    check(interpreter.call(lines))


@pytest.mark.slow
def test_its_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.bench.kernels", "--device", "cpu", "--rows", "2", "--cols", "64",
         "--repeats", "1"],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    check(done.stdout.splitlines())
