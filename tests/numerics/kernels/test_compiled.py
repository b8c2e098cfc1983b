"""The kernels as compiled for real devices: they compile, and the instructions keep IEEE arithmetic."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow
KERNELS = {"ranges", "groups", "given", "decode"}


def assembly(target: str, cache: Path) -> list[tuple[str, str]]:
    """(kernel, assembly) of every launch."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.numerics.kernels.compiler", target], cwd=ROOT, capture_output=True, text=True,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # The folder that the project lies in may have any name, also that of a flag.
    found = [(kernel, text.replace(str(ROOT), "project")) for kernel, text in json.loads(done.stdout)]
    assert {kernel for kernel, _ in found} == KERNELS
    return found


def test_nvidia(tmp_path: Path) -> None:
    divisions = 0
    for kernel, text in assembly("sm_90", tmp_path):
        arithmetic = re.findall(r"\b(?:fma|mad|div|mul|add|sub|rcp)\.[\w.]*f32\b", text)
        wrong = [name for name in arithmetic if re.search(r"fma|mad|ftz|approx|full|rcp", name)]
        assert not wrong, (kernel, wrong)
        divisions += arithmetic.count("div.rn.f32")
    assert divisions > 100  # the pattern finds what it should


def test_amd(tmp_path: Path) -> None:
    """Subnormals are kept. Divisions, of integers too, have fused steps of their own; nothing else may be fused."""
    divisions = 0
    for kernel, text in assembly("gfx942", tmp_path):
        assert re.search(r"float_denorm_mode_32 3\b", text), kernel
        assert not re.search(r"\bcontract\b|\bfast\b|llvm\.fma|llvm\.fmuladd", text), kernel
        divisions += text.count("v_div_fixup_f32")
    assert divisions > 50
