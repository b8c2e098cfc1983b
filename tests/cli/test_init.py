"""`quark init`: what it writes loads, plans for the model, and says why; GPUs and servers choose among schemes."""

from __future__ import annotations

import json

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
    data = scheme == "nvfp4"
    assert found.kv_cache == ("fp8" if data else "none")
    assert (found.calib_seqlen, found.calib_samples) == ((256, 512) if data else (None, None))
    code, out, _ = quark("plan", "--model", model, "--recipe", "mine.yaml", "--calib-data", "builtin",
                         "--target", "vllm", "--json")  # fmt: skip
    plan = json.loads(out)
    assert (code, plan["recipe"]["scheme"]) == (0, scheme)
    assert [name for name, _ in found.algorithms] == (["smoothquant", "gptq"] if data else ["rtn"])


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
