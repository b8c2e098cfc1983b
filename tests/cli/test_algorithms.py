"""`quark algorithms`: every registered one, with its parameters, and what it costs."""

from __future__ import annotations

import json
import re

import pytest

from quarkcli import algorithms


def test_the_list_names_every_algorithm(quark):
    code, out, err = quark("algorithms", "list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:]] == algorithms.names()
    answer = json.loads(quark("algorithms", "list", "--json").out)
    assert answer["schema"] == "quark/algorithms/1"
    rows = {row["name"]: row for row in answer["algorithms"]}
    assert list(rows) == algorithms.names()
    assert all(row["summary"] and row["kind"] for row in rows.values())
    assert (rows["rtn"]["data"], rows["rtn"]["memory_bytes"]) == ([], 0)
    assert rows["gptq"]["data"] == ["gram", "gram_val"] and rows["gptq"]["memory_bytes"] >= 4 * 4 * 4096**2


@pytest.mark.parametrize("name", algorithms.names())
def test_one_is_shown_with_its_parameters(name, quark):
    code, out, err = quark("algorithms", "show", name.replace("-", "_").upper())
    assert (code, err) == (0, "")
    made = algorithms.create(name, {})
    for key in made.parameters:
        assert f"{name}.{key}=" in out
    answer = json.loads(quark("algorithms", "show", name, "--json").out)
    assert answer["schema"] == "quark/algorithm/1"
    assert (answer["algorithm"]["name"], answer["algorithm"]["parameters"]) == (name, dict(made.parameters))
    for table in answer["algorithm"]["about_parameters"].split("\n\n"):
        assert len({len(start) for start in re.findall(r"^\w+ {2,}", table, re.MULTILINE)}) <= 1, table


def test_an_unknown_one(quark):
    code, _, err = quark("algorithms", "show", "gtpq")
    assert code == 2 and err == "error: unknown algorithm 'gtpq' [E-ALGORITHM-UNKNOWN]\nhint: use one of: gptq, gptaq\n"
