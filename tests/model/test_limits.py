"""Chat templates that do not end, or that make a gigabyte, are one plain error within seconds."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from quarkcli.errors import DataError, ModelError
from quarkcli.model import limits
from quarkcli.model.limits import Bounded, OutOfBounds
from quarkcli.model.tokenizer import Tokenizer
from tests.runs import tokenizer

PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
POWER = "{{ 9 ** (9 ** 9) }}"
LARGE = "{{ messages[0].content * 3000000000 }}"
MANY = "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "a b"}]


def test_a_template_is_rendered_as_ever() -> None:
    inner = tokenizer(PLAIN)
    found = Tokenizer(inner)
    assert [found.chat(MESSAGES) for _ in range(3)] == [(inner.encode("a b"), None)] * 3


def test_what_a_template_raises_is_a_data_error() -> None:
    with pytest.raises(DataError, match="refuses a conversation: no system"):
        Tokenizer(tokenizer("{{ raise_exception('no system') }}")).chat(MESSAGES)


@pytest.mark.parametrize("template", [ENDLESS, POWER, LARGE, MANY])
def test_a_template_without_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 2.0)
    started = time.monotonic()
    with pytest.raises(ModelError, match="the chat template of the tokenizer fails"):
        Tokenizer(tokenizer(template)).chat(MESSAGES)
    assert time.monotonic() - started < 15


def test_the_child_ends_with_what_started_it() -> None:
    bounded = Bounded(os.getpid)
    child = bounded()
    assert child != os.getpid()
    assert bounded() == child
    del bounded
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_late_answer_answers_no_later_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a call may miss its time by little."""

    def slow(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    bounded = Bounded(slow)
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    with pytest.raises(OutOfBounds, match="more than"):
        bounded(0.4)
    monkeypatch.setattr(limits, "SECONDS", 5.0)
    time.sleep(0.5)
    assert [bounded(0.0), bounded(0.01)] == [0.0, 0.01]


def test_a_forked_process_has_a_child_of_its_own() -> None:
    bounded = Bounded(os.getpid)
    ours = bounded()
    reader, writer = os.pipe()
    forked = os.fork()
    if not forked:  # pragma: no cover
        os.write(writer, str(bounded()).encode())
        os._exit(0)
    os.waitpid(forked, 0)
    theirs = int(os.read(reader, 100))
    assert theirs not in {ours, forked}
    assert bounded() == ours


def test_a_child_that_dies_is_out_of_bounds() -> None:
    with pytest.raises(OutOfBounds, match="memory"):
        Bounded(lambda: os._exit(1))()


def test_a_pattern_of_the_tokenizer_without_end() -> None:
    inner = tokenizer()
    inner.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=a)(a+)+(a+)+(a+)+b"), "isolated")
    with pytest.raises(ModelError, match=r"the tokenizer fails to turn a text into tokens .*retry-limit"):
        Tokenizer(inner).encode("a" * 200)
