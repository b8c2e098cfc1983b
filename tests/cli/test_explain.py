"""`quark recipes explain`, and what `quark plan` says of shared scales and of the smallest scale of the cache."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Quark

RECIPE = """\
schema: quark/recipe/1
quantize:
  quant_cfg:
    - {quantizer_path: '*', enable: false}
    - quantizer_path: '*.weight_quantizer'
      cfg: {element: fp8_e4m3}
    - quantizer_path: '*down_proj*'
      enable: false
"""
DOWN = "model.layers.0.mlp.down_proj"


def test_explain_names_file_and_line(quark: Quark, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(RECIPE)
    code, out, err = quark("recipes", "explain", "own.yaml", DOWN, "--model", "demo")
    assert code == 0, err
    rows = [line for line in out.splitlines() if "own.yaml:" in line]
    assert [row.split()[-1] for row in rows] == ["own.yaml:4:7", "own.yaml:5:7", "own.yaml:7:7"]
    assert [row.startswith("*  ") for row in rows] == [False, False, True]
    assert "not quantized" in out
    code, out, _ = quark("recipes", "explain", "own.yaml", f"{DOWN}.weight_quantizer", "--model", "demo", "--json")
    found = json.loads(out)
    assert (code, found["slot"], found["spec"]) == (0, f"{DOWN}.weight_quantizer", None)
    assert found["matches"][-1]["origin"] == "own.yaml:7:7"
    assert found["matches"][1]["after"]["element"] == "fp8_e4m3"


def test_explain_an_unknown_slot(quark: Quark) -> None:
    code, out, err = quark("recipes", "explain", "nvfp4", "model.layers.0.mlp.dwn_proj", "--model", "demo")
    assert (code, out) == (3, "")
    assert "no quantizer is called" in err and "down_proj" in err


def test_share_rows_are_part_of_a_plan(quark: Quark, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(RECIPE + "share: [{slots: ['*.o_proj.weight_quantizer', '*.q_proj.*']}]\n")
    code, out, err = quark("plan", "--model", "demo", "--recipe", "own.yaml", "--json", "--full")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["share"] == [{"slots": ["*.o_proj.weight_quantizer", "*.q_proj.*"], "origin": "own.yaml:9:9"}]
    groups = {plan["targets"][f"model.layers.0.self_attn.{leaf}_proj"]["scale_group"] for leaf in "qkvo"}
    assert len(groups) == 1
    (tmp_path / "own.yaml").write_text(RECIPE + "share: [{slots: ['*.oo_proj.*']}]\n")
    code, _, err = quark("plan", "--model", "demo", "--recipe", "own.yaml")
    assert code == 3
    assert "own.yaml:9:9" in err and "matches none of" in err


def test_min_kv_scale(quark: Quark) -> None:
    flags = ("--model", "demo", "--scheme", "mxfp4", "--calib-data", "builtin")
    code, out, err = quark("plan", *flags, "--kv-cache", "fp8", "--min-kv-scale", "0.25", "--json", "--full")
    assert code == 0, err
    slot = json.loads(out)["slots"]["model.layers.1.self_attn.v_bmm_quantizer"]
    assert slot["spec"]["scale"]["minimum"] == 0.25
    assert slot["entry"]["origin"] == "--min-kv-scale 0.25"
    code, _, err = quark("plan", *flags, "--min-kv-scale", "0.25")
    assert code == 3
    assert "--min-kv-scale" in err and "no KV cache" in err
    assert quark("plan", *flags, "--kv-cache", "fp8", "--min-kv-scale", "-1").code == 2


def test_a_quantized_source_is_explained(quark: Quark) -> None:
    """Its weights are in the files as codes and scales."""
    assert quark("quantize", "--model", "demo", "--scheme", "int4_wo_128", "-o", "out")[0] == 0
    code, out, err = quark("recipes", "explain", "nvfp4", DOWN, "--model", "out")
    assert code == 0, err
    assert "ends as     fp4_e2m1 group 16" in out
