"""`quark eval`: what it measures, from what, and what it refuses. Numbers against transformers: tests/consumers."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import AccessError, CheckError, DataError, ModelError, UsageError
from quarkcli.evaluation import gates
from quarkcli.evaluation.run import _check_baseline, evaluate
from quarkcli.events import Event, Message, PartDone, silent
from quarkcli.model.tokenizer import load_tokenizer
from tests import runs

DEMO = str(EMBEDDED)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.txt"
    path.write_text(runs.topics(20, 24)[:3000])
    return path


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> runs.Made:
    folder = tmp_path_factory.mktemp("fp8")
    data = runs.data(runs.text_file(folder / "t.txt"), 8)
    return runs.run("demo", folder / "out", scheme="fp8", kv_cache="fp8", **data)


def measure(folder: Path | str, page: Path, **options: Any) -> dict[str, Any]:
    return evaluate(str(folder), text=str(page), **{"device": "cpu", "window": 64, "tell": silent, **options})


def test_a_model_is_no_distance_from_itself(page: Path) -> None:
    result = measure(DEMO, page, baseline=DEMO)
    assert (result["directory"], result["baseline"]) == ("demo", "demo")  # where it lies is shown nowhere
    assert result["kl"] == 0
    assert result["top1_agreement"] == 1
    assert result["perplexity_increase"] == 0
    assert result["perplexity"] == result["baseline_perplexity"]


def test_windows_do_not_overlap_and_their_first_token_is_not_scored(page: Path) -> None:
    count = len(load_tokenizer(EMBEDDED).encode(page.read_text()))
    for window in (32, 100):
        assert measure(DEMO, page, window=window)["tokens"] == count // window * (window - 1)
    assert measure(DEMO, page, max_tokens=200)["tokens"] == 3 * 63


def test_windows_begin_with_what_the_tokenizer_puts_there(page: Path, tmp_path: Path) -> None:
    """Against transformers' own forward: BOS stands before every window and is not scored."""
    source = runs.build("llama", tmp_path / "m", torch.float32)
    inner = runs.tokenizer(bos=True)
    inner.save_pretrained(source)
    text = page.read_text()[:300]
    (tmp_path / "t.txt").write_text(text)
    found = measure(source, tmp_path / "t.txt", window=33)
    ids = torch.tensor(inner.encode(text, add_special_tokens=False))
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    rows = torch.cat([torch.full((len(rows), 1), inner.bos_token_id), rows], dim=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].reshape(-1, 264), rows[:, 1:].reshape(-1))
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert (found["bos"], found["tokens"]) == ([inner.bos_token_id], rows[:, 1:].numel())
    off = measure(source, tmp_path / "t.txt", window=33, bos="off")
    assert off["bos"] == [] and off["tokens"] == len(ids) // 33 * 32
    assert off["perplexity"] != found["perplexity"]
    with pytest.raises(UsageError, match="no BOS token"):
        measure(runs.build("llama", tmp_path / "n"), page, bos="on")


def test_windows_and_baselines_fit_the_model(page: Path, tmp_path: Path) -> None:
    """GPT-2 says n_positions and n_layer; its table of positions has no more rows."""
    config = {"vocab_size": 300, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    model.save_pretrained(tmp_path)
    runs.tokenizer().save_pretrained(tmp_path)
    assert measure(tmp_path, page, window=None)["window"] == 128
    with pytest.raises(DataError, match="is more than the model's 128 positions"):
        measure(tmp_path, page, window=129)
    short = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(config | {"n_layer": 1})))
    short.save_pretrained(tmp_path / "short")
    with pytest.raises(UsageError, match="num_hidden_layers is 1, but 2 in the checkpoint"):
        measure(tmp_path, page, baseline=str(tmp_path / "short"))


