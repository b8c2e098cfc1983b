"""Patterns of files on names: the answers of `re`, and no pattern that takes for ever."""

from __future__ import annotations

import re
import subprocess
import time
import warnings

import hypothesis.strategies as st
import pytest
from hypothesis import assume, example, given, settings

from quarkcli.dialects._patterns import WrittenNames
from quarkcli.errors import ConfigError, ModelError
from quarkcli.recipe import expressions
from quarkcli.recipe.expressions import Expressions
from quarkcli.recipe.match import Patterns, matchers

PIECES = [
    ".*", ".+", "a", "b", "model", r"\.", r"\d+", r"\w", r"\s", "[a-c]", "[^.]", "[0-9]+", "(?:a|b)", "(up|down)", "*",
    "+", "?", "{2}", "{,3}", "{1,}", "^", "$", r"\b", r"\B", "(", ")", "|", "(?i)", "(?s)", "[[:alpha:]]", r"\x41",
    r"\101", r"\A", "é", "layers",
]  # fmt: skip
NAMES = [
    "model.layers.0.up",
    "aab.b.12",
    "A",
    "",
    "aé.b",
    "a\nb",
    "a\n",
    "ab.down",
    "3.layers",
    "a.b\x0b",
    "a" * 40,
    "[a]",
    "al:]",
]
ENDLESS = ["(.*)*(.*)*(.*)*zzz", "(a+)+b", "(a|a)*b", "(.*a){12}b", "(?:a?){90}(?:b?){90}(?:a?){90}c"]


def answers(text: str, method: str = "fullmatch") -> list[bool]:
    return [getattr(re, method)(text, name) is not None for name in NAMES]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join), st.sampled_from(["fullmatch", "match"]))
@example("a{,3}b.*", "fullmatch")
@example("[[:alpha:]]", "fullmatch")
@example(r"\w+\.b", "match")
def test_what_re_finds(text: str, method: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    try:
        re.compile(text)
    except re.error:
        with pytest.raises(ConfigError, match="not a regular expression"):
            Expressions().matcher(text, "file:3")
        return
    plain = [name for name in NAMES if expressions.is_plain(name)]
    match = Expressions(method).matcher(text)  # type: ignore[arg-type]
    if expressions._linear(text, method) is None:
        assume(False)  # a child of its own each
    assert [match(name) for name in plain] == [getattr(re, method)(text, name) is not None for name in plain]


@pytest.mark.parametrize(
    "text", [r"(?!.*down).*", r"(a)\1.*", r".*(?<=\.)b", "é?a.*", r"(?x) a . *", "[a-z]{1,3}b?", r"\w*", ".*$", r"a\sb"]
)
def test_a_child_and_odd_names_answer_alike(text: str) -> None:
    found = Expressions()
    match = found.matcher(text)
    found.learn([text], NAMES)
    assert [match(name) for name in NAMES] == answers(text)


def test_many_names_are_one_child(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: starts.append(1) or real(*a, **k))
    found = matchers([("one", ["re:(?!x).*", "*a"]), ("two", [r"re:(.)\1.*"])], NAMES)
    assert [[bool(match(name)) for name in NAMES] for _, match in found] == [
        answers("(?!x).*"), [name.endswith("a") for name in NAMES], answers(r"(.)\1.*"),
    ]  # fmt: skip
    assert len(starts) == 1
    Patterns().learn(["*a", "re:b"], ["a", "b"])
    assert len(starts) == 1


@pytest.mark.parametrize("text", ENDLESS)
def test_linear_patterns_are_answered(text: str) -> None:
    started = time.process_time()
    assert not Expressions().matcher(text)("a" * 60)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("text", [r"(?!x)(.*)*(.*)*(.*)*zzz", r"(a)?(a+)+\1b", "(?:é?a+)+b", "(?:a?){900}(?:b?){900}c"])
def test_the_rest_has_a_limit_and_the_message_its_place(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "LIMIT", 0.2)
    found = Expressions()
    found.matcher("(?!b)a.*", "r.yaml:1")
    match = found.matcher(text, "r.yaml:7")
    with pytest.raises(ConfigError, match=r"r\.yaml:7: .* takes too long"):
        found.learn(["(?!b)a.*", text], ["a" * 60])
    with pytest.raises(ConfigError, match="takes too long: all patterns of a file have"):
        match("a" * 60)


def test_patterns_of_a_file_share_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "LIMIT", 0.6)
    texts = [rf"(?!{number})(a|a)*b" for number in range(40)]  # a tenth of a second each, or less
    found = Expressions()
    for text in texts:
        found.matcher(text)
    with pytest.raises(ConfigError, match="all patterns of a file"):
        for text in texts:
            found.learn([text], ["a" * length for length in range(14, 21)])


@pytest.mark.parametrize(
    "pattern", ["*a*a*a*a*a*a*a*a*a*b", "*?a*?a*?a*?a*?a*?b", "*[a-z]*[a-z]*[a-z]*1*b", "*" * 50 + "b"]
)
def test_globs_do_not_blow_up(pattern: str) -> None:
    started = time.process_time()
    assert not Patterns().matcher(pattern)("a" * 5000 + "c")
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "text", ["9" * 3000 + "{" + "9" * 5000 + "}", "(" * 20000, "a{99999999999}", "[", "*a", "(?P<n>a)(?P<n>b)"]
)
def test_no_expression(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^r\.yaml:2: 're:.* is not a regular expression"):
        Expressions().matcher(text, "r.yaml:2")


def test_names_of_a_written_config(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["lm_head", "re:model.*up", r"re:(?!model)vision\."]
    names = WrittenNames(texts, ["model.up_proj", "lm_head"])
    assert names.named("model.up_proj", texts)
    assert names.named("lm_head", texts)
    assert names.named("vision.a", texts)
    assert not names.named("model.down_proj", texts)
    assert not names.named("lm_head", texts[1:])
    monkeypatch.setattr(expressions, "LIMIT", 0.2)
    with pytest.raises(ModelError, match=r"quantization_config: .* takes too long"):
        WrittenNames([r"re:(?=a)(a+)+b"], ["a" * 60])
    with pytest.raises(ModelError, match="not a regular expression"):
        WrittenNames(["re:("], ["a"])
