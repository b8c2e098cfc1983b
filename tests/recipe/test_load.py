"""The strict YAML reader: places, and none of YAML 1.1's surprises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quarkcli.errors import ConfigError
from quarkcli.recipe import load
from quarkcli.spec import ELEMENTS


def value(text: str) -> Any:
    return load.parse(f"key: {text}\n", "f.yaml").data["key"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("012", "012"),
        ("0o14", "0o14"),
        ("0x1F", "0x1F"),
        ("-07", "-07"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("0.01", 0.01),
        ("1_000", 1000),
        ("-3", -3),
        ("+3", 3),
        ("e5", "e5"),
        ("E10", "E10"),
        ("+e5", "+e5"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        (".inf", float("inf")),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("'5'", "5"),
        ("|\n  5", "5\n"),
        ("*q_proj", None),
    ],
)
def test_scalars(text: str, expected: Any) -> None:
    if text.startswith("*"):  # an alias, not a pattern: patterns are quoted
        with pytest.raises(ConfigError, match="undefined alias"):
            value(text)
        return
    found = value(text)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("element", ELEMENTS)
def test_names_of_formats_are_text(element: str) -> None:
    assert value(element) == element
    assert value(element.split("_")[-1]) == element.split("_")[-1]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_as_python_writes_them(number: float) -> None:
    assert value(repr(number)) == number


@given(st.text(alphabet="0123456789eE+-._x: ", min_size=1, max_size=12))
def test_no_plain_text_crashes(text: str) -> None:
    try:
        document = load.parse(f"key: {text}\n", "f.yaml")
    except ConfigError as error:
        assert error.where.startswith("f.yaml:1:")
    else:
        assert set(document.data) == {"key"}


def fails(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load.parse(text, "f.yaml")
    return caught.value


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: 1\n---\nb: 2\n", "f.yaml:2:1", "expected a single document in the stream, but found another document"),
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3:1", "duplicate key 'a'"),
        ("a:\n  - {b: 1, b: 2}\n", "f.yaml:2:12", "duplicate key 'b'"),
        ("a: 1\n'a': 2\n", "f.yaml:2:1", "duplicate key 'a'"),
        ("1: a\n+1: b\n", "f.yaml:2:1", "duplicate key '1'"),
        ("? [1, 2]\n: x\n", "f.yaml:1:3", "a key must be plain text or a number"),
        ("a: !!python/object:os.system x\n", "f.yaml:1:4", "unknown tag"),
        ("a: !!binary aGk=\n", "f.yaml:1:4", "unknown tag"),
        ("a: !thing 'x'\n", "f.yaml:1:4", "unknown tag !thing"),
        ("a: !thing [x]\n", "f.yaml:1:4", "unknown tag !thing"),
        ("a: !thing x\n", "f.yaml:1:4", "unknown tag !thing"),
        ("a: [1, 2\nb: 3\n", "f.yaml:2:", "expected"),
        ("a:\n\t- 1\n", "f.yaml:2:1", "cannot start any token"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2:1", "another document"),
        ("a: &x [*x]\n", "f.yaml:1:4", "levels, aliases included"),
    ],
)
def test_errors_have_a_place(text: str, where: str, what: str) -> None:
    error = fails(text)
    assert error.where.startswith(where)
    assert what in error.what


def test_a_number_fits_a_float() -> None:
    assert float(value("9" * load.MAX_DIGITS)) > 0
    with pytest.raises(ConfigError, match="a number has 101 characters, and it may have 100"):
        value("9" * 101)
    with pytest.raises(ConfigError, match="a number has more than 100 digits") as caught:
        load.of_data({"steps": [10**400]}, "config")
    assert caught.value.where == "config.steps[0]"


def test_control_characters_are_no_yaml() -> None:
    assert fails("a: \x00\n").where == "f.yaml"


def test_an_alias_bomb_is_refused() -> None:
    bomb = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "values" in fails("\n".join(bomb)).what


def test_a_harmless_alias_is_fine() -> None:
    assert load.parse("a: &x {b: 1}\nc: *x\n", "f").data == {"a": {"b": 1}, "c": {"b": 1}}


def test_depth_is_limited() -> None:
    assert "levels" in fails("a: " + "[" * 100 + "]" * 100).what
    assert isinstance(fails("a: " + "[" * 100_000 + "]" * 100_000), ConfigError)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a:\n  - b: 1\n    c: [x, y]\n")
    document = load.read(path)
    assert document.data == {"a": [{"b": 1, "c": ["x", "y"]}]}
    assert str(document.origin("a", 0, "c", 1)) == f"{path}:3:12"
    assert str(document.origin("a", 0, "c")) == f"{path}:3:5"
    assert str(document.origin("a", 0, "absent", "deeper")) == f"{path}:2:5"  # the nearest written parent
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 3\)"):
        load.read(path)
    path.write_text("# " + "x" * 1_000_000)
    with pytest.raises(ConfigError, match="1000002 bytes, and a recipe may have 1000000"):
        load.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load.read(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load.read(tmp_path)
