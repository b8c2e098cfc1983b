"""The Python API does what the command line does."""

from __future__ import annotations

import pytest

import quarkcli
from quarkcli.errors import ConfigError, UsageError
from quarkcli.events import Phase


def test_quantize_returns_the_report_and_tells_events(tmp_path, capsys):
    events = []
    report = quarkcli.quantize(
        "demo", "mxfp4", output=tmp_path / "out", listener=events.append, exclude=["*down_proj"], device="cpu"
    )
    assert report["schema"] == "quark/report/1"
    assert (tmp_path / "out" / "quark" / "manifest.json").is_file()
    assert Phase("verify") in events
    assert "--exclude '*down_proj'" in report["kept_reasons"]
    assert capsys.readouterr() == ("", "")


def test_make_plan():
    plan = quarkcli.make_plan("demo", recipe="mxfp4", layers=["*down_proj=int4_wo_128"])
    assert plan.targets["model.layers.0.mlp.down_proj"].weight.element == "int4"
    assert plan.targets["model.layers.0.mlp.up_proj"].weight.element == "fp4_e2m1"


def test_load_recipe():
    assert quarkcli.load_recipe("nvfp4-kv_fp8").kv_cache == "fp8"
    with pytest.raises(ConfigError):
        quarkcli.load_recipe("nope")


def test_mistakes():
    with pytest.raises(UsageError):
        quarkcli.make_plan("demo")
    with pytest.raises(TypeError, match="colour"):
        quarkcli.make_plan("demo", "mxfp4", colour="red")
    assert quarkcli.Options(model="demo").seed is None
