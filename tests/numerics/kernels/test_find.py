"""Which specs and devices get a kernel."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from quarkcli.numerics import kernels
from quarkcli.numerics.packed import quantize_packed
from quarkcli.spec import ObserverSpec, PerChannel, PerGroup, PerTensor, ScaleSpec, TensorSpec

from . import interpreter as there
from .cases import FUSED, SCALES_FIRST, SPECS
from .interpreter import Interpreter

CPU = torch.device("cpu")
INT4 = SPECS["int4-f32"]
UNKNOWN = {
    "a chain": replace(INT4, then=SPECS["fp8-tensor"]),
    "a cast": TensorSpec("bf16", PerTensor(), None),
    "two bits": TensorSpec("int2", PerGroup(64), ScaleSpec("f32")),
    "a point": TensorSpec("mxint8", PerGroup(32), ScaleSpec("e8m0", "even")),
    "shift bits": TensorSpec("mx9", PerGroup(16), ScaleSpec("e8m0", "floor")),
    "a real zero point": TensorSpec("uint4", PerGroup(64), ScaleSpec("f32"), "float"),
    "rounding down": replace(INT4, rounding="floor"),
    "unsigned without a zero point": TensorSpec("uint4", PerGroup(64), ScaleSpec("f32")),
}


@pytest.mark.parametrize("spec", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown(spec: TensorSpec) -> None:
    assert not kernels.knows(spec)
    assert kernels.find(spec, torch.device("cuda")) is None


@pytest.mark.parametrize("name", SPECS)
def test_known(name: str) -> None:
    assert kernels.knows(SPECS[name])


def test_a_cpu_has_none() -> None:
    assert kernels.find(INT4, CPU) is None


def test_triton_stays_out_where_no_kernel_runs() -> None:
    script = (
        "import sys, torch\n"
        "from quarkcli.numerics import packed, quantize\n"
        "from tests.numerics.kernels.cases import SPECS\n"
        "weight = torch.ones(2, 64)\n"
        "for spec in SPECS.values():\n"
        "    if spec.group_size in (None, 16, 32, 64):\n"
        "        packed.quantize_packed(weight, spec)\n"
        "        quantize.fake_quantize(weight, spec)\n"
        "assert 'triton' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_triton_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels._launchers.__wrapped__() is None


def test_the_interpreter_and_the_switch(interpreter: Interpreter) -> None:
    module = "quarkcli.numerics.kernels.launch"
    assert interpreter.call(there.found, INT4) == module
    assert interpreter.call(there.found, INT4, "on") == module
    assert interpreter.call(there.found, INT4, "off") is None


def test_one_pass_where_a_group_fits(interpreter: Interpreter) -> None:
    weight = torch.ones(4, 192)
    for name, spec in FUSED.items():
        seen = interpreter.call(there.launches, quantize_packed, weight, spec)
        assert seen == (["ranges"] if spec.scale.global_scale else []) + ["groups"], name
    for name in SCALES_FIRST:
        assert interpreter.call(there.launches, quantize_packed, weight, SPECS[name])[-1] == "given", name


def test_ranges_that_are_searched_come_from_the_reference(interpreter: Interpreter) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    spec = TensorSpec(
        "int8", PerChannel(0), ScaleSpec("f32", "half_range"),
        observer=ObserverSpec("mse", (("steps", 5), ("shrink", 0.5))),
    )  # fmt: skip
    assert interpreter.call(there.launches, quantize_packed, weight, spec) == ["given"]
    got, want = interpreter.call(there.quantize_packed, weight, spec), quantize_packed(weight, spec)
    assert torch.equal(got.data, want.data)
    assert torch.equal(got.params.scale, want.params.scale)
