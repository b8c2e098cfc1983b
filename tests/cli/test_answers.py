"""The answers of --json are one family: the same two fields first, and a name that docs/ci.md has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quarkcli.disk import push
from quarkcli.evaluation import run as evaluation
from tests.cli.test_checkpoints import RESULT
from tests.cli.test_idle import commands

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ci.md"
DEMO = ("--model", "demo")
FEW = ("--calib-data", "builtin", "--calib-samples", "2", "--calib-seqlen", "8")
CASES: dict[str, tuple[str, ...]] = {
    "quantize": (*DEMO, "--scheme", "mxfp4", "-o", "out"),
    "report": ("MADE",),
    "plan": (*DEMO, "--scheme", "mxfp4"),
    "eval": ("MADE", "--baseline", "demo", "--max-kl", "0.1"),
    "verify": ("MADE",),
    "compare": ("MADE", "MADE", "--limit", "1"),
    "convert": ("MADE", "--to", "quark", "-o", "out"),
    "inspect": ("MADE",),
    "init": ("demo", "--gpu", "h100"),
    "search": (*DEMO, "--schemes", "nvfp4,fp8", *FEW),
    "push": ("MADE", "org/name"),
    "recipes list": (),
    "recipes show": ("nvfp4",),
    "recipes normalize": ("nvfp4",),
    "recipes validate": ("mxfp4",),
    "recipes explain": ("nvfp4", "lm_head", *DEMO),
    "schemes list": (),
    "schemes show": ("nvfp4",),
    "algorithms list": (),
    "algorithms show": ("gptq",),
    "models list": (),
    "models show": ("llama",),
    "data list": (),
    "data preview": (*DEMO, *FEW),
    "env": (),
    "explain": ("E-GATE",),
}


def documented() -> dict[str, tuple[str, list[str]]]:
    """Command -> its schema, and the fields that the page names."""
    rows = re.findall(r"^\| `([a-z ]+)` \| `(quark/[a-z-]+/\d)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {command: (schema, re.findall(r"`([a-z0-9_]+)`", fields)) for command, schema, fields in rows}


def test_every_command_with_json_is_on_the_page() -> None:
    having = {name for name, command in commands() if any("--json" in flag.opts for flag in command.params)}
    assert set(documented()) == having == set(CASES)
    names = [schema for command, (schema, _) in documented().items() if command != "report"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("command", CASES)
def test_an_answer_begins_as_all_do(quark, monkeypatch, made, command):
    monkeypatch.setattr(evaluation, "evaluate", lambda *given, **more: dict(RESULT))
    sent = {"repository": "org/name", "url": "https://hub/x", "commit": "abc", "files": [], "bytes": 0, "removed": []}
    monkeypatch.setattr(push, "push", lambda *given, **more: sent)
    words = [str(made) if word == "MADE" else word for word in CASES[command]]
    code, out, err = quark(*command.split(), *words, "--json")
    found = json.loads(out)
    schema, fields = documented()[command]
    assert code == 0, err
    assert list(found)[:2] == ["schema", "ok"]
    assert (found["schema"], found["ok"]) == (schema, True)
    assert set(fields) <= set(found)
