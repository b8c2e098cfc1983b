"""`quark quantize` and `quark plan` on the embedded model."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from shutil import copytree

import pytest

from quarkcli.cli import amounts, jobflags, planview
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.job import run as job
from quarkcli.plan.compose import Overrides

MXFP4 = ("--model", "demo", "--scheme", "mxfp4")


def test_quantize_prints_the_directory_and_tells_the_rest_on_stderr(quark, tmp_path):
    code, out, err = quark("quantize", *MXFP4, "-o", "out")
    assert code == 0
    assert out == "out\n"
    assert (tmp_path / "out" / "quark" / "manifest.json").is_file()
    assert not (tmp_path / "out.partial").exists()
    for text in ("tiny-llama -> mxfp4", "no calibration data", "phase: verify", "[6/6] tail kept"):
        assert text in err
    for label in ("size", "bits", "bytes", "error", "peak", "time", "kept", "checked", "next"):
        assert any(line.startswith(label) for line in err.splitlines()), label
    assert "quark eval out --baseline demo" in err
    assert "vllm serve out" in err


def test_the_report_with_json_and_nothing_else_with_quiet(quark):
    code, out, err = quark("quantize", *MXFP4, "-o", "out", "--json", "-q")
    assert code == 0
    assert err == ""
    report = json.loads(out)
    assert report["schema"] == "quark/report/2"
    assert report["recipe"]["name"] == "mxfp4"


def test_default_output_is_model_and_scheme(quark, tmp_path):
    code, out, _ = quark("quantize", *MXFP4, "-q")
    assert (code, out) == (0, "demo-mxfp4\n")
    assert (tmp_path / "demo-mxfp4").is_dir()


@pytest.mark.parametrize("name", ["/../../up", "a/b", "a\0b"])
def test_a_recipe_cannot_name_another_place(quark, tmp_path, name):
    recipe = {"schema": "quark/recipe/1", "metadata": {"name": name}, "quantize": {"scheme": "mxfp4"}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    code, out, err = quark("plan", "--model", "demo", "--recipe", "r.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["output"] == "demo-" + name.replace("/", "-").replace("\0", "-")


def test_an_existing_output_is_refused_unless_overwritten(quark, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, out, err = quark("quantize", *MXFP4, "-o", "out", "-q")
    assert (code, out) == (2, "")
    assert err.startswith("error: out: exists")
    assert "--overwrite" in err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_log_format_json_makes_every_line_of_stderr_an_object(quark):
    code, out, err = quark("quantize", *MXFP4, "-o", "out", "--log-format", "json")
    assert (code, out) == (0, "out\n")
    rows = [json.loads(line) for line in err.splitlines()]
    assert [row["event"] for row in rows[:3]] == ["phase", "phase", "plan"]
    assert rows[-1] == {
        "event": "done",
        "output": "out",
        "next": ["quark eval out --baseline demo", "vllm serve out"],
    }
    assert sum(row["event"] == "part" for row in rows) == 6


def test_dry_run_is_plan(quark, tmp_path):
    planned = quark("plan", *MXFP4)
    assert quark("quantize", *MXFP4, "--dry-run") == planned
    assert planned.code == 0
    assert list(tmp_path.iterdir()) == []


def test_plan_folds_classes_and_names_the_deciding_entry(quark):
    code, out, err = quark("plan", *MXFP4, "--exclude", "*layers.0.*", "--layer", "*down_proj=int4_wo_128", "--modules")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("model.", "lm_head"))}
    assert "--layer '*down_proj=int4_wo_128'" in rows["model.layers.{1-3}.mlp.down_proj"]
    assert "int4 group 128" in rows["model.layers.{1-3}.mlp.down_proj"]
    assert "scheme mxfp4" in rows["model.layers.{1-3}.self_attn.q_proj"]
    assert "--exclude '*layers.0.*'" in rows["model.layers.0.self_attn.q_proj.weight"]
    assert "norm" in rows["model.layers.*.input_layernorm.weight"]
    assert "default exclusion, role head" in rows["lm_head.weight"]


def test_plan_json_has_every_slot_with_its_decision(quark):
    code, out, err = quark("plan", *MXFP4, "--kv-cache", "fp8", "--calib-data", "builtin", "--json", "--full")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert plan["schema"] == "quark/plan/2"
    assert len(plan["targets"]) == 30  # 4 blocks of 7 linears, embedding, head
    assert len(plan["slots"]) == 30 * 4 + 4 * 4
    weight = plan["slots"]["model.layers.2.mlp.up_proj.weight_quantizer"]
    assert weight["spec"]["element"] == "fp4_e2m1"
    assert weight["spec"]["granularity"] == {"group": 32}
    decider = plan["entries"][weight["entry"]["index"]]
    assert decider["pattern"] == weight["entry"]["pattern"] == "*.weight_quantizer"
    assert decider["matches"] == 30
    assert plan["slots"]["lm_head.weight_quantizer"]["spec"] is None
    assert plan["slots"]["model.layers.0.self_attn.k_bmm_quantizer"]["entry"]["origin"] == "--kv-cache fp8"
    assert plan["needs"]["model.layers.0.self_attn.k"] == ["absmax"]
    assert plan["calibration"]["source"] == "builtin"
    assert [part["kind"] for part in plan["parts"]] == ["embed", *["block"] * 4, "tail"]
    assert plan["kept"]["model.norm.weight"].startswith("norm")
    for key in ("output_bytes", "source_bytes", "memory_bytes", "disk_bytes"):
        assert plan[key] > 0


def test_plan_says_that_calibration_flags_are_not_used(quark):
    _, out, _ = quark("plan", *MXFP4, "--calib-data", "builtin", "--calib-samples", "3")
    assert "no calibration data (--calib-data, --calib-samples not used)" in " ".join(out.split())


def test_planned_bytes_are_the_written_bytes(quark, made):
    _, out, _ = quark("plan", *MXFP4, "--json")
    assert json.loads(out)["output_bytes"] == sum(file.stat().st_size for file in made.glob("*.safetensors"))


def test_plan_of_calibrated_schemes_says_what_data(quark):
    code, out, err = quark("plan", "--model", "demo", "--scheme", "nvfp4", "--calib-samples", "7")
    assert code == 0
    assert "calibration 7 rows of 512 tokens from builtin" in " ".join(out.split())
    assert err.startswith("warning: calibrating on the built-in text")


@pytest.mark.parametrize(
    ("extra", "code", "text"),
    [
        (["--exclude", "*dwn_proj"], 3, "--exclude '*dwn_proj': '*dwn_proj' matches none of"),
        (["--layer", "x"], 2, "PATTERN=SCHEME"),
        (["--unprotect", "heads"], 3, "unknown role (kind of tensor) 'heads'"),
        (["--recipe", "nvfp4"], 2, "--scheme and --recipe exclude each other"),
        (["--dialect", "gguf"], 2, "unknown checkpoint format 'gguf'"),
        (["--algorithm", "magic"], 2, "unknown algorithm 'magic'"),
        (["--kv-cache", ""], 2, "--kv-cache: its value is empty"),
        (["--calib-data="], 2, "--calib-data: its value is empty"),
        (["-o", ""], 2, "--output: its value is empty"),
        (["--exclude", "*x", "--exclude="], 2, "--exclude: its value is empty"),
    ],
)
def test_wrong_flags(quark, extra, code, text):
    answer = quark("plan", *MXFP4, *extra)
    assert answer.code == code
    assert answer.out == ""
    assert text in answer.err


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("5m", 300), ("3h50m", 13800), ("1h0m1s", 3601), ("2h", 7200)]
)
def test_seconds(text, expected):
    assert amounts.seconds(text) == expected


def test_size():
    assert [amounts.size(text) for text in ("2kB", "2KB", "2KiB", "1.5 GB")] == [2000, 2000, 2048, 1_500_000_000]


@pytest.mark.parametrize("text", ["", "x", "3.5h", "-5", "0", "5m3h", "1d"])
def test_no_seconds(text):
    with pytest.raises(amounts.typer.BadParameter):
        amounts.seconds(text)


def test_every_option_of_the_job_has_a_flag_that_reaches_it():
    own = {field.name for field in fields(jobflags.JobFlags)}
    wanted = {field.name for field in fields(job.Options)} | {field.name for field in fields(Overrides)}
    assert wanted - own == {"overrides", "entries", "command"}  # entries are edits of a plan, made in Python
    screen = {"json", "quiet", "progress", "log_level", "log_format", "debug"}
    assert own - wanted == screen


def test_flags_become_options():
    given = jobflags.JobFlags(
        model="m", scheme="fp8", layers=["a=fp8"], calib_samples=3, time_budget=5.0, kv_cache="none", offline=True
    )
    options = given.options()
    assert options.command[0] == "quark"
    assert (options.scheme, options.calib_samples, options.time_budget, options.offline) == ("fp8", 3, 5.0, True)
    assert options.overrides.layers == ["a=fp8"]
    assert options.overrides.kv_cache == "none"
    assert options.overrides.exclude == ()


def test_offline_follows_the_hub_variable(quark, monkeypatch):
    seen = []
    monkeypatch.setattr(job, "prepare", lambda options, *_: seen.append(options.offline) or 1 / 0)
    quark("plan", *MXFP4)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    quark("plan", *MXFP4)
    quark("plan", *MXFP4, "--offline")
    assert seen == [True, False, True]


@pytest.mark.parametrize(("numbers", "text"), [([3], "3"), ([0, 2, 3, 4], "0,2-4"), ([5, 4, 4], "4-5")])
def test_ranges(numbers, text):
    assert planview.ranges(numbers) == text


def test_fold_says_which_layers_a_row_is_about():
    names = [f"layers.{layer}.experts.{expert}.up" for layer in range(3) for expert in range(2)]
    assert list(planview.fold([(name, "k") for name in names], names)) == [("layers.*.experts.*.up", 6, "k")]
    some = [(name, "k") for name in names if not name.startswith("layers.1")]
    assert list(planview.fold(some, names)) == [("layers.{0,2}.experts.*.up", 4, "k")]


def test_attention_and_outputs_are_part_of_a_plan(quark, tmp_path):
    (tmp_path / "home" / "schemes").mkdir(parents=True)
    fp8 = "{element: fp8_e4m3, scale: {dtype: f32}}"
    (tmp_path / "home" / "schemes" / "own.yaml").write_text(f"weight: {fp8}\ninput: {fp8}\noutput: {fp8}\n")
    flags = ("--model", "demo", "--scheme", "mxfp4", "--layer", "*down_proj=own", "--attention", "fp8")
    code, out, err = quark("plan", *flags, "--calib-data", "builtin", "--modules")
    assert code == 0, err
    assert "OUTPUT" in out and "BIAS" not in out
    assert "model.layers.*.self_attn.p_bmm_quantizer" in out
    assert "--attention fp8" in out
    code, out, err = quark("plan", *flags, "--calib-data", "builtin", "--json", "--full")
    plan = json.loads(out)
    slot = plan["slots"]["model.layers.1.self_attn.p_bmm_quantizer"]
    assert (slot["spec"]["element"], slot["entry"]["origin"]) == ("fp8_e4m3", "--attention fp8")
    assert plan["slots"]["model.layers.1.mlp.down_proj.output_quantizer"]["spec"]["element"] == "fp8_e4m3"
    assert plan["needs"]["model.layers.1.mlp.down_proj.output"] == ["absmax"]
    assert plan["needs"]["model.layers.1.self_attn.p"] == ["absmax"]
    code, out, _ = quark("plan", "--model", "demo", "--scheme", "mxfp4", "--attention", "none")
    assert code == 0
    assert "ATTENTION" not in out


def test_quiet_keeps_the_warning_about_the_data(quark):
    """The built-in text is for a test of the machinery: a script that asks for little must hear of it."""
    answer = quark("plan", "--model", "demo", "--scheme", "fp8", "--offline", "-q")
    assert answer.code == 0
    assert all(line.startswith("warning: ") for line in answer.err.splitlines())
    assert "built-in text" in answer.err
    assert quark("plan", "--model", "demo", "--scheme", "fp8", "--offline", "--log-level", "error").err == ""


def test_plan_says_of_the_output_what_quantize_says(quark, tmp_path, monkeypatch):
    """Inside the model's directory, where the default output lies too."""
    copytree(EMBEDDED, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    flags = ("--model", ".", "--scheme", "mxfp4")
    for more, place in (((), "model-mxfp4"), (("-o", "out"), "out"), (("-o", ".."), "..")):
        said = f"{place}: is inside the model's directory, or contains it"
        hint = "use -o with a directory outside the model's"
        planned = quark("plan", *flags, *more)
        assert planned.code == 0
        assert f"warning: {said}, so 'quark quantize' would stop (exit 2); {hint}" in planned.err
        refused = quark("quantize", *flags, *more)
        assert refused.code == 2
        assert f"error: {said} [E-OUTPUT-PLACE]\nhint: {hint}" in refused.err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    outside = ("-o", "../out")
    assert "would stop" not in quark("plan", *flags, *outside).err
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    planned = quark("plan", *flags, *outside)
    assert planned.code == 0
    assert f"{tmp_path}: cannot be written to, so 'quark quantize' would stop (exit 6); choose another" in planned.err
