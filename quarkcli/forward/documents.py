"""Turns a row of calibration data into a text or a conversation; any other row is `Unusable`. Torch-free."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quarkcli.forward.files import CHATS, Broken, unfit

_ANSWERS = ("response", "completion")
# ShareGPT's names for who speaks -> a chat template's.
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool",
    "observation": "tool",
}  # fmt: skip
_TEXTS = (None, "text", "input_text", "output_text")  # types of parts that hold text
_INSTEAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # of a message's content
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_REASONS = 40  # different reasons that are counted by themselves
_SHOWN = 5


class Unusable(Exception):
    """A row that is skipped; the text is the reason."""


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass
class Skipped:
    """Rows that were not used: their number for each reason, and the place of one.

    remarks  other facts about the files that a user should know
    """

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, reason: str, place: str) -> None:
        if reason not in self.counts and len(self.counts) >= _REASONS:
            reason = "other reasons"
        self.counts[reason] += 1
        self.places.setdefault(reason, place)

    @property
    def total(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        """Returns `2 x text is null (such as line 7); 1 x ...`, most frequent first."""
        shown = [f"{n} x {reason} (such as {self.places[reason]})" for reason, n in self.counts.most_common(_SHOWN)]
        more = len(self.counts) - _SHOWN
        return "; ".join([*shown, f"{more} more reasons"] if more > 0 else shown)


def document(row: Any, column: str | None) -> str | Conversation:
    """Returns the text or the conversation of a row. Raises Unusable.

    column   names where it is; None: it is found
    """
    if isinstance(row, Broken):
        raise Unusable(row.reason)
    if isinstance(row, str):
        return _text(row, "the row")
    if isinstance(row, list):
        return _conversation(row, {})
    if not isinstance(row, dict):
        raise Unusable(f"the row is {_kind(row)}")
    return _found(row) if column is None else _named(row, column)


def _named(row: dict[str, Any], column: str) -> str | Conversation:
    if column not in row:
        raise Unusable(f"no column '{column}'; columns are {_names(row)}")
    value = row[column]
    if value is not None and not isinstance(value, str | list):
        raise Unusable(f"column '{column}' holds neither text nor messages")
    return _conversation(value, row) if isinstance(value, list) else _text(value, column)


def _found(row: dict[str, Any]) -> str | Conversation:
    given = {key: value for key, value in row.items() if value is not None}
    answers = [given[key] for key in _ANSWERS if key in given]
    asked = "prompt" in given and bool(answers)
    there = [key for key in (*CHATS, "text") if key in given]
    key = next((key for key in there if given[key]), None)  # mixed sets have "" and [] where a column is another kind's
    if key is None and there and not asked:
        key = there[0]
    if key is not None:
        return _text(given[key], key) if key == "text" else _conversation(given[key], row)
    if asked:
        return _conversation(_turn("user", given["prompt"]) + _turn("assistant", answers[0]), row)
    empty = [key for key in (*CHATS, "text", "prompt", *_ANSWERS) if key in row and key not in given]
    if empty:
        raise Unusable(f"{empty[0]} is null")
    if "prompt" in given:
        raise Unusable("there is a prompt but no response")
    raise Unusable(f"none of the columns {_names(row)} is known")


def _turn(role: str, value: Any) -> list[Any]:
    """Returns the messages of a prompt or a response, which is a text or messages."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name} is {_kind(value)}")
    reason = unfit(value)
    if reason is not None:
        raise Unusable(f"{name} {reason.partition(', the first')[0].partition(' at character')[0]}")
    return value


def _conversation(value: Any, row: Mapping[str, Any]) -> Conversation:
    value = _loaded(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise Unusable(f"messages are {_kind(value)}")
    media = [key for key in _MEDIA if row.get(key)]
    if media:
        raise Unusable(f"the row has {media[0]}, and calibration uses only text")
    messages = [_message(some) for some in value]
    if not any(message["content"] or message.keys() & set(_INSTEAD) for message in messages):
        raise Unusable("no message holds any text")
    return Conversation(messages, _tools(row.get("tools")))


def _message(value: Any) -> dict[str, Any]:
    """Returns a message as chat templates read it: role, text, and its other fields."""
    if not isinstance(value, dict):
        raise Unusable(f"a message is {_kind(value)}")
    message = _filled(value)
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise Unusable(f"the speaker {str(speaker)[:40]!r} is not known")
        message = {"role": _SPEAKERS[speaker], "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise Unusable(
            f"a message's role is {_kind(message['role'])}" if "role" in message else "a message has no role"
        )
    content = message.get("content")
    if content is None and not message.keys() & set(_INSTEAD):
        raise Unusable("a message has no content")
    message["content"] = "" if content is None else _content(content)
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"])
    return message


def _content(value: Any) -> str:
    texts = [_part(part) for part in value] if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise Unusable(f"a message's content is {_kind(text)}")
        if text.strip():
            _text(text, "a message")
    joined = "\n".join(texts)  # as vLLM joins parts
    return joined if joined.strip() else ""


def _part(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind not in _TEXTS or "text" not in value:
        raise Unusable(f"a message has content of type {str(kind)[:40]!r}, which is not text")
    return value["text"]


def _calls(value: Any) -> list[dict[str, Any]]:
    """Returns tool calls with their arguments as an object. Servers parse JSON text for the template as well."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise Unusable("tool_calls must be a list of objects")
    return [_call(call) for call in value]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = _loaded(function["arguments"])
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _tools(value: Any) -> list[dict[str, Any]] | None:
    value = _loaded(value) if isinstance(value, str) else value
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Unusable("tools must be a list of objects")
    return [_filled(tool) for tool in value]


def _loaded(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text


def _filled(value: Any) -> Any:
    """Returns the value without the keys that hold null: parquet gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(str(key)[:40] for key in list(row)[:12])


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
