"""Every screen in terminals of every width: no line is wider, and no word of a name is broken."""

from __future__ import annotations

import os
import pty
import re
import struct
import sys

import pytest

from quarkcli.cli import bar, panels, recipes, tables
from tests.cli.test_idle import commands

WIDTHS = (40, 80, 120, 200)
PLAN = ("plan", "--model", "demo", "--scheme", "nvfp4", "--calib-data", "builtin")
PREVIEW = ("data", "preview", "--model", "demo", "--calib-data", "builtin")
SCREENS = [
    ("--help",), ("quantize", "--help"), ("init", "--help"), ("recipes", "--help"), ("recipes", "list"),
    ("schemes", "list"), ("schemes", "list", "--server", "vllm", "--gpu", "h100"), ("schemes", "show", "nvfp4"),
    ("algorithms", "list"), ("algorithms", "show", "gptq"), ("models", "list"), ("data", "list"), ("env",), PLAN,
    (*PLAN, "--modules"), (*PLAN, "--ranks", "2", "--gpu", "h100"), ("inspect", "demo"), ("verify", "MADE"),
    ("compare", "MADE", "MADE"), ("report", "MADE"), ("schemes", "show", "nvf"), ("quantize", "--model", "demo"),
    ("init", "demo", "--gpu", "mi250x", "--server", "sglang"),
    (*PREVIEW, "--calib-samples", "2", "--calib-seqlen", "9"),
    ("recipes", "explain", "nvfp4", "model.layers.0.mlp.up_proj", "--model", "demo"),
]  # fmt: skip
FREE = re.compile(r"[\d.,]+[hms]?|[0-9a-f]{6,}")  # times, and digests, which have no joints
JOINTS = re.compile(r"(?<=[./,:=_-])")
WORDS = re.compile(r"(?<=[./,:=_-])|(?<=[a-z0-9])(?=[A-Z])")  # of a name that is wider than the narrowest terminal


@pytest.fixture
def at(monkeypatch):
    """Makes both streams terminals of a width; None: no terminal."""

    def make(width):
        monkeypatch.setattr(tables, "room", lambda name="stdout": width)
        monkeypatch.setenv("COLUMNS", str(width or 10_000))

    return make


def parts_of(text):
    """All that a word may be broken into, and the word."""
    found = set()
    for word in text.split():
        joints = WORDS if len(word) > WIDTHS[0] else JOINTS
        pieces = [piece for piece in joints.split(word) if piece]
        ends = range(len(pieces) + 1)
        found |= {"".join(pieces[start:end]) for start in ends for end in ends if start < end}
    return found


@pytest.mark.parametrize("screen", SCREENS, ids=" ".join)
def test_a_screen_fits_and_breaks_no_name(quark, at, monkeypatch, made, screen):
    words = [str(made) if word == "MADE" else word for word in screen]
    at(None)
    with monkeypatch.context() as patch:
        patch.setattr(panels, "WIDEST", 10_000)
        wide = quark(*words)
    known = parts_of(f"{wide.out} {wide.err} {recipes.MORE} tensors, -> other \\ WHY HOW")
    known |= {word.lower() for word in known} | {f"{word}:" for word in known}
    for width in WIDTHS:
        at(width)
        answer = quark(*words)
        assert answer.code == wide.code
        lines = f"{answer.out}{answer.err}".splitlines()
        assert [line for line in lines if len(line) > width] == [], width
        strange = [word for line in lines for word in line.split() if word not in known]
        assert [word for word in strange if not FREE.fullmatch(word)] == [], width


def test_recipes_are_a_line_each_at_eighty_columns(quark, at):
    at(80)
    lines = quark("recipes", "list").out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names.count("nvfp4_experts_only-kv_fp8_layerwise_offload") == 1
    assert len(lines) < 60
    assert all(
        re.match(r"\S+ +[\d.]+", line)
        for line in lines
        if "  " in line[1:] and line[0].isalnum() and line[:4] != "NAME"
    )


class Task:
    """A Rich task as the bar sees it."""

    def __init__(self, done=3, total=48, description="model.layers.3.mlp quantizing 7 of 28"):
        self.completed, self.total, self.description = done, total, description
        self.elapsed, self.fields = 83.0, {"eta": "46m"}


@pytest.mark.parametrize("width", [20, *WIDTHS])
def test_the_bar_keeps_count_and_time(width):
    shown = bar.line(Task(), width, ("━", "─"))
    assert shown.startswith("3/48 1m eta 46m")
    assert len(shown) <= width
    assert ("─" in shown) == (width >= 40)
    rest = shown.removeprefix("3/48 1m eta 46m").strip(" ━─").split()
    assert rest == Task().description.split()[: len(rest)]


def test_panels_have_every_flag_of_long_commands():
    long = {name: command for name, command in commands() if len(command.params) > panels.MANY + 1}
    assert {"quantize", "plan", "search", "eval"} <= set(long)
    named = {flag for names in panels.PANELS.values() for flag in names.split()}
    lost = {
        flag.name
        for command in long.values()
        for flag in command.params
        if flag.param_type_name == "option" and flag.name not in named
    }
    assert lost == set()


def test_help_has_panels_and_versions_have_a_letter(quark):
    out = quark("quantize", "--help").out
    heads = [line for line in out.splitlines() if re.fullmatch(r"\w+:", line)]
    assert heads == ["Model:", "What:", "Calibration:", "Output:", "Run:"]
    assert quark("-V") == quark("--version")


def test_a_real_terminal(tmp_path):
    """A pseudo-terminal of 40 columns: what is asked of it is what lines are fitted to."""
    import fcntl
    import termios

    script = "import sys; from quarkcli.cli.main import main; sys.exit(main(['recipes', 'list']))"
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        os.environ.pop("COLUMNS", None)
        os.execv(sys.executable, [sys.executable, "-c", script])
    read = b""
    try:
        while data := os.read(terminal, 65536):
            read += data
    except OSError:  # the other end was closed
        pass
    assert os.waitpid(child, 0)[1] == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", read.decode())
    assert max(map(len, text.split("\r\n"))) <= 40
    assert "fp8_default-kv_fp8_cast" in text
