"""NaN and infinity in tensors that are copied: nothing is published, verified or measured over them unasked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli.cli import main
from quarkcli.disk import nonfinite
from quarkcli.errors import CheckError, DataError, Stopped
from quarkcli.evaluation import score
from quarkcli.evaluation.gates import judged
from tests import runs

NAN, INF = float("nan"), float("inf")
EVAL = ["--window", "32", "--tokens", "96", "--device", "cpu"]
# (family, tensor, value): everything that a model computes with and that stays as it is.
PLACES = [
    ("llama", "model.norm.weight", NAN),
    ("llama", "model.embed_tokens.weight", INF),
    ("llama", "lm_head.weight", -INF),
    ("llama", "model.layers.1.input_layernorm.weight", NAN),
    ("qwen3_moe", "model.layers.0.mlp.gate.weight", INF),
    ("gpt_oss", "model.layers.1.self_attn.sinks", NAN),
    ("gpt_oss", "model.layers.1.self_attn.q_proj.bias", NAN),
]


def changed(source: Path, **values: Any) -> Path:
    """The same model with other tensors, or more of them; `__` in a name stands for a dot."""
    file = source / "model.safetensors"
    tensors = load_file(file) | values
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return source


def broken(family: str, name: str, value: float, folder: Path) -> Path:
    source = runs.build(family, folder)
    tensor = load_file(source / "model.safetensors")[name]
    tensor.view(-1)[-1] = value
    return changed(source, **{name: tensor})


def code(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Exit code and everything said."""
    capsys.readouterr()
    found = main.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return found, out + err


