"""quark compare: the answer for people, for programs and for Python, and the gate."""

from __future__ import annotations

import json

import pytest

import quarkcli
from quarkcli.errors import CheckError


def test_the_command_and_python_say_the_same(quark, made):
    answer = quark("compare", "demo", str(made), "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert found["schema"] == "quark/compare/1"
    assert found == quarkcli.compare("demo", made)
    assert len(json.loads(quark("compare", "demo", str(made), "--json", "--limit", "2").out)["tensors"]) == 2


def test_a_page_and_an_answer_for_programs(quark, made, tmp_path):
    page = tmp_path / "page.html"
    answer = quark("compare", "demo", str(made), "--html", str(page), "--json")
    assert json.loads(answer.out)["schema"] == "quark/compare/1" and "<html" in page.read_text()
    answer = quark("compare", "demo", str(made), "--html", str(page))
    assert answer.out.startswith(f"{page}\n")


def test_the_gate(quark, made):
    code, out, err = quark("compare", "demo", str(made), "--min-sqnr", "40", "--limit", "1")
    assert code == 8 and "28 of 39 tensors are below 40 dB" in err
    assert out.count(" dB ") == 2  # the answer comes before the verdict: one row, and the whole
    with pytest.raises(CheckError, match="28 of 39 tensors are below 40 dB") as caught:
        quarkcli.compare("demo", made, min_sqnr=40)
    assert (caught.value.result["ok"], caught.value.result["min_sqnr_db"]) == (False, 40)
    answer = quark("compare", "demo", str(made), "--min-sqnr", "40", "--json")
    assert answer.code == 8 and json.loads(answer.out) == caught.value.result
    assert quark("compare", "demo", str(made), "--min-sqnr", "10").code == 0
    code, out, _ = quark("compare", str(made), str(made), "--min-sqnr", "200")
    assert code == 0 and "all 39 tensors are equal bit for bit" in out


def test_what_is_no_checkpoint(quark, made):
    assert quark("compare", "nowhere", str(made), "--offline").code == 5
