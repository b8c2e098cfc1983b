"""Every shape of a quant_cfg, as measured on NVIDIA ModelOpt 0.47; rows and refusals that differ say so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quarkcli.errors import ConfigError
from quarkcli.recipe import load
from quarkcli.recipe.normalize import Canonical, normalize

INT8 = {"num_bits": 8, "axis": 0}
OFF = {"enable": False}


def rows(value: Any) -> list[tuple[Any, ...]]:
    """(pattern, cfg, enable), and the class where there is one."""
    found = normalize(value).entries
    return [
        (e.quantizer_path, e.cfg, e.enable) + ((e.parent_class,) if e.parent_class is not None else ()) for e in found
    ]


def refused(value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        normalize(value)
    assert caught.value.where.startswith("quant_cfg") or "problems" in caught.value.what
    return caught.value.what


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(
            [{"quantizer_path": "*weight_quantizer", "cfg": INT8}], [("*weight_quantizer", INT8, True)], id="1"
        ),
        pytest.param([{"quantizer_path": "*", "enable": False}], [("*", None, False)], id="2"),
        pytest.param({"*": OFF, "*w": INT8}, [("*", None, False), ("*w", INT8, True)], id="3"),
        pytest.param(
            [{"*": OFF}, {"*weight_quantizer": {"num_bits": 8}}],
            [("*", None, False), ("*weight_quantizer", {"num_bits": 8}, True)],
            id="4",
        ),
        pytest.param({"default": OFF}, [("*", None, False)], id="5"),
        pytest.param([{"default": OFF}], [("*", None, False)], id="5 in a list"),
        pytest.param({"*w": {"num_bits": 4, "enable": False}}, [("*w", {"num_bits": 4}, False)], id="6"),
        pytest.param({"*w": {"enable": True}}, [("*w", None, True)], id="7"),
        pytest.param(
            {"*w": [{"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": [4, 3]}]},
            [("*w", [{"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": [4, 3]}], True)],
            id="8",
        ),
        pytest.param(
            {"nn.Linear": {"*": OFF, "*weight_quantizer": {"num_bits": 8}}},
            [("*", None, False, "nn.Linear"), ("*weight_quantizer", {"num_bits": 8}, True, "nn.Linear")],
            id="9",
        ),
        pytest.param(
            [{"*w": INT8, "nn.Linear": {"*": OFF}}], [("*w", INT8, True), ("*", None, False, "nn.Linear")], id="10"
        ),
        pytest.param({"*w": None}, [("*w", None, True)], id="11 null"),
        pytest.param({"*w": {}}, [("*w", None, True)], id="11 empty"),
        pytest.param({"nn.Linear": {}}, [], id="12"),
        pytest.param([{"cfg": {"num_bits": 8}}], [("cfg", {"num_bits": 8}, True)], id="14"),
        pytest.param(
            [{"quantizer_path": "*", "enable": False}, {"*w": INT8}, {"nn.Linear": {"*i": OFF}}],
            [("*", None, False), ("*w", INT8, True), ("*i", None, False, "nn.Linear")],
            id="15",
        ),
        pytest.param([], [], id="16 list"),
        pytest.param({}, [], id="16 dict"),
        pytest.param(
            ({"quantizer_path": "*", "enable": False}, {"*w": INT8}), [("*", None, False), ("*w", INT8, True)], id="17"
        ),
        pytest.param([Canonical("*w", INT8, True)], [("*w", INT8, True)], id="18"),
    ],
)  # fmt: skip
def test_shapes(value: Any, expected: list[Any]) -> None:
    assert rows(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # `default` meant "before everything else" wherever it stood; the peer leaves it where it is.
        ({"*w": INT8, "default": OFF}, [("*", None, False), ("*w", INT8, True)]),
        ([{"*w": INT8}, {"default": OFF}], [("*", None, False), ("*w", INT8, True)]),
        ([{"quantizer_path": "*w", "cfg": INT8}, {"default": OFF}], [("*", None, False), ("*w", INT8, True)]),
        # Row 13: below a class scope it is no pattern called `default`.
        (
            {"nn.Linear": {"*w": INT8, "default": OFF}},
            [("*", None, False, "nn.Linear"), ("*w", INT8, True, "nn.Linear")],
        ),
        # `enable` in cfg counts when the entry has none; the peer passes it over and switches on.
        ([{"quantizer_path": "*w", "cfg": {"num_bits": 4, "enable": False}}], [("*w", {"num_bits": 4}, False)]),
        ([{"quantizer_path": "*w", "cfg": {"enable": False}}], [("*w", None, False)]),
        ([{"quantizer_path": "*w", "cfg": [{"num_bits": 4, "enable": False}, {}]}],
         [("*w", [{"num_bits": 4}, {}], False)]),
        # A list below a class scope is a chain; the peer crashes.
        ({"nn.Linear": {"*w": [INT8, {"num_bits": 4}]}}, [("*w", [INT8, {"num_bits": 4}], True, "nn.Linear")]),
        ([{"quantizer_name": "*w", "cfg": INT8}], [("*w", INT8, True)]),
    ],
)  # fmt: skip
def test_where_we_differ(value: Any, expected: list[Any]) -> None:
    assert rows(value) == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"enable": True}, ("*w", None, True)),
        ({"cfg": INT8}, ("*w", INT8, True)),
        ({"cfg": INT8, "enable": False}, ("*w", INT8, False)),
        ({"cfg": None}, ("*w", None, True)),
        ({"cfg": None, "enable": False}, ("*w", None, False)),
        ({"cfg": {}, "enable": False}, ("*w", None, False)),
        ({"cfg": [], "enable": False}, ("*w", None, False)),
        ({"cfg": [{}], "enable": False}, ("*w", None, False)),
        ({"cfg": [{}, INT8]}, ("*w", [{}, INT8], True)),
        ({"enable": "off"}, ("*w", None, False)),
        ({"enable": "False"}, ("*w", None, False)),
        ({"enable": 0}, ("*w", None, False)),
        ({"enable": 1}, ("*w", None, True)),
        ({"cfg": INT8, "parent_class": "nn.Linear"}, ("*w", INT8, True, "nn.Linear")),
        ({"enable": False, "parent_class": None}, ("*w", None, False)),
    ],
)
def test_what_an_entry_says(entry: dict[str, Any], expected: Any) -> None:
    assert rows([{"quantizer_path": "*w", **entry}]) == [expected]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "neither cfg nor enable"),
        ({"parent_class": "nn.Linear"}, "neither cfg nor enable"),
        ({"cfg": {}}, "cfg is empty"),
        ({"cfg": []}, "cfg is empty"),
        ({"cfg": [{}]}, "cfg is empty"),
        ({"cfg": {}, "enable": True}, "cfg is empty"),
        ({"cfg": {"enable": True}}, "cfg is empty"),
        ({"cfg": 8}, r"cfg must be a mapping or a list of mappings, not a number (8)"),
        ({"cfg": "fp8"}, "not text ('fp8')"),
        ({"cfg": [8, 4]}, "a stage must be a mapping"),
        ({"enable": None}, "enable must be true or false, not nothing"),
        ({"enable": "perhaps"}, "enable must be true or false"),
        ({"enable": 2}, "enable must be true or false"),
        ({"enable": True, "cfg": {"num_bits": 4, "enable": False}}, "contradicts the entry's enable"),
        ({"cfg": [{"enable": True}, {"enable": False}]}, "the stages have different values of enable"),
        ({"enable": True, "enabel": False}, "unknown key 'enabel' (did you mean 'enable'?)"),
        ({"enable": True, "parent_class": 7}, "parent_class must be text"),
        ({"enable": True, "required": "yes"}, "required must be true or false"),
        ({"enable": True, "quantizer_name": "*"}, "mean the same"),
    ],
)
def test_what_an_entry_may_not_say(entry: dict[str, Any], message: str) -> None:
    assert message in refused([{"quantizer_path": "*w", **entry}])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("*w", "must be a list of entries, not text"),
        (None, "must be a list of entries, not nothing"),
        (8, "must be a list of entries, not a number"),
        (["*w"], "an entry must be a mapping, not text"),
        ([None], "an entry must be a mapping, not nothing"),
        ([[]], "an entry must be a mapping, not a list"),
        ([{}], "the entry is empty"),
        ([{"*w": INT8, "*i": INT8}], "should be entries of their own"),
        ([{"cfg": INT8, "enable": True}], "quantizer_path is missing"),
        ([{"quantizer_path": 5, "enable": True}], "quantizer_path must be a pattern"),
        ([{"quantizer_path": "", "enable": True}], "quantizer_path must be a pattern"),
        ({"*w": True}, "attributes must be a mapping, not a yes or no (True)"),
        ({"*w": 8}, "attributes must be a mapping, not a number"),
        ({"*w": "fp8"}, "attributes must be a mapping, not text"),
        ({5: INT8}, "a pattern must be text"),
        ({"nn.Linear": None}, "a class scope must map patterns"),
        ({"nn.Linear": [INT8]}, "a class scope must map patterns"),
        ({"nn.Linear": OFF}, "write nn.Linear: {'*': {enable: false}}"),
        ({"nn.Linear": {"*": None}}, "no attributes are given"),
        ({"nn.Linear": {"nn.Conv2d": {"*": OFF}}}, "is inside the class nn.Linear"),
        ({"torch.nn.Linear": {"*": OFF}}, "is not a class scope"),
        ({"Conv1D": {"*": OFF}}, "is not a class scope"),
        ({"quantizer_path": "*", "enable": False}, "a single entry must be in a list: write '- ' in front of it"),
    ],
)  # fmt: skip
def test_refusals(value: Any, message: str) -> None:
    assert message in refused(value)


def test_all_problems_at_once_and_where() -> None:
    text = "quant_cfg:\n- {quantizer_path: '*'}\n- 7\n- quantizer_path: '*w'\n  cfg: {}\n"
    document = load.parse(text, "r.yaml")
    with pytest.raises(ConfigError) as caught:
        normalize(document.data["quant_cfg"], lambda path: str(document.origin(*path)), ("quant_cfg",))
    assert caught.value.what.splitlines() == [
        "3 problems",
        "  r.yaml:2:3: neither cfg nor enable is given",
        "  r.yaml:3:3: an entry must be a mapping, not a number (7)",
        "  r.yaml:5:3: cfg is empty; to switch only, write enable: true or false without cfg",
    ]


def test_legacy_forms_are_noted_with_place_and_new_form() -> None:
    found = normalize({"*w": {"num_bits": [4, 3], "block_sizes": {-1: 16}, "enable": False}, "default": OFF})
    assert found.notes == [
        (("default",), "legacy form; today it is written: - {quantizer_path: '*', cfg: null, enable: false}"),
        (("*w",), "legacy form; today it is written: - "
                  "{quantizer_path: '*w', cfg: {num_bits: [4, 3], block_sizes: {-1: 16}}, enable: false}"),
    ]  # fmt: skip
    assert [entry.place for entry in found.entries] == [("default",), ("*w",)]
    assert "is quantizer_path missing?" in normalize([{"cfg": {"num_bits": 8}}]).notes[1][1]
    assert "is empty and has no effect" in normalize({"nn.Linear": {}}).notes[0][1]
    assert normalize([{"quantizer_path": "*", "enable": False}]).notes == []


def test_the_noted_form_is_the_entry() -> None:
    """What a note tells the user to write is read as the same entry."""
    legacy = {
        "*w*": {"num_bits": "e4m3", "axis": None, "type": "8", "calibrator": "true"},
        "nn.Linear": {"it's": [{"num_bits": 4}, {"num_bits": [4, 3]}]},
    }
    found = normalize(legacy)
    written = "".join(text.removeprefix("legacy form; today it is written: ") + "\n" for _, text in found.notes)
    assert rows(load.parse(written, "n.yaml").data) == rows(legacy)


_WORDS = st.sampled_from(
    ["*", "*weight_quantizer", "default", "nn.Linear", "cfg", "enable", "quantizer_path", "num_bits"]
)
_LEAVES = st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from(["off", "fp8", "*w", ""])
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=3), max_leaves=12
)
_ENTRIES = st.fixed_dictionaries(
    {"quantizer_path": st.sampled_from(["*", "*w", "re:.*q"])},
    optional={
        "cfg": st.none() | st.dictionaries(st.sampled_from(["num_bits", "axis", "enable"]), st.booleans(), max_size=2),
        "enable": st.booleans(),
        "parent_class": st.sampled_from(["nn.Linear"]),
        "required": st.booleans(),
    },
)


@given(_VALUES | st.lists(_ENTRIES | st.dictionaries(_WORDS, _VALUES, max_size=2), max_size=5))
def test_anything_is_normalized_once_or_refused(value: Any) -> None:
    try:
        found = normalize(value).entries
    except ConfigError:
        return
    again = normalize([entry.as_dict() for entry in found])
    assert [entry.as_dict() for entry in again.entries] == [entry.as_dict() for entry in found]
    assert again.notes == []
