"""Tables and lines for terminals."""

from __future__ import annotations

import pytest

from quarkcli.cli import tables

NAME = "model.layers.0.post_attention_layernorm.weight"


def test_cells_go_on_below_and_names_stay_whole():
    lines = tables.table(("NAME", "WHY"), [(NAME, "one value for each of the channels")], 66)
    assert lines == [
        f"NAME{' ' * 44}WHY", f"{NAME}  one value for each", f"{' ' * 48}of the channels",
    ]  # fmt: skip
    assert tables.table(("A", "B"), [("x", "y" * 300)], None)[1] == "x  " + "y" * 300


def test_a_table_without_room_is_blocks():
    lines = tables.table(("NAME", "BITS", "WHY"), [(NAME, "4.5", "-")], 40)
    assert lines == ["model.layers.0.post_attention_layernorm.", "weight", "  bits  4.5"]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("short", 40, ["short"]),
        (
            "size        3.68 MB become 2.52 MB on disk",
            32,
            ["size        3.68 MB become 2.52", "            MB on disk"],
        ),
        ("one two three four five six", 20, ["one two three four", "  five six"]),
        ("digest      " + "0" * 40, 30, ["digest", "0" * 30, "0" * 10]),
        ("path  /a/long/path/that/has/joints", 24, ["path  /a/long/path/that/", "      has/joints"]),
    ],
)
def test_lines(text, width, lines):
    assert tables.wrapped(text, width) == lines
    assert tables.wrapped(text, None) == [text]


def test_a_word_of_ours_before_the_line_counts():
    assert tables.wrapped("nine letters and more of them", 30, len("error: ")) == ["nine letters and more", "  of them"]
