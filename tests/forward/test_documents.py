"""Rows become texts and conversations, or are skipped with a reason; chat templates get what servers give them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quarkcli.errors import DataError
from quarkcli.forward import data
from quarkcli.forward.documents import Conversation, Skipped, Unusable, document
from quarkcli.model.tokenizer import Tokenizer
from tests import runs

ASK = [{"role": "user", "content": "hello"}]
CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "mill"}}}
TOOL = {"type": "function", "function": {"name": "lookup"}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "words"}, "words"),
        ("words", "words"),
        ({"messages": None, "text": "words"}, "words"),
        ({"messages": ASK}, Conversation(ASK)),
        ({"conversations": ASK}, Conversation(ASK)),
        (ASK, Conversation(ASK)),
        ({"messages": [{"from": "human", "value": "hello"}]}, Conversation(ASK)),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, Conversation([{"role": "assistant", "content": "x"}])),
        ({"prompt": ASK, "completion": ASK}, Conversation(ASK * 2)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}, Conversation(ASK)),
        ({"messages": [{"role": "user", "content": ["hel", {"text": "lo"}]}]},
         Conversation([{"role": "user", "content": "hel\nlo"}])),
        ({"messages": [{"role": "user", "content": "hello", "name": None}]}, Conversation(ASK)),
        ({"messages": json.dumps(ASK), "images": []}, Conversation(ASK)),
        ({"messages": ASK, "tools": [TOOL]}, Conversation(ASK, [TOOL])),
        ({"messages": ASK, "tools": json.dumps([TOOL])}, Conversation(ASK, [TOOL])),
        ({"messages": ASK, "tools": []}, Conversation(ASK)),
        ({"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
         Conversation([*ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}])),
        ({"messages": [{"role": "system", "content": "be brief"}]},
         Conversation([{"role": "system", "content": "be brief"}])),
    ],
)  # fmt: skip
def test_rows_that_can_be_used(row: Any, expected: str | Conversation) -> None:
    assert document(row, None) == expected


def test_arguments_that_are_json_text_are_read() -> None:
    call = {"function": {"name": "lookup", "arguments": '{"word": "mill"}'}}
    found = document({"messages": [*ASK, {"role": "assistant", "tool_calls": [call]}]}, None)
    assert found.messages[1]["tool_calls"] == [{"function": CALL["function"]}]
    call["function"]["arguments"] = "no json"
    found = document({"messages": [*ASK, {"role": "assistant", "tool_calls": [call]}]}, None)
    assert found.messages[1]["tool_calls"] == [call]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "the row is null"),
        (True, "the row is a boolean"),
        (5, "the row is a number"),
        ([5], "a message is a number"),
        ([[ASK]], "a message is a list"),
        ("", "the row holds no text"),
        ({}, "none of the columns"),
        ({"words": "x"}, "none of the columns words is known"),
        ({"text": None}, "text is null"),
        ({"text": 5}, "text is a number"),
        ({"text": ["x"]}, "text is a list"),
        ({"text": " \n"}, "text holds no text"),
        ({"messages": []}, "no message holds any text"),
        ({"messages": "hello"}, "messages are text"),
        ({"messages": {"role": "user"}}, "messages are an object"),
        ({"messages": [{"content": "x"}]}, "a message has no role"),
        ({"messages": [{"role": 5, "content": "x"}]}, "role is a number"),
        ({"messages": [{"role": "user"}]}, "a message has no content"),
        ({"messages": [{"role": "user", "content": ""}]}, "no message holds any text"),
        ({"messages": [{"role": "user", "content": 5}]}, "content is a number"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content is an object"),
        ({"messages": [{"role": "user", "content": [[]]}]}, "content is a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]}, "'image'"),
        ({"messages": [{"from": "narrator", "value": "x"}]}, "the speaker 'narrator' is not known"),
        ({"messages": [{"from": ["x"], "value": "x"}]}, "the speaker"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": 5}]}, "tool_calls must be a list of objects"),
        ({"messages": ASK, "tools": 5}, "tools must be a list of objects"),
        ({"messages": ASK, "tools": "x"}, "tools must be a list of objects"),
        ({"messages": ASK, "images": ["a.png"]}, "the row has images"),
        ({"prompt": "x"}, "there is a prompt but no response"),
        ({"prompt": 5, "response": "x"}, "content is a number"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: Any, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        document(row, None)


ODD = [None, True, 5, -1.5, 1e400, 10**30, "", " ", "x\0", "\ud800", "[", "text", [], {}, [None], [[]], {"a": None}]
ODD += [["text"], [{"type": "text"}], [{"type": ["a"]}], [{"text": 5}], {"role": "user"}, ASK]
GOOD = [
    {"text": "words"},
    {"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
    {"conversations": [{"from": "human", "value": "words"}]},
    {"prompt": "words", "response": "words"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "words"}]}]},
]


def changed(value: Any) -> Iterator[Any]:
    """The value with every part of it, in turn, replaced by every odd one."""
    yield from ODD
    if isinstance(value, dict):
        yield from ({**value, key: new} for key in value for new in changed(value[key]))
    if isinstance(value, list):
        yield from ([*value[:i], new, *value[i + 1 :]] for i in range(len(value)) for new in changed(value[i]))


@pytest.mark.parametrize("row", GOOD)
def test_one_odd_value_anywhere_is_a_row_or_a_reason(row: dict[str, Any]) -> None:
    used = skipped = 0
    for odd in changed(row):
        for column in (None, "text", "messages"):
            try:
                found = document(odd, column)
            except Unusable:
                skipped += 1
                continue
            used += 1
            texts = [found] if isinstance(found, str) else [message["content"] for message in found.messages]
            assert all(isinstance(text, str) and "\0" not in text and "\ud800" not in text for text in texts)
    assert used and skipped


def test_skipped_rows_are_counted_by_reason() -> None:
    skipped = Skipped()
    for number in range(200):
        skipped.add("common" if number % 2 else f"rare {number}", f"line {number}")
    assert skipped.total == 200
    assert str(skipped).startswith("100 x common (such as line 1); ")
    assert len(skipped.counts) <= 41


TOOLS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}"
)


def rows_of(path: Path, rows: list[Any], template: str, **options: Any) -> tuple[list[str], data.CalibrationData]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = Tokenizer(runs.tokenizer(template))
    found = data.load(str(path), tokens, **{"samples": 1, "seqlen": 200, "seed": 0, **options})
    assert found.mask is not None
    return [tokens._inner.decode(row[mask]) for row, mask in zip(found.tokens, found.mask, strict=True)], found


def test_templates_get_tool_calls_and_tools(tmp_path: Path) -> None:
    talk = [*ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    texts, _ = rows_of(tmp_path / "a.jsonl", [{"messages": talk, "tools": [TOOL]}], TOOLS)
    assert texts == ["<user>hello<assistant>lookup1 tools"]


def test_a_conversation_that_the_template_refuses_is_skipped(tmp_path: Path) -> None:
    refused = {"messages": [{"role": "system", "content": "x"}, *ASK]}
    texts, _ = rows_of(tmp_path / "a.jsonl", [{"messages": ASK}, refused, {"messages": ASK}], TOOLS, samples=2)
    assert texts == ["<user>hello"] * 2
    with pytest.raises(DataError, match=r"2 rows of 200 tokens, 3 asked for; 1 rows skipped.*no system role"):
        rows_of(tmp_path / "a.jsonl", [{"messages": ASK}, refused, {"messages": ASK}], TOOLS, samples=3)


def test_a_template_that_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row can be used: 4 x the chat template makes nothing"):
        rows_of(tmp_path / "a.jsonl", [{"messages": ASK}] * 4, "{{ '' }}")


@pytest.mark.parametrize(
    ("template", "more", "hint", "kind"),
    [
        ("{% for m in %}", [], "correct the chat template", "E-CHAT-TEMPLATE"),
        ("{{ raise_exception('never') }}", [], "correct the chat template", "E-CHAT-TEMPLATE"),
        ("", [], "give the chat template with", "E-CHAT-TEMPLATE"),
        ("{% for m in %}", [{"words": "x"}], "write each line like this", "E-DATA-FILE"),  # the data is wrong too
    ],
)
def test_a_template_that_refuses_all_is_to_be_corrected(
    template: str, more: list[Any], hint: str, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"no row can be used: 2 x the (chat template refuses|tokenizer has no)"
    ) as error:
        rows_of(tmp_path / "a.jsonl", [{"messages": ASK}] * 2 + more, template)
    assert error.value.hint.startswith(hint) and error.value.kind == kind


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        # as llava's: text given as it is would not be shown
        "{% for m in messages %}{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}"
        "{% endfor %}{% endfor %}",
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
        "{% endfor %}",
    ],
)
def test_texts_reach_templates_of_every_kind(template: str, tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    for messages in (ASK, parts):
        assert rows_of(tmp_path / "a.jsonl", [{"messages": messages}], template)[0] == ["hello"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [], "conversations": None, "text": "words"},
        {"text": "words", "prompt": "", "response": ""},
        {"text": "", "messages": [], "prompt": "a", "response": "b"},
        {"messages": [], "conversations": ASK},
    ],
)
def test_an_empty_column_of_a_mixed_set_hides_no_other(row: dict[str, Any]) -> None:
    found = document(row, None)
    expected = {key: value for key, value in row.items() if value}
    assert found == document(expected, None)


def test_rows_do_not_depend_on_the_day(tmp_path: Path) -> None:
    """Llama's templates print the date: a run that goes on after midnight has the same rows."""
    texts, _ = rows_of(tmp_path / "a.jsonl", [{"messages": ASK}], "{{ strftime_now('%d %b %Y') }}")
    assert texts == ["01 Jan 2025"]


def test_what_was_skipped_is_in_log_and_report(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (runs.topics(0, 2), None, "")))
    made = runs.run("demo", tmp_path / "out", scheme="fp8", **runs.data(path, 4, 32))
    calibration = made.report["calibration"]
    assert calibration["skipped"] == {"text is null": 1, "text holds no text": 1}
    assert calibration["bos"] == {"asked": "auto", "tokens": []}
    assert any("2 rows skipped" in warning for warning in made.report["warnings"])
    assert "2 rows skipped" in (tmp_path / "out" / "quark" / "quark.log").read_text()
    with pytest.raises(DataError, match="2 rows skipped"):
        runs.run("demo", tmp_path / "strict", scheme="fp8", strict=True, **runs.data(path, 4, 32))
    assert not list(tmp_path.glob("strict*"))