def test_tokens_without_a_row_in_the_embedding(page: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", vocab_size=64)
    with pytest.raises(DataError, match="but the model's embedding has only 64 rows"):
        measure(source, page)
    with pytest.raises(DataError, match="but the model's embedding has only 64 rows"):
        runs.run(source, tmp_path / "out", scheme="fp8", **runs.data(page, 8))
    assert not list(tmp_path.glob("out*"))


def test_text_in_another_encoding(page: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(page.read_text().encode("utf-16"))
    seen: list[Event] = []
    found = measure(DEMO, tmp_path / "t.txt", max_tokens=200, tell=seen.append)
    assert found["perplexity"] == measure(DEMO, page, max_tokens=200)["perplexity"]
    assert any(isinstance(event, Message) and "read as UTF-16" in event.text for event in seen)


def test_without_a_baseline(fp8: runs.Made, page: Path) -> None:
    alone = measure(fp8.folder, page)
    assert alone["kl"] is alone["baseline_perplexity"] is alone["top1_agreement"] is None
    both = measure(fp8.folder, page, baseline=DEMO)
    assert alone["perplexity"] == both["perplexity"]
    increase = both["perplexity"] / both["baseline_perplexity"] - 1
    assert both["perplexity_increase"] == pytest.approx(increase, rel=1e-9)
    assert (both["schema"], both["window"], both["dtype"], both["device"]) == ("quark/eval/1", 64, "float32", "cpu")


def test_everything_comes_from_config_and_tensors(fp8: runs.Made, page: Path, tmp_path: Path) -> None:
    shutil.copytree(fp8.folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "quark")
    (tmp_path / "copy" / "quantization_config.json").unlink()
    assert measure(tmp_path / "copy", page)["perplexity"] == measure(fp8.folder, page)["perplexity"]


@pytest.fixture(scope="module")
def losses(fp8: runs.Made, page: Path) -> dict[bool, float]:
    """KL of the checkpoint as it was written, by `weights_only`."""
    return {flag: measure(fp8.folder, page, baseline=DEMO, weights_only=flag)["kl"] for flag in (False, True)}


@pytest.mark.parametrize("leaf", ["mlp.down_proj.input_scale", "self_attn.v_scale", "self_attn.k_scale"])
def test_stored_scales_matter(leaf: str, fp8: runs.Made, losses: dict[bool, float], page: Path, tmp_path: Path) -> None:
    """A hundredth of the range clips nearly everything; with weights alone it does not count."""
    name = f"model.layers.1.{leaf}"
    shutil.copytree(fp8.folder, tmp_path / "copy")
    for file in (tmp_path / "copy").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = tensors[name] / 100
            save_file(tensors, file, metadata={"format": "pt"})
    bad, alone = (measure(tmp_path / "copy", page, baseline=DEMO, weights_only=flag) for flag in (False, True))
    assert bad["kl"] > 10 * losses[False]
    assert alone["kl"] == losses[True] < losses[False]


def test_events(fp8: runs.Made, page: Path) -> None:
    seen: list[Event] = []
    measure(fp8.folder, page, baseline=DEMO, tell=seen.append)
    parts = [event for event in seen if isinstance(event, PartDone)]
    assert [part.name for part in parts] == [f"block {index}" for index in range(4)]
    assert all(0 < part.error < 0.2 for part in parts)
    assert any(isinstance(event, Message) and "windows of 64 tokens" in event.text for event in seen)


@pytest.mark.parametrize("step", ["rotation", "permutation"])
def test_turned_hidden_states_have_no_drift(step: str, page: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"schema: quark/recipe/1\nquantize:\n  scheme: mxfp8\n  algorithm: [{{method: {step}}}]\n")
    data = runs.data(runs.text_file(tmp_path / "t.txt"), 8) if step == "permutation" else {}
    made = runs.run("demo", tmp_path / "out", recipe=str(recipe), **data)
    seen: list[Event] = []
    result = measure(made.folder, page, baseline=DEMO, tell=seen.append)
    assert result["drift"] == [] and result["kl"] < 0.02
    assert all(event.error is None for event in seen if isinstance(event, PartDone))
    assert any(isinstance(event, Message) and "no drift to measure" in event.text for event in seen)


def test_dtypes(fp8: runs.Made, page: Path) -> None:
    exact, rounded = (measure(fp8.folder, page, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert rounded["dtype"] == "bfloat16"
    assert rounded["perplexity"] == pytest.approx(exact["perplexity"], rel=0.02)
    assert rounded["perplexity"] != exact["perplexity"]
    with pytest.raises(UsageError, match="unknown dtype 'half'"):
        measure(fp8.folder, page, dtype="half")


def test_the_built_in_text(fp8: runs.Made) -> None:
    result = evaluate(str(fp8.folder), max_tokens=512, device="cpu", tell=silent)
    assert (result["text"], result["tokens"]) == ("builtin", 2 * 255)


def test_a_quantized_head_reads_a_quantized_input(page: Path, tmp_path: Path) -> None:
    data = runs.data(runs.text_file(tmp_path / "t.txt"), 8)
    made = runs.run("demo", tmp_path / "out", scheme="nvfp4", exclude=["*layers*"], include=["lm_head"], **data)
    both, weights = (measure(made.folder, page, baseline=DEMO, weights_only=flag) for flag in (False, True))
    assert both["kl"] > 1.3 * weights["kl"] > 0
    assert both["baseline_perplexity"] == weights["baseline_perplexity"]


def test_refusals(fp8: runs.Made, page: Path, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="no such text file"):
        measure(DEMO, tmp_path / "absent.txt")
    (tmp_path / "short.txt").write_text("few words")
    with pytest.raises(DataError, match="fewer than one window of 64") as error:
        measure(DEMO, tmp_path / "short.txt")
    smaller = re.fullmatch(r"give a longer text, or --window (\d+)", error.value.hint)
    assert smaller and measure(DEMO, tmp_path / "short.txt", window=int(smaller[1]))["tokens"] > 0
    for name in ("rows.jsonl", "rows.json", "rows.jsonl.gz"):  # whose braces would be measured too
        (tmp_path / name).write_text('{"text": "few words"}\n' * 99)
        with pytest.raises(DataError, match="rows in JSON"):
            measure(DEMO, tmp_path / name)
    for text, options in ((page, {"window": 64}), (None, {})):
        with pytest.raises(DataError, match=r"--tokens 5 is fewer than one window of (64|256)") as error:
            evaluate(DEMO, text=text and str(text), max_tokens=5, device="cpu", tell=silent, **options)
        assert error.value.kind == "E-DATA-SEQLEN" and error.value.hint.startswith("use --tokens")
    size = len(load_tokenizer(EMBEDDED).encode("few words"))
    with pytest.raises(DataError, match=f"the text has {size} tokens"):  # all of it is too short
        measure(DEMO, tmp_path / "short.txt", max_tokens=2)
    with pytest.raises(AccessError):
        measure(tmp_path / "absent", page)
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(DataError, match="is not text"):
        measure(DEMO, tmp_path / "binary.txt")
    other = runs.build("llama", tmp_path / "other")
    with pytest.raises(UsageError, match="vocab_size is 264, but 4096 in the checkpoint"):
        measure(fp8.folder, page, baseline=str(other))
    with pytest.raises(UsageError, match="hidden_size is 64, but 128 in the checkpoint"):
        _check_baseline({"vocab_size": 9, "hidden_size": 128}, {"vocab_size": 9, "n_embd": 64})
    shutil.copytree(fp8.folder, tmp_path / "foreign")
    config = (tmp_path / "foreign" / "config.json").read_text()
    (tmp_path / "foreign" / "config.json").write_text(config.replace('"compressed-tensors"', '"bitsandbytes"'))
    with pytest.raises(ModelError, match="quantized with 'bitsandbytes', which quark cannot read"):
        measure(tmp_path / "foreign", page)


def test_gates() -> None:
    result = {"kl": 0.05, "perplexity_increase": 0.02, "directory": "out"}
    assert gates.judged(result, None, None) == {**result, "ok": True, "limits": []}
    assert [row["passed"] for row in gates.judged(result, 0.05, 0.02)["limits"]] == [True, True]
    with pytest.raises(CheckError, match=r"KL 0.05000 is above 0.01") as caught:
        gates.judged(result, 0.01, 0.03)
    assert caught.value.code == 8 and caught.value.result is not None and caught.value.result["ok"] is False
    assert [row["passed"] for row in caught.value.result["limits"]] == [False, True]
    with pytest.raises(CheckError, match=r"KL .*; perplexity rose by 2.00%, more than 1.00%"):
        gates.judged(result, 0.01, 0.01)
    with pytest.raises(CheckError):
        gates.judged({**result, "kl": math.nan}, 1.0, None)
    with pytest.raises(UsageError, match="compare with a baseline"):
        gates.check_asked(None, 0.1, None)


def test_mixed_sources_keep_their_dtypes(page: Path, tmp_path: Path) -> None:
    """A float32 source measures as float32 on both sides, whatever the demo's bfloat16."""
    source = runs.build("llama", tmp_path / "m", torch.float32)
    made = runs.run(source, tmp_path / "out", scheme="int4_wo_128")
    assert runs.read_all(made.folder)["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32
    result = measure(made.folder, page, baseline=str(source), max_tokens=640)
    assert 0 < result["kl"] < 0.05


def test_a_block_that_config_json_does_not_count_is_refused(page: Path, tmp_path: Path) -> None:
    """The model's class leaves it out, and the perplexity would be that of another model."""
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))
    with pytest.raises(ModelError, match=r"model\.layers\.3 is one block too many: config\.json has 3"):
        measure(model, page)
