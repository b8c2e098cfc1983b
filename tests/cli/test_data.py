"""quark data: what there is, and rows that are those of the job."""

from __future__ import annotations

import json

import pytest

from quarkcli.forward.files import KINDS
from tests import runs

ROWS = ("--calib-seqlen", "16", "--calib-samples", "6")
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_list(quark):
    code, out, err = quark("data", "list", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["schema"] == "quark/data/1"
    names = [row["name"] for row in found["sources"]]
    assert names[0] == "builtin" and {suffix for name in names for suffix in name.split(", ")} >= set(KINDS)
    assert all(name in quark("data", "list").out for name in names)


@pytest.mark.parametrize("seed", ["0", "3"])
def test_the_rows_are_those_of_the_job(quark, seed):
    flags = ("--model", "demo", "--calib-data", "builtin", *ROWS, "--seed", seed)
    found = json.loads(quark("data", "preview", *flags, "--json").out)
    assert quark("quantize", *flags, "--scheme", "fp8", "-o", "out", "-q").code == 0
    report = json.loads(quark("report", "out", "--json").out)["calibration"]
    assert found["digest"] == report["digest"]
    assert (found["rows"], found["seqlen"], found["tokens"]) == (6, 16, 96)
    assert [text["tokens"] for text in found["texts"]] == [16] * 6


def test_text_skipped_rows_and_the_beginning(quark, tmp_path):
    source = runs.build("llama", tmp_path / "model")
    runs.tokenizer(bos=True).save_pretrained(source)
    rows = ['{"text": "abcdefgh"}', '{"text": null}', '{"text": null}', "nonsense", '{"text": "ijklmnop"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    flags = ("data", "preview", "--model", "model", "--calib-data", "rows.jsonl", "--calib-seqlen", "5")
    found = json.loads(quark(*flags, "--json").out)
    assert [row["text"] for row in found["texts"]] == [  # the seed's order of lines
        "<bos>ijkl", "<bos>mnop", "<bos><eos>abc", "<bos>defg"
    ]  # fmt: skip
    assert sorted(found["skipped"].values()) == [1, 2] and found["skipped"]["text is null"] == 2
    code, out, _ = quark(*flags, "--limit", "1")
    assert code == 0 and "each begins with '<bos>'" in out and "2 x text is null" in out
    assert "ijkl" in out and "mnop" not in out
    off = json.loads(quark(*flags, "--json", "--bos", "off", "--limit", "2").out)
    assert [row["text"] for row in off["texts"]] == ["ijklm", "nop<eos>a"]


def test_conversations_are_shown_without_padding(quark, tmp_path):
    source = runs.build("llama", tmp_path / "model")
    runs.tokenizer(CHAT).save_pretrained(source)
    talks = [{"messages": [{"role": "user", "content": text}]} for text in ("hi", "a longer one")]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, talks)))
    found = json.loads(quark("data", "preview", "--model", "model", "--calib-data", "chats.jsonl", "--json").out)
    assert sorted(row["text"] for row in found["texts"]) == ["<user>a longer one", "<user>hi"]
    assert found["tokens"] == sum(row["tokens"] for row in found["texts"]) == len("<user>a longer one<user>hi")


def test_the_settings_of_a_recipe(quark, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "schema: quark/recipe/1\nmetadata: {description: x}\nquantize: {scheme: fp8}\n"
        "calibration: {data: builtin, samples: 2, seqlen: 12}\n"
    )
    found = json.loads(quark("data", "preview", "--model", "demo", "--recipe", "r.yaml", "--json").out)
    assert (found["rows"], found["seqlen"], found["source"]) == (2, 12, "builtin")


def test_what_is_refused(quark):
    code, out, err = quark("data", "preview", "--model", "demo", "--calib-data", "nope.jsonl")
    assert (code, out) == (5, "") and "no such calibration file" in err
    asked = ("--calib-data", "builtin", "--calib-seqlen", "64", "--calib-samples", "99999")
    assert quark("data", "preview", "--model", "demo", *asked).code == 7
