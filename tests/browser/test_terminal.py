"""What stays on a terminal, of what a command writes to it."""

from __future__ import annotations

import pytest

from tests.browser.terminal import drawn, screen


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("one\r\ntwo\r\n", ["one", "two"]),
        ("bar 1\rbar 2\r\x1b[2Kdone\r\n", ["done"]),
        ("a\r\nb\r\nc\x1b[1A\x1b[2K\x1b[1A\x1b[2Knew\r\n", ["new", "", "c"]),
        ("\x1b[?25lx\x1b[?25h\r\n", ["x"]),
        ("\x1b[1mbold\x1b[0m\r\n", ["\x1b[1mbold\x1b[0m"]),
    ],
)
def test_what_stays(content: str, lines: list[str]) -> None:
    assert screen(content) == lines


def test_a_picture_holds_the_command_and_its_lines() -> None:
    picture = drawn("quark plan --model demo", ["size <1 MB", "\x1b[31mred\x1b[0m"], 40)
    assert picture.startswith("<svg") and "plan" in picture and "&lt;1" in picture and "red" in picture
