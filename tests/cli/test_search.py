"""`quark search` on the embedded model."""

from __future__ import annotations

import json

import pytest

from quarkcli.search.run import ROWS
from tests import runs

FEW = ("--calib-samples", "4", "--calib-seqlen", "32")
SCHEMES = ("--model", "demo", "--schemes", "nvfp4,fp8")


@pytest.fixture
def text(tmp_path):
    return str(runs.text_file(tmp_path / "text.txt"))


def test_a_recipe_a_table_and_scores(quark, text, tmp_path):
    first = quark("search", *SCHEMES, "--calib-data", text, *FEW, "--budget", "5", "-o", "mixed.yaml")
    assert first.code == 0, first.err
    lines = first.out.splitlines()
    assert lines[0].split() == ["BITS", "SIZE", "PREDICTED", "KL", "nvfp4", "GROUPS", "fp8", "GROUPS"]
    assert sum(" * " in line for line in lines) == 1
    assert lines[-1] == "mixed.yaml"
    assert "786,432 searched weights in 16 groups" in first.err
    (scores,) = tmp_path.glob("*.scores.json")
    assert f"scores: {scores.name}" in first.err
    again = quark("search", *SCHEMES, "--calib-data", text, *FEW, "--size", "2.7MB", "-o", "small.yaml", "--json")
    assert again.code == 0, again.err
    found = json.loads(again.out)
    assert found["schema"] == "quark/search/1"
    assert found["measured"] is False
    assert found["choice"]["bytes"] <= 2_700_000
    assert {group["name"] for group in found["groups"]} == set(found["choice"]["chosen"])
    for name in ("mixed.yaml", "small.yaml"):
        assert quark("recipes", "validate", name, "--model", "demo").code == 0
    assert quark("quantize", "--model", "demo", "--recipe", "mixed.yaml", "-o", "out", "-q").out == "out\n"


def test_without_a_budget_nothing_is_written_but_scores(quark, text, tmp_path):
    answer = quark("search", *SCHEMES, "--calib-data", text, *FEW)
    assert answer.code == 0, answer.err
    assert "no recipe is written without --budget or --size" in answer.err
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".txt", ".json"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--schemes", "nvfp4"), 2, "two schemes or more"),
        (("--schemes", "nvfp4,,fp8"), 2, "unknown scheme ''"),
        ((), 2, "neither --schemes nor --recipe"),
        (("--schemes", "nvfp4,fp8", "--budget", "4"), 3, "bits per weight are too few; the smallest choice takes"),
        (("--schemes", "nvfp4,fp8", "--size", "huge"), 2, "is not a size"),
        (("--schemes", "nvfp4,fp8", "-o", "x.yaml"), 2, "a recipe needs a budget"),
        (("--schemes", "mxfp4,bf16", "--budget", "5", "--calib-data", "nowhere.txt"), 5, "nowhere.txt"),
        (("--schemes", "mxfp4,bf16", "--budget", "5", "--exclude", "*nope"), 3, "matches none of"),
        (("--schemes", "mxfp4,bf16", "--budget", "20"), 3, "the budget is large enough to quantize nothing"),
        (
            ("--schemes", "nvfp4,fp8", "--budget", "5", "-o", "x.yml", "--scores", "../{}/x.yml"),
            2,
            "cannot be one file",
        ),
        (("--schemes", "nvfp4,fp8", "--budget", "5", "-o", ".", "--overwrite"), 2, "hint: choose another -o"),
        (("--schemes", "nvfp4,fp8", "--set", "calibration.samples=64"), 2, "hint: use the flags, such as --calib-"),
        (("--recipe", "none.yaml", "--set", "calibration.samples=64"), 2, "a search has no recipe to change"),
        (("--recipe", "none.yaml"), 3, "none.yaml: there is no such file"),
        (("--recipe", "nvfp4"), 3, "give a file with an auto_quantize section"),
    ],
)
def test_what_is_wrong_is_said_at_once(quark, tmp_path, arguments, code, said):
    data = () if "--calib-data" in arguments else ("--calib-data", "builtin")
    answer = quark("search", "--model", "demo", *(text.format(tmp_path.name) for text in arguments), *data)
    assert answer.code == code, answer.err
    assert said in answer.err
    assert not list(tmp_path.glob("*"))


def test_the_help_shows_what_a_search_takes(quark, text):
    shown = " ".join(quark("search", "--help").out.split())
    assert "such as gptq.damp=0.05" in shown and "calibration.samples" not in shown
    assert "the recipe's" not in shown
    assert f"[default: score_size of --recipe, else {ROWS}]" in shown
    answer = quark("search", *SCHEMES, "--calib-data", text, *FEW, "--algorithm", "gptq", "--set", "gptq.damp=0.05")
    assert answer.code == 0, answer.err
    assert "such as calibration.samples=64" in " ".join(quark("quantize", "--help").out.split())


def test_a_recipe_for_a_search_says_where_to_go(quark, tmp_path):
    recipe = {"metadata": {"recipe_type": "auto_quantize"}, "auto_quantize": {"constraints": {}}}
    (tmp_path / "auto.yaml").write_text(json.dumps(recipe))
    for command in (("quantize", "--model", "demo", "--recipe"), ("recipes", "convert")):
        answer = quark(*command, "auto.yaml", *(("-o", "new.yaml") if command[0] == "recipes" else ()))
        assert answer.code == 3
        assert "quark search --recipe auto.yaml" in answer.err
