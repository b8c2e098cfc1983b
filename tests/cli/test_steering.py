"""What files of others say never steers the terminal; the answer in JSON stays JSON; the card's YAML is quoted."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import yaml

from quarkcli.cli import output
from quarkcli.cli.main import main
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import ModelError

ESCAPE = "\x1b]0;title\x07\x9b2J\u202e"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A model whose tensor, architecture and model type carry control sequences."""
    folder = tmp_path / "m"
    shutil.copytree(EMBEDDED, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(architectures=[f"Llama{ESCAPE}"])
    (folder / "config.json").write_text(json.dumps(config))
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    head = json.dumps({(k + ESCAPE if "0.mlp.up" in k else k): v for k, v in table.items()}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])
    return folder


def test_commands_write_it_out(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [["inspect"], ["plan", "--scheme", "mxfp4", "--model"], ["inspect", "--json"]]
    for argv in commands:
        main([*argv, str(hostile)])
        shown = capsys.readouterr()
        assert not STEERING.search(shown.out + shown.err)
        assert "title" in shown.out or argv[0] == "plan"  # which may refuse the tensor without naming it


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    output.json_data({"schema": "s", f"a{ESCAPE}": ESCAPE})
    out = capsys.readouterr().out
    assert not STEERING.search(out)
    assert json.loads(out) == {"schema": "s", "ok": True, f"a{ESCAPE}": ESCAPE}


def test_errors_and_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output.reset([])
    monkeypatch.setenv("FORCE_COLOR", "1")
    output.error(ModelError(f"a{ESCAPE}", where=ESCAPE, hint=f"\x1b[31m{ESCAPE}"))
    output.warning(ESCAPE)
    output.table(["A"], [[ESCAPE]])
    shown = capsys.readouterr()
    ours = re.sub("\x1b\\[(?:0|1|31|33)m", "", shown.out + shown.err, count=8)
    assert not STEERING.search(ours)
    assert "\\u001b[31m" in ours
    assert "\x1b[31merror:\x1b[0m" in shown.err


@pytest.mark.parametrize(
    "name", ["a: b #c", "'quoted' \"twice\"", "- x", "line\nbreak", "[a, b]", "null", f"m{ESCAPE}"]
)
def test_the_card_of_a_model_of_any_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(EMBEDDED, tmp_path / name)
    out = tmp_path / "out"
    assert main(["quantize", "--model", str(tmp_path / name), "--scheme", "mxfp4", "-o", str(out), "-q"]) == 0
    capsys.readouterr()
    text = (out / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": name, "base_model_relation": "quantized", "tags": ["quark", "mxfp4", "compressed-tensors"],
    }  # fmt: skip
    assert not STEERING.search(text)
    assert f"# {' '.join(name.split(chr(10)))}, mxfp4" in body or ESCAPE in name