@pytest.mark.parametrize(("family", "name", "value"), PLACES)
def test_a_kept_parameter_is_refused_everywhere(
    family: str, name: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = broken(family, name, value, tmp_path / "m"), tmp_path / "out"
    command = ("quantize", "--model", source, "--scheme", "mxfp4", "-o", out)
    found, said = code(capsys, *command)
    assert found == 7
    assert f"error: {name}: NaN or inf in a tensor that is not quantized: 1 of" in said
    assert not out.exists()

    found, said = code(capsys, *command, "--on-nonfinite", "keep")
    assert found == 0
    warning = f"NaN or inf in 1 kept parameters, kept as they are: {name}"
    assert said.count(f"warning: {warning}") == 1
    assert warning in json.loads((out / "quark" / "report.json").read_text())["warnings"]

    found, said = code(capsys, "verify", out)
    assert (found, name in said) == (8, True)
    assert code(capsys, "verify", out, "--on-nonfinite", "keep")[0] == 0
    for folder, baseline in ((out, source), (source, source)):
        found, said = code(capsys, "eval", folder, "--baseline", baseline, *EVAL)
        assert (found, name in said) == (8, True)


@pytest.mark.parametrize("algorithm", [None, "permutation"])  # which runs the model before the first part
def test_a_weight_is_named_before_what_it_spoils(algorithm: str | None, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    source = broken("llama", name, NAN, tmp_path / "source")
    data = runs.data(runs.text_file(tmp_path / "text.txt"), samples=2, seqlen=16)
    with pytest.raises(DataError, match="value nan at") as caught:
        runs.run(source, tmp_path / "out", scheme="nvfp4", algorithm=algorithm, **data)
    assert (caught.value.where, caught.value.kind) == (name, "E-NONFINITE-WEIGHT")


def test_a_finished_part_of_a_run_that_kept_is_not_published_by_one_that_stops(
    tmp_path: Path,
) -> None:
    source = broken("llama", "model.embed_tokens.weight", NAN, tmp_path / "m")
    out, options = tmp_path / "out", {"scheme": "mxfp4", "resume": "auto"}
    with pytest.raises(Stopped):
        runs.run(source, out, on_nonfinite="keep", time_budget=1e-9, **options)
    with pytest.raises(DataError, match=r"model\.embed_tokens\.weight"):
        runs.run(source, out, **options)
    assert not out.exists()
    made = runs.run(source, out, on_nonfinite="keep", **options)
    assert "model.embed_tokens.weight" in made.report["warnings"][-1]


@pytest.mark.parametrize("keep", [False, True])
def test_results_that_are_no_numbers_never_pass(keep: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN that comes into being while the model runs, and NaN that was let in."""
    source = runs.build("llama", tmp_path / "m")
    norm = load_file(source / "model.safetensors")["model.layers.1.post_attention_layernorm.weight"]
    changed(source, **{"model.layers.1.post_attention_layernorm.weight": torch.full_like(norm, NAN if keep else 3e38)})
    flag = ["--on-nonfinite", "keep"] if keep else []
    found, said = code(capsys, "eval", source, "--baseline", source, *flag, *EVAL)
    assert found == 8
    assert "the first NaN or inf is behind block 1" in said
    assert "top-1" not in said


def test_what_harms_no_result_passes_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last row of the embedding belongs to no token of the text."""
    source = broken("llama", "model.embed_tokens.weight", NAN, tmp_path / "m")
    found, said = code(capsys, "eval", source, "--on-nonfinite", "keep", *EVAL)
    assert found == 0
    assert "warning:" in said
    assert "model.embed_tokens.weight" in said


def test_buffers_and_unknown_tensors_are_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = torch.full((4, 4), -INF).triu(1)
    more = {
        "model.layers.0.self_attn.causal_mask": mask,
        "model.layers.1.self_attn.bias": mask.reshape(1, 1, 4, 4).clone(),
        "somebody.elses.weight": torch.full((8, 8), NAN),
    }
    source, out = changed(runs.build("llama", tmp_path / "m"), **more), tmp_path / "out"
    found, said = code(capsys, "quantize", "--model", source, "--scheme", "mxfp4", "-o", out)
    assert found == 0
    assert f"warning: NaN or inf in 3 buffers or unknown tensors, kept as they are: {', '.join(more)}" in said
    found, said = code(capsys, "verify", out)
    assert found == 0
    assert "3 buffers" in said


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    found = nonfinite.NonFinite({"n": "norm"})
    found.look("n", torch.tensor([[1.0, 2.0], [NAN, 4.0]]).to(dtype))
    assert found.parameters == {"n": "1 of 4 values, the first at [1, 0]"}


@pytest.mark.parametrize(
    ("name", "ndim", "buffer"),
    [
        ("h.0.attn.bias", 4, True), ("h.0.attn.masked_bias", 0, True), ("rotary_emb.inv_freq", 1, True),
        ("attn.attention_mask", 2, True), ("tower.local_causal_valid_mask", 2, True), ("q_proj.bias", 1, False),
        ("mlp.gate.e_score_correction_bias", 1, False), ("self_attn.sinks", 1, False), ("mixer.A_log", 1, False),
        ("embeddings.mask_token", 3, False), ("norm.weight", 1, False),
    ],
)  # fmt: skip
def test_what_is_a_buffer(name: str, ndim: int, buffer: bool) -> None:
    assert nonfinite.is_buffer(name, ndim) is buffer


def test_the_unquantized_experts_of_a_split_tensor_are_looked_at(tmp_path: Path) -> None:
    source = runs.build(runs.FUSED, tmp_path / "m")
    name = "model.layers.0.mlp.experts.down_proj"
    tensor = load_file(source / "model.safetensors")[name]
    tensor[1, 2, 3] = NAN
    changed(source, **{name: tensor})
    with pytest.raises(DataError, match=r"experts\.1\.down_proj"):
        runs.run(source, tmp_path / "out", scheme="mxfp4", target="none", exclude=["*experts.1.down_proj"])


def test_a_token_that_a_model_rules_out() -> None:
    """Both rule out the same: no difference. One alone: an infinite one, which is no result."""
    base = torch.tensor([[0.25, 0.75, 0.0]]).log()
    other = torch.tensor([[0.5, 0.5, 0.0]]).log()
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(score._divergence(base, other).sum()) == pytest.approx(expected)
    assert float(score._divergence(other.exp().add(0.1).log(), base).sum()) == INF
    sums = {"nll": 1.0, "base_nll": 1.0, "kl": INF, "agree": 1.0}
    with pytest.raises(CheckError, match="kl is inf"):
        score._summary(sums, 1, True)
    with pytest.raises(CheckError, match="nll is nan"):
        score._summary(sums | {"nll": NAN, "kl": 1.0}, 1, True)
    far = score._summary(sums | {"nll": 5000.0, "kl": 4999.0}, 1, True)
    assert math.isfinite(far["perplexity_increase"])


def test_a_gate_is_not_passed_by_nan() -> None:
    result = {"directory": "d", "kl": NAN, "perplexity_increase": NAN}
    with pytest.raises(CheckError, match="KL nan"):
        judged(result, 0.1, None)
    with pytest.raises(CheckError, match="perplexity"):
        judged(result, None, 0.1)
