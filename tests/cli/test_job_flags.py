"""What single flags of `quark quantize` change: each against the same run without it."""

from __future__ import annotations

import json
import shutil

import pytest

from quarkcli.job import preflight
from tests import runs

FREE = ("quantize", "--model", "demo", "--scheme", "mxfp4", "-o", "out", "-q")
TALK = {"messages": [{"role": "user", "content": "a question of some length, and more of it"}]}


@pytest.fixture
def model(tmp_path):
    source = runs.build("llama", tmp_path / "model")
    runs.tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(source)
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps(TALK)] * 4))
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}")
    return ("--model", "model", "--calib-data", "chats.jsonl", "--calib-seqlen", "16", "--offline")


def test_a_chat_template_of_ones_own(quark, model, tmp_path):
    rows = {}
    for flags in ((), ("--chat-template", "own.jinja")):
        found = json.loads(quark("data", "preview", *model, *flags, "--json").out)
        rows[flags] = {row["text"] for row in found["texts"]}
        out = "with" if flags else "without"
        assert quark("quantize", *model, *flags, "--scheme", "fp8", "-o", out, "-q").code == 0
        report = json.loads((tmp_path / out / "quark" / "report.json").read_text())
        assert report["calibration"]["digest"] == found["digest"]
        assert report["calibration"]["chat_template"] == (flags[1] if flags else None)
    assert list(rows.values()) == [{"a question of so"}, {"<user> a questio"}]
    assert not runs.same_files(tmp_path / "with", tmp_path / "without")
    own = [json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("with", "without")]
    assert own[0] == own[1]  # the checkpoint's template is the model's


def test_a_chat_template_that_cannot_be_used(quark, model, tmp_path):
    code, _, err = quark("data", "preview", *model, "--chat-template", "nowhere.jinja")
    assert code == 5 and "the chat template cannot be read" in err
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    code, _, err = quark("data", "preview", *model, "--chat-template", "broken.jinja")
    assert code == 7 and "chat template refuses a conversation" in err
    (tmp_path / "texts.jsonl").write_text("\n".join([json.dumps({"text": "some text of this length" * 4})] * 4))
    plain = ("--model", "model", "--calib-data", "texts.jsonl", "--calib-seqlen", "16", "--offline")
    code, _, err = quark("data", "preview", *plain, "--chat-template", "own.jinja")
    assert code == 0 and "not used: no conversation in texts.jsonl" in err


def test_a_limit_of_memory_stops_before_the_work(quark, tmp_path):
    code, _, err = quark(*FREE, "--max-cpu-mem", "1MB")
    assert code == 6 and "bytes of memory, and --max-cpu-mem allows" in err
    assert not list(tmp_path.glob("out*"))
    assert quark(*FREE, "--max-cpu-mem", "100GB").code == 0


def test_a_limit_of_memory_that_was_not_foreseen_stops_after_a_part(quark, tmp_path, monkeypatch):
    taken = iter([10**9, 10**9, 9 * 10**9])
    with monkeypatch.context() as patch:
        patch.setattr(preflight.memory, "peak_rss", lambda: next(taken, 9 * 10**9))
        code, _, err = quark(*FREE, "--max-cpu-mem", "8GB")
    assert code == 6 and "bytes of memory, and --max-cpu-mem allows" in err
    parts = {path.name for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert "model-embed.safetensors" in parts and not (tmp_path / "out").exists()
    assert quark(*FREE).code == 0


def test_without_verification_nothing_is_read_back(quark, tmp_path, monkeypatch):
    from quarkcli.disk import verify

    def refuse(*given):
        raise AssertionError("read back")

    with monkeypatch.context() as patch:
        patch.setattr(verify, "against_plan", refuse)
        assert quark(*FREE, "--no-verify").code == 0
        shutil.move(tmp_path / "out", tmp_path / "unread")
        assert quark(*FREE).code == 1
    report = json.loads((tmp_path / "unread" / "quark" / "report.json").read_text())
    assert report["checks"] == ["the written files were not read back: --no-verify"]
    assert quark("verify", "unread", "--source", "demo").code == 0


def test_devices_that_servers_split_it_over(quark, tmp_path):
    flags = ("--model", "demo", "--scheme", "mxfp4")
    code, out, err = quark("plan", *flags, "--tp", "3")
    assert (code, out) == (4, "") and "tensor parallel over" in err
    assert quark("quantize", *flags, "-o", "out", "--tp", "3").code == 4
    assert not list(tmp_path.glob("out*"))
    found = json.loads(quark("plan", *flags, "--json").out)["tensor_parallel"]
    assert found[:2] == [1, 2]
    assert f"{', '.join(map(str, found))} devices" in quark("plan", *flags, "--tp", "2").out
