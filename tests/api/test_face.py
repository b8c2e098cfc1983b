"""The face of the Python API: names and their types, options, short texts at a prompt, views for notebooks."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import traceback
from dataclasses import fields
from html.parser import HTMLParser
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest

import quarkcli
from quarkcli.api.options import RunOptions
from quarkcli.api.results import Report
from quarkcli.errors import QuarkError, UsageError
from quarkcli.events import Event, Message, PartDone, Phase, Working
from quarkcli.job.options import Options
from quarkcli.plan.compose import Overrides

BUILTIN = {"calib_data": "builtin", "offline": True}
OWN = {"model", "scheme", "recipe", "output", "overrides", "command"}  # arguments of their own


def test_options_are_in_the_signature_by_name_where_completion_looks() -> None:
    for function in (quarkcli.quantize, quarkcli.make_plan):
        shown = signature(function).parameters
        assert RunOptions.__annotations__.keys() < shown.keys()
        assert shown["exclude"].kind is Parameter.KEYWORD_ONLY and shown["exclude"].annotation == "Sequence[str]"
        assert all(parameter.kind is not Parameter.VAR_KEYWORD for parameter in shown.values())


class Cells(HTMLParser):
    """Collects the text of a view and counts what it opens and closes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# ---- names and types


def test_the_stub_has_the_names_of_the_module():
    tree = ast.parse(Path(quarkcli.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes = {alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert homes == quarkcli._HOMES
    (listed,) = (node for node in tree.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(listed.value) == quarkcli.__all__


def test_tab_completes():
    assert set(quarkcli.__all__) <= set(dir(quarkcli))


def test_the_typed_options_are_those_of_a_run():
    """Names, and the types but for what the API takes in more forms."""
    run = {**get_type_hints(Options), **get_type_hints(Overrides)}
    wanted = {f.name for one in (Options, Overrides) for f in fields(one)} - OWN
    typed = get_type_hints(RunOptions, localns=_names())
    assert set(typed) == wanted
    assert {name for name in wanted if typed[name] != run[name]} == {"calib_data", "dialect", "chat_template"}


def _names() -> dict[str, Any]:
    from quarkcli.job.options import Offload, OnNonfinite
    from quarkcli.plan.fused import Servers
    from quarkcli.recipe.entries import Entry

    return {"Offload": Offload, "OnNonfinite": OnNonfinite, "Servers": Servers, "Entry": Entry}


USER = """
import quarkcli
quarkcli.quantize("demo", "mxfp4", output="out", exclude=["*.q_proj"]).get("size")
quarkcli.make_plan("demo", "nvfp4", calib_samples=8).targets
quarkcli.quantise("demo")
quarkcli.quantize("demo", "mxfp4", exclud=["*"])
quarkcli.make_plan("demo", calib_samples="many")
"""

# What quark itself stands on is not looked at: it is large, and none of the user's words come from there.
SETTINGS = """
[mypy]
strict = True
follow_imports = silent
[mypy-torch.*,transformers.*,numpy.*,pydantic.*,safetensors.*,huggingface_hub.*,yaml.*,rich.*,typer.*]
follow_imports = skip
ignore_missing_imports = True
"""


def test_a_type_checker_sees_names_options_and_types(tmp_path):
    """One run of mypy, as strict as it can be, over what a user would write: three mistakes, none else."""
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    root = str(Path(quarkcli.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "user.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": root}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in ran.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in lines] == ["5", "6", "7"], ran.stdout + ran.stderr
    assert "quantise" in lines[0] and "exclud" in lines[1] and "calib_samples" in lines[2]


# ---- what a prompt and a notebook show


def test_a_plan_is_one_line_and_a_table():
    plan = quarkcli.make_plan("demo", "nvfp4", **BUILTIN)
    assert repr(plan) == f"<plan nvfp4 for llama: 28 of 30 weights quantized, 6 parts, {len(plan.entries)} entries>"
    cells = Cells(plan._repr_html_()).texts
    assert "down" in cells and "nvfp4, groups of 16; inputs nvfp4, static scale" in cells
    quarkcli.disable_quantizer(plan, "*down*")
    assert "24 of 30" in repr(plan)


def test_a_report_is_one_line_and_a_table(tmp_path):
    report = quarkcli.quantize("demo", "mxfp4", output=tmp_path / "out")
    assert isinstance(report, Report)
    assert json.loads(json.dumps(report)) == json.loads((tmp_path / "out" / "quark" / "report.json").read_text())
    assert repr(report).startswith("<quark report: tiny-llama, mxfp4; ") and len(repr(report)) < 200
    cells = Cells(report._repr_html_()).texts
    assert any("weight error" in cell for cell in cells)
    assert "output_bytes" in report["size"]


def test_reports_that_are_no_single_run():
    assert repr(Report()) == "<quark report: of another rank>"
    assert "dialects" in repr(Report(dialects={}))
    assert Cells(Report()._repr_html_()).texts


def test_names_from_outside_are_escaped():
    size = {"source_bytes": 2, "output_bytes": 1}
    found = {
        "model": {"name": "<script>"}, "recipe": {"name": "x"}, "size": size, "seconds": 1.0,
        "warnings": ["<i>"], "evaluation": None, "loss": {"output_errors": {}, "weight_errors": {}},
    }  # fmt: skip
    assert "<script>, x" in Cells(Report(found)._repr_html_()).texts


def test_the_hint_stands_on_a_line_of_its_own():
    with pytest.raises(QuarkError) as caught:
        quarkcli.make_plan("demo")
    lines = "".join(traceback.format_exception(caught.value)).splitlines()
    assert f"hint: {caught.value.hint}" in lines
    assert "hint" not in str(caught.value)


# ---- progress in a notebook


class Place:
    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, html: str) -> None:
        self.shown.append(html)


def test_a_notebook_sees_one_place_change(monkeypatch):
    place, module = Place(), ModuleType("IPython.display")
    module.HTML, module.display = str, lambda html, display_id: place  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    tell = quarkcli.NotebookProgress()
    part = PartDone(2, 6, "model.layers.0", "nvfp4", 1.5, None, 10**9, 0, 3.0)
    events: list[Event] = [Phase("quantize"), Message("<careful>", "warning"), Working("working"), part]
    for event in events:
        tell(event)
    last = place.shown[-1]
    assert "2/6" in last and "model.layers.0 nvfp4" in last and "&lt;careful&gt;" in last


def test_without_ipython_the_listener_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(UsageError, match="IPython is not installed"):
        quarkcli.NotebookProgress()


@pytest.mark.parametrize("name", ["kv_cache", "attention", "dialect", "calib_data"])
def test_an_empty_name_does_not_stand_for_none(name: str) -> None:
    with pytest.raises(QuarkError, match=r"''|is empty"):
        quarkcli.make_plan("demo", "fp8", **{"calib_data": "builtin", name: ""})
