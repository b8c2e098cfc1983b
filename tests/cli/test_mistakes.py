"""`quark explain`, and codes of errors on the screen."""

from __future__ import annotations

import json

import pytest

from quarkcli.reporting import kinds


def test_a_code_is_explained(quark):
    code, out, err = quark("explain", "E-PATTERN-NOMATCH")
    assert (code, err) == (0, "")
    kind = kinds.index()["E-PATTERN-NOMATCH"]
    assert all(text in out for text in (kind.means, kind.cure, kind.example, *kind.causes, "exit 3"))


@pytest.mark.parametrize("spelling", ["pattern-nomatch", "[E-PATTERN-NOMATCH]", "e-pattern-nomatch"])
def test_spellings_of_a_code(quark, spelling):
    assert quark("explain", spelling) == quark("explain", "E-PATTERN-NOMATCH")


def test_all_codes_are_listed(quark):
    out = quark("explain").out
    assert len(out.splitlines()) == len(kinds.index()) + 1
    rows = json.loads(quark("explain", "--json").out)["errors"]
    assert [row["code"] for row in rows] == list(kinds.index())
    (row,) = json.loads(quark("explain", "E-GATE", "--json").out)["errors"]
    assert row["exit"] == [8] and row["causes"]


def test_a_code_that_is_misspelt_gets_the_nearest(quark):
    code, out, err = quark("explain", "E-PATERN-NOMATCH")
    assert (code, out) == (2, "")
    assert "did you mean E-PATTERN-NOMATCH" in err


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (("plan", "--model", "demo"), 2, "E-RECIPE-OR-SCHEME"),
        (("plan", "--model", "demo", "--scheme", "nvpf4"), 2, "E-SCHEME-UNKNOWN"),
        (("plan", "--model", "demo", "--scheme", "fp8", "--exclude", "*nothing*"), 3, "E-PATTERN-NOMATCH"),
        (("plan", "--model", "demo", "--scheme", "fp8", "--seed", "-1"), 2, "E-COMMAND-LINE"),
        (("data", "preview", "--model", "demo", "--seed", "18446744073709551616"), 2, "E-COMMAND-LINE"),
        (("search", "--model", "demo", "--seed", "9223372036854775808"), 2, "E-COMMAND-LINE"),
        (("plan", "--no-such-flag"), 2, "E-COMMAND-LINE"),
        (("plan", "--model", "./none", "--scheme", "fp8"), 5, "E-PATH-NOT-FOUND"),
        (("verify", "none"), 5, "E-PATH-NOT-FOUND"),
        (("plan", "--model", "demo", "--recipe", "none.yaml"), 3, "E-RECIPE-NOT-FOUND"),
    ],
)
def test_the_code_stands_behind_the_message_and_in_json(quark, words, code, kind):
    answer = quark(*words)
    assert answer.code == code
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error:")]
    assert line.endswith(f" [{kind}]")
    row = json.loads(quark(*words, "--json").err.splitlines()[-1])
    assert (row["id"], row["code"]) == (kind, code)


def test_every_example_names_its_code_once(quark):
    """The list fits its purpose: no two codes say the same."""
    means = [kind.means for kind in kinds.index().values()]
    assert len(set(means)) == len(means)
