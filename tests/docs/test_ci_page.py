"""docs/ci.md: the workflow is one that GitHub reads, and its lines do what the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from quarkcli.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ci.md"


def workflow() -> dict:
    """The workflow on the page. YAML 1.1 reads the key `on` as true."""
    text = re.search(r"^```yaml\n(name: .*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert text is not None
    return yaml.safe_load(text[1])


def test_the_workflow_is_whole():
    found = workflow()
    assert set(found) == {"name", True, "env", "jobs"}
    (job,) = found["jobs"].values()
    assert job["runs-on"] and all({"run", "uses"} & set(step) for step in job["steps"])


def test_the_lines_of_the_workflow_run(monkeypatch, tmp_path, capsys):
    """Every `run:` but those that install; in this process, as a shell would call it."""
    found = workflow()
    monkeypatch.chdir(tmp_path)
    for name, value in {**found["env"], "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}.items():
        monkeypatch.setenv(name, str(value))
    steps = [step["run"] for job in found["jobs"].values() for step in job["steps"] if "run" in step]
    lines = [line for line in steps if not line.startswith("pip install")]
    assert len(lines) == 5
    for line in lines:
        words = [os.path.expandvars(word) for word in shlex.split(line)]
        if words[0] == "python":
            exec(compile(words[2], "ci.md", "exec"), {})
            assert 0 < float(capsys.readouterr().out) < 0.2
            continue
        words, file = (words[:-2], words[-1]) if ">" in words else (words, None)
        capsys.readouterr()
        code = main.main(words[1:])
        out, err = capsys.readouterr()
        assert (words[0], code) == ("quark", 0), err
        if file is not None:
            Path(file).write_text(out)
        if words[1] == "quantize":
            assert "::group::quantize" in err and err.count("::group::") == err.count("::endgroup::")
        if words[1] == "eval":
            assert all(json.loads(row)["event"] for row in err.splitlines())
    assert json.loads(Path("eval.json").read_text())["ok"] is True
    summary = Path("summary.md").read_text()
    assert all(
        part in summary for part in ("# tiny-llama, mxfp4", "### quark verify out", "### quark eval out", "| kl |")
    )


def test_a_failed_gate_is_an_annotation_and_stands_in_the_summary(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert main.main(["verify", "none", "--log-format", "github"]) == 5
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("::error title=E-PATH-NOT-FOUND::none: there is no such directory")
    )
    assert Path("summary.md").read_text() == (
        "### quark ended with an error\n\n- none: there is no such directory [E-PATH-NOT-FOUND]\n\n"
    )


@pytest.mark.parametrize("event", ["message", "phase", "part", "plan", "done", "error", "traceback", "library"])
def test_every_event_is_on_the_page(event):
    assert f"| `{event}` |" in PAGE.read_text(encoding="utf-8")
