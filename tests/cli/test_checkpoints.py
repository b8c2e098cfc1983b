"""inspect, verify, report, eval, env: commands about what is there."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

import quarkcli
from quarkcli.cli import tables
from quarkcli.disk import unfinished
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.writer import STATE
from quarkcli.errors import CheckError
from quarkcli.evaluation import run as evaluation


def test_inspect_a_source(quark):
    code, out, err = quark("inspect", "demo", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["schema"] == "quark/inspect/1"
    assert (found["family"], found["quantization"], found["experts"]) == ("llama", None, None)
    assert found["bytes"] == (EMBEDDED / "model.safetensors").stat().st_size
    assert found["parameters"] * 2 == found["dtypes"]["BF16"]["bytes"]
    assert found["roles"] == dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 4) | {
        "head": 1,
        "embedding": 1,
    }
    code, out, err = quark("inspect", "demo")
    assert (code, err) == (0, "")
    assert "LlamaForCausalLM" in out


def test_inspect_a_checkpoint_of_ours(quark, made):
    found = json.loads(quark("inspect", str(made), "--json").out)
    source = json.loads(quark("inspect", "demo", "--json").out)
    assert found["parameters"] == source["parameters"]
    assert found["quantization"]["method"] == "compressed-tensors"
    assert sum(found["quantization"]["modules"].values()) == 28


def test_python_says_what_the_commands_say(quark, made):
    assert {**quarkcli.inspect(made), "ok": True} == json.loads(quark("inspect", str(made), "--json").out)
    found = quarkcli.verify(made, source="demo", tp=[1, 2])
    assert found == json.loads(quark("verify", str(made), "--source", "demo", "--tp", "1,2", "--json").out)


def test_inspect_a_quantized_model_that_is_not_read(quark, tmp_path):
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (model / "config.json").write_text(json.dumps(config))
    code, out, _ = quark("inspect", "model")
    assert code == 0
    assert "which quark cannot read" in out


def test_a_checkpoint_whose_config_lost_its_quantization_config(quark, made, tmp_path):
    """Each command says so: eval told to check the weight files, and convert to quantize it."""
    lost = shutil.copytree(made, tmp_path / "lost")
    config = json.loads((lost / "config.json").read_text())
    del config["quantization_config"]
    (lost / "config.json").write_text(json.dumps(config))
    said = "holds codes of compressed-tensors, and config.json has no quantization_config that says so"
    for line in ("eval lost --tokens 256", f"compare lost {made}", "convert lost --to quark -o out"):
        code, out, err = quark(*line.split())
        assert (code, out) == (4, "")
        assert said in err and "add the quantization_config again" in err
    code, out, err = quark("inspect", "lost")
    assert code == 0 and said in err and "quantized     no" in out
    err = quark("verify", "lost").err
    assert "config.json has no quantization_config" in err and "add to it what quantization_config.json holds" in err
    (lost / "quantization_config.json").unlink()
    assert "run 'quark quantize' to make a checkpoint" in quark("verify", "lost").err


def test_verify(quark, made):
    code, out, err = quark("verify", str(made), "--source", "demo")
    assert (code, err) == (0, "")
    assert all(line.startswith("ok: ") for line in out.splitlines())
    assert "tensors of the original model are there" in out
    answer = json.loads(quark("verify", str(made), "--json").out)
    assert (answer["schema"], answer["ok"]) == ("quark/verify/1", True)


def test_a_split_of_what_servers_fuse(quark):
    """One message and a count; `--target none` is for those who mean it."""
    flags = ("--model", "demo", "--scheme", "mxfp4", "--exclude", "*k_proj")
    for command in (("plan",), ("quantize", "-o", "out"), ("quantize", "--dry-run")):
        code, out, err = quark(*command, *flags)
        assert (code, out) == (4, "")
        assert err.count("servers multiply together") == 1 and "error: 4 groups" in err
    code, out, err = quark("quantize", *flags, "-o", "out", "--target", "none")
    assert code == 0 and "groups of weights that servers multiply" in err
    assert quark("verify", "out").code == 8
    assert quark("verify", "out", "--target", "none").code == 0


def test_verify_says_no_with_8(quark, made, tmp_path):
    damaged = shutil.copytree(made, tmp_path / "damaged")
    shard = damaged / "model-block-00001.safetensors"
    tensors = load_file(shard)
    scale = next(name for name in tensors if name.endswith("scale"))
    tensors[scale] = tensors[scale].fill_(255)  # the NaN code of e8m0
    save_file(tensors, shard, {"format": "pt"})
    code, out, err = quark("verify", str(damaged), "--json")
    found, told = json.loads(out), json.loads(err)
    assert (code, told["code"], found["ok"]) == (8, 8, False)
    assert len(found["checks"]) > 5  # the others were made, and are good
    assert {problem["id"] for problem in found["problems"]} == {"E-CHECK-SCALES", "E-CHECK-FILES"}
    code, out, err = quark("verify", str(damaged))
    assert code == 8 and out.splitlines() == [f"ok: {line}" for line in found["checks"]]
    with pytest.raises(CheckError) as caught:
        quarkcli.verify(damaged)
    assert caught.value.result == found


def test_verify_of_a_source_says_no(quark):
    assert quark("verify", str(EMBEDDED)).code == 8


def test_report(quark, made):
    stored = json.loads((made / "quark" / "report.json").read_text())
    code, out, err = quark("report", str(made))
    assert (code, err) == (0, "")
    assert out.startswith("# tiny-llama, mxfp4\n")
    assert "## Kept in the original precision" in out
    for arguments in (["--json"], ["--format", "json"]):
        assert json.loads(quark("report", str(made), *arguments).out) == {**stored, "ok": True}


def test_report_on_a_terminal_is_no_markdown(quark, made, monkeypatch):
    """The same words; `--format md` brings back what a pipe gets."""
    piped = quark("report", str(made)).out
    plain = quark("report", str(made), "--format", "text").out
    monkeypatch.setattr(tables, "room", lambda name="stdout": 80)
    shown = quark("report", str(made)).out
    assert (
        not re.search(r"^#|\|", shown.replace("| inputs", ""), re.MULTILINE) and max(map(len, shown.split("\n"))) <= 80
    )
    assert quark("report", str(made), "--format", "md").out == piped
    assert {*shown.split()} == {*plain.split()}
    assert {*re.sub(r"[#|]|---", " ", piped).split()} <= {*shown.split(), "/"}
    for both in (["--html", "--json"], ["--html", "--format", "md"], ["--json", "--format", "text"]):
        assert quark("report", str(made), *both).code == 2


def test_report_of_what_has_none(quark, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    code, out, err = quark("report", "out")
    assert (code, out) == (4, "")
    assert "for the unfinished run there" in err
    assert quark("report", "nowhere").code == 5
    assert [quark("report", place).code for place in (".", "..", "/")] == [4, 4, 4]
    (tmp_path / "out.partial" / STATE).mkdir()
    unfinished.keep(tmp_path / "out.partial", "awq", "{}")
    (tmp_path / "out.partial" / "awq").mkdir()
    assert "run 'quark report out.partial' for the unfinished run" in quark("report", "out.partial/awq").err
    (tmp_path / "out" / "quark").mkdir()
    (tmp_path / "out" / "quark" / "report.json").write_text("{}")
    assert quark("report", "out").code == 4


RESULT = {
    "schema": "quark/eval/1", "directory": "d", "tokens": 100, "perplexity": 10.3, "baseline_perplexity": 10.0,
    "perplexity_increase": 0.03, "kl": 0.05, "top1_agreement": 0.9, "text": "builtin", "window": 256,
    "dtype": "float32", "seconds": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("gates", "code"),
    [
        ([], 0),
        (["--max-kl", "0.1", "--max-ppl-increase", "4%"], 0),
        (["--max-kl", "0.01"], 8),
        (["--max-ppl-increase", "2.5%"], 8),
    ],
)
def test_eval_shows_the_result_before_a_gate_fails(quark, monkeypatch, gates, code):
    calls = []
    monkeypatch.setattr(
        evaluation, "evaluate", lambda directory, **given: calls.append((directory, given)) or dict(RESULT)
    )
    answer = quark("eval", "d", "--baseline", "demo", "--tokens", "100", "--device", "cpu", "--json", *gates)
    assert answer.code == code
    shown = json.loads(answer.out)
    limits = shown.pop("limits")
    assert shown == {**RESULT, "ok": code == 0}
    names = {"max_kl": ("--max-kl", RESULT["kl"]), "max_ppl_increase": ("--max-ppl-increase", 0.03)}
    assert [names[limit["name"]][0] for limit in limits] == [word for word in gates if word.startswith("--")]
    assert all(limit["value"] == pytest.approx(names[limit["name"]][1]) for limit in limits)
    assert [limit["passed"] for limit in limits] == [code == 0] * len(limits)
    assert (answer.err == "") == (code == 0)
    ((directory, given),) = calls
    assert directory == "d"
    assert given["baseline"] == str(EMBEDDED)
    assert (given["max_tokens"], given["window"], given["device"]) == (100, None, "cpu")


def test_eval_for_people(quark, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda directory, **given: dict(RESULT))
    code, out, err = quark("eval", "d", "--baseline", "demo", "--device", "cpu")
    assert code == 0
    assert "baseline    10.0000 (+3.00% increase)" in out
    assert err == "1.0 s\n"


def test_gates_without_a_baseline_are_refused_before_the_work(quark):
    code, out, err = quark("eval", "nowhere", "--max-kl", "0.1")
    assert (code, out) == (2, "")
    assert "--baseline" in err


def test_eval_for_real(quark, made):
    code, out, _ = quark("eval", str(made), "--baseline", "demo", "--tokens", "512", "--device", "cpu", "--json", "-q")
    assert code == 0
    result = json.loads(out)
    assert result["schema"] == "quark/eval/1"
    assert result["kl"] > 0
    assert 0 < result["top1_agreement"] <= 1


def test_env(quark, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    code, out, err = quark("env", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["schema"] == "quark/env/1"
    assert found["packages"]["torch"]
    assert found["hub_token"] is True
    assert "verysecret" not in out
    assert "verysecret" not in quark("env").out


def test_the_class_is_asked_for_any_scheme(quark, tmp_path):
    code, _, err = quark("plan", "--model", "demo", "--scheme", "mxfp4", "--check-model")
    assert code == 0 and "model class: 39 of 39 tensors are its parameters" in err
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"architectures": ["NoSuchForCausalLM"], "model_type": "no"})
    )
    assert quark("plan", "--model", "model", "--scheme", "mxfp4").code == 0
    code, _, err = quark("plan", "--model", "model", "--scheme", "mxfp4", "--check-model")
    assert code == 4 and "does not know the model type" in err
