"""A command's process runs models without torch's compiler; whoever asks for it gets the real one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import runs

START = """
import sys, torch
from quarkcli.model import deferred
deferred.ALLOWED = {allowed}
from quarkcli.model import library
"""


def asked(allowed: bool, code: str) -> str:
    done = subprocess.run([sys.executable, "-c", START.format(allowed=allowed) + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = "print(sorted({'torch._inductor', 'torch.distributed.tensor'} & set(sys.modules)))"


def test_a_command_does_not_import_the_compiler():
    assert asked(True, LOADED) == "[]"


@pytest.mark.slow
def test_a_program_imports_it():
    assert asked(False, LOADED) == "['torch._inductor', 'torch.distributed.tensor']"


def test_whoever_compiles_gets_the_real_one():
    compiled = (
        "print(torch._dynamo.config.__name__, torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    )
    assert asked(True, compiled) == "torch._dynamo.config 2.0"


@pytest.mark.slow
def test_whoever_imports_a_part_of_it_gets_the_real_one():
    assert asked(True, "import torch._dynamo.config as c; print(c.__name__, len(sys.modules) > 2000)").endswith("True")
    vmap = "from transformers import masking_utils as m; print(type(m.TransformGetItemToIndex()).__module__)"
    assert asked(True, vmap) == "torch._dynamo._trace_wrapped_higher_order_op"


WHOLE = """
import sympy
assert 'sympy.core' not in sys.modules
assert torch.empty(3, 1, device='meta').add(torch.arange(4, device='meta') / 2).shape == (3, 4)
assert 'sympy.core' not in sys.modules
from sympy import Basic
from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_or_false, sym_eq
size = ShapeEnv().create_unbacked_symint()
assert isinstance(sympy.Symbol('x'), Basic) and isinstance(size, torch.SymInt)
assert not guard_or_false(size == 3) and guard_or_false(sym_eq((2, 3), (2, 3)))
"""


def test_symbols_are_there_when_they_are_asked_for():
    assert asked(True, WHOLE) == ""


def test_the_command_writes_the_same_bytes_without_it(tmp_path):
    options = runs.data(runs.text_file(tmp_path / "text.txt"), 4, 32)
    made = runs.run("demo", tmp_path / "program", scheme="fp8", **options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = "import sys; from quarkcli.cli.main import main; from quarkcli.model import deferred; "
    command += "deferred.ALLOWED = True; code = main(sys.argv[1:]); "
    command += "assert not {'torch._inductor', 'sympy.core'} & set(sys.modules); "
    own = ["quantize", "--model", "demo", "--scheme", "fp8", "-o", str(tmp_path / "command"), "--device", "cpu", *flags]
    subprocess.run([sys.executable, "-c", command + "sys.exit(code)", *own], check=True, capture_output=True)
    written = list((tmp_path / "command").glob("*.safetensors"))
    assert written
    assert [path.read_bytes() for path in written] == [(made.folder / path.name).read_bytes() for path in written]
