"""`quark init`: what it writes loads, plans for the model, and says why; GPUs and servers choose among schemes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quarkcli.job import choosing, rates
from quarkcli.recipe import advice, catalog, recipe
from tests import runs, tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models: dense, with tied head, a mixture of experts, and one with experts of its own names."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama_tied", "gemma2", "qwen3_moe", "mixtral"):
        tiny.build(family, folder / family)
        runs.tokenizer().save_pretrained(folder / family)
    return folder


@pytest.fixture
def for_any_size(monkeypatch):
    """The table of choices without the sizes that tiny models do not have."""
    rows = [row.model_copy(update={"least": 0.0}) for row in advice.choices()]
    monkeypatch.setattr(choosing, "choices", lambda: rows)


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize(("gpu", "scheme"), [("b200", "nvfp4"), ("h100", "ptpc_fp8"), ("a100", "int8_dynamic")])
def test_a_recipe_is_planned_as_it_is(quark, models, for_any_size, family, gpu, scheme):
    model = str(models / family)
    written = quark("init", model, "--gpu", gpu, "--server", "vllm", "-o", "mine.yaml")
    assert written == (0, "mine.yaml\n", "")
    found = recipe.from_file(catalog.find_recipe("mine.yaml"))
    assert (found.scheme, found.dialect) == (scheme, "compressed-tensors")
    steps = {"nvfp4": ["awq", "gptq"], "ptpc_fp8": ["rtn"], "int8_dynamic": ["autosmoothquant"]}[scheme]
    assert found.kv_cache == ("fp8" if scheme == "nvfp4" else "none")
    assert (found.calib_seqlen, found.calib_samples) == ((None, None) if steps == ["rtn"] else (256, 512))
    code, out, _ = quark("plan", "--model", model, "--recipe", "mine.yaml", "--calib-data", "builtin",
                         "--target", "vllm", "--json")  # fmt: skip
    plan = json.loads(out)
    assert (code, plan["recipe"]["scheme"]) == (0, scheme)
    assert [name for name, _ in found.algorithms] == steps


def test_it_says_why(quark, models, for_any_size):
    out = quark("init", str(models / "qwen3_moe"), "--gpu", "h100").out
    assert "# Not nvfp4: vLLM 0.32 runs it weight-only on hopper." in out
    assert "the GPU multiplies 8-bit floats directly" in out
    assert "mixture of experts" in out
    moe = quark("init", str(models / "qwen3_moe"), "--gpu", "b200").out
    assert "  moe: routed" in moe
    assert "--calib-data" in moe


def test_four_bits_where_eight_do_not_fit(quark, monkeypatch):
    """The embedded model's 2.9 MB in 8 bits, on devices with 3 MB; two of them have room."""
    monkeypatch.setattr(rates, "memory", lambda name: 3_000_000)
    assert "  scheme: int4_wo_128\n" in quark("init", "demo", "--gpu", "h100").out
    assert "leave too little of" in quark("init", "demo", "--gpu", "h100").out
    assert "  scheme: ptpc_fp8\n" in quark("init", "demo", "--gpu", "h100", "--tp", "2").out


PEERS = Path(__file__).resolve().parents[1] / "data" / "peers"


@pytest.mark.parametrize(
    ("peer", "server", "stored", "runs"),
    [
        ("published-gpt-oss", "vllm", "mxfp4: fp4_e2m1 group 32", "weight-only"),
        ("gptqmodel-int4", "vllm", "gptq: int4 group 128", "weight-only"),
    ],
)
def test_what_is_quantized_and_served_as_it_is_needs_nothing(quark, peer, server, stored, runs):
    code, out, err = quark("init", str(PEERS / peer), "--gpu", "h100", "--server", server)
    assert (code, out) == (4, "")
    assert f"quantized already ({stored}); vLLM 0.32 loads it as it is and runs it {runs} on hopper" in err
    assert "hint: use it as it is" in err


def test_a_quantized_source_is_made_smaller_or_loadable(quark):
    """8 bits become 4; a form that the server does not load becomes one that it does, whatever its size."""
    model = str(PEERS / "published-deepseek-v3")
    found = json.loads(quark("init", model, "--gpu", "h100", "--json").out)
    assert (found["scheme"], found["source"]["runs"], found["source"]["refused"]) == ("int4_wo_128", "fast", None)
    assert "of the bytes of the source, which is quantized already" in found["passed_over"]["ptpc_fp8"]
    assert "this rounds it once more" in " ".join(found["recipe"].replace("#", "").split())
    found = json.loads(quark("init", str(PEERS / "llmcompressor-gpt-oss-w4a16"), "--gpu", "h100", "--json").out)
    assert (found["scheme"], found["source"]["runs"]) == ("mxfp4_weight_only", None) and found["source"]["refused"]


def test_experts_alone_where_a_server_loads_no_more(quark, tmp_path):
    model = str(runs.build("gpt_oss", tmp_path / "m"))
    assert quark("init", model, "--gpu", "h100", "-o", "mine.yaml") == (0, "mine.yaml\n", "")
    recipe = " ".join(Path("mine.yaml").read_text().replace("#", "").split())
    assert "KV cache: fp8 does not work for this model: checkpoint format mxfp4 cannot hold this plan" in recipe
    plan = quark(
        "plan", "--model", model, "--recipe", "mine.yaml", "--calib-data", "builtin", "--target", "vllm", "--json"
    )
    found = json.loads(plan.out)
    assert plan.code == 0 and found["dialect"]["name"] == "mxfp4"
    assert [group["name"] for group in found["groups"] if group["quantized"]] == ["experts"]


def test_answers_for_scripts(quark):
    found = json.loads(quark("init", "demo", "--gpu", "hopper", "--server", "SGLang", "--json").out)
    assert (found["schema"], found["generation"], found["server"]) == ("quark/init/1", "hopper", "sglang")
    assert found["runs"] == "fast"
    assert found["recipe"].startswith("# Made by: quark init demo")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--gpu", "h10"), 2, "did you mean h100"),
        (("--gpu", "h100", "--server", "vlm"), 2, "did you mean vllm"),
        (("--gpu", "h100", "-o", "no/where.yaml"), 2, "no such directory"),
        (("--gpu", "mi250x", "--server", "sglang"), 4, "no scheme was found"),
    ],
)
def test_refusals(quark, words, code, message):
    answer = quark("init", "demo", *words)
    assert (answer.code, answer.out) == (code, "")
    assert message in answer.err


def test_an_error_of_the_model_is_said_once(quark, tmp_path):
    (tmp_path / "empty").mkdir()
    answer = quark("init", "empty", "--gpu", "h100")
    assert answer.code == 4
    assert "no scheme was found" not in answer.err


def test_rows_of_the_table_are_schemes():
    assert {row.scheme for row in advice.choices()} <= set(catalog.files("schemes"))
