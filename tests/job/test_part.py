"""One part on its own: what it becomes, what it hands on, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import DataError
from quarkcli.evaluation.run import evaluate
from quarkcli.events import Event, PartDone
from quarkcli.forward.walk import Walk
from quarkcli.job import run as job
from quarkcli.job.part import PartWorker
from quarkcli.job.reach import last_part
from quarkcli.model.runner import Runner
from tests import runs
from tests.algorithms import rewriting


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt", 40_000)


def worker(prepared: job.Prepared, **options: Any) -> PartWorker:
    return PartWorker(
        prepared.plan,
        prepared.dialect,
        prepared.steps,
        prepared.needs,
        prepared.source,
        None,
        lambda event: None,
        **options,
    )


def test_without_data_a_part_is_a_function_of_its_tensors() -> None:
    prepared = runs.prepare("demo", scheme="mxfp4", exclude=["*o_proj"])
    part = prepared.plan.parts[2]
    tensors = prepared.source.read_many(part.tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    result = worker(prepared).work(part, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    assert {name for name in before if name not in tensors} == {f"{name}.weight" for name in result.weight_errors}
    for leaf in ("self_attn.o_proj", "input_layernorm"):
        name = f"model.layers.1.{leaf}.weight"
        assert torch.equal(result.tensors[name], before[name])
    assert "model.layers.1.mlp.up_proj.weight" not in result.tensors
    assert set(result.weight_errors) == {f"model.layers.1.{leaf}" for leaf in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )}  # fmt: skip
    assert "tensors" not in result.record()


def test_errors_of_weights_are_relative_to_their_size(tmp_path: Path) -> None:
    """Against the written checkpoint, over all rows."""
    made = runs.run("demo", tmp_path / "out", scheme="nvfp4", **runs.data(runs.text_file(tmp_path / "t.txt"), 8))
    checkpoint = Checkpoint(Source.open(str(made.folder)))
    source = runs.read_all(EMBEDDED)
    told = made.report["loss"]["weight_errors"]
    assert len(told) == 28
    for name, error in told.items():
        weight = source[f"{name}.weight"].double()
        lost = float((checkpoint.weight(name).double() - weight).norm() / weight.norm())
        assert error == pytest.approx(lost, rel=0.05)  # at most 256 evenly spaced rows are looked at


def test_a_part_that_needs_no_data_needs_no_pass() -> None:
    assert last_part(runs.prepare("demo", scheme="mxfp4").plan, {}) == -1
    prepared = runs.prepare("demo", scheme="mxfp4", layers=["*layers.2.mlp.*=fp8"], calib_data="builtin")
    assert last_part(prepared.plan, prepared.needs) == 3


def test_block_errors_are_those_of_the_evaluation(text: Path, tmp_path: Path) -> None:
    """The job measures a block's output while it works; the evaluation measures it from the files."""
    data = runs.data(text, 16, 128)
    made = runs.run("demo", tmp_path / "out", scheme="nvfp4", **data)
    parts = made.report["loss"]["output_errors"]
    assert set(parts) == {f"model.layers.{index}" for index in range(4)}
    seen: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, PartDone):
            seen.append(event.error)

    options = {"text": str(text), "window": 128, "max_tokens": 2048, "dtype": "bfloat16", "device": "cpu"}
    evaluate(str(made.folder), baseline=str(EMBEDDED), tell=listen, **options)
    # Block 0 has the same input on both sides, and the same text; later blocks differ in what reaches them.
    assert parts["model.layers.0"] == pytest.approx(seen[0], rel=0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("scheme", "algorithm"), [("mxfp4", None), ("nvfp4", None), ("int4_wo_128", "gptq")])
def test_a_broken_weight_is_named(value: float, scheme: str, algorithm: str | None, text: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    data = runs.data(text, 8) if scheme == "nvfp4" or algorithm else {}
    with pytest.raises(DataError) as caught:
        runs.run(source, tmp_path / "out", scheme=scheme, algorithm=algorithm, **data)
    assert "model.layers.1.mlp.down_proj" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("algorithm", "sizes"), [("rtn", [8] * 4 + [1]), ("awq", [8] * 4 + [1]), ("gptq", [8] * 8)])
def test_what_makes_up_for_no_errors_takes_one_pass(
    algorithm: str, sizes: list[int], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then one row runs again, for the block's error; what goes by moments runs all rows."""
    seen: list[int] = []
    whole = Runner.run_block

    def counted(self: Runner, block: int, recording: Any, hidden: torch.Tensor) -> Any:
        if block == 1:
            seen.append(len(hidden))
        return whole(self, block, recording, hidden)

    monkeypatch.setattr(Runner, "run_block", counted)
    runs.run("demo", tmp_path / "out", scheme="nvfp4", algorithm=algorithm, **runs.data(text, 32, 256))
    assert seen == sizes


def test_a_quantized_head_is_measured_behind_the_last_block(text: Path, tmp_path: Path) -> None:
    made = runs.run("demo", tmp_path / "out", scheme="fp8", include=["lm_head"], **runs.data(text, 16, 64))
    scale = float(runs.read_all(made.folder)["lm_head.input_scale"])
    assert "lm_head.weight_scale" in runs.read_all(made.folder)
    # RMS norm: every row has mean square 1 before its weight, so no value exceeds sqrt(features) * max weight.
    limit = 128**0.5 * float(runs.read_all(EMBEDDED)["model.norm.weight"].float().abs().max())
    assert 1 / 448 < scale < limit / 448


def test_static_scales_of_what_was_always_zero_are_mentioned_once(text: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    for index in range(2):
        tensors[f"model.layers.{index}.mlp.up_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = runs.run(source, tmp_path / "out", scheme="fp8", **runs.data(text, 8))
    silent = [f"model.layers.{index}.mlp.down_proj.input" for index in range(2)]
    assert made.report["dead_inputs"] == {"weights": {}, "activations": silent}
    (warning,) = [line for line in made.report["warnings"] if "always zero in calibration" in line]
    assert warning.startswith("2 activations with a static scale")


def test_a_scale_that_leaves_little_is_mentioned(text: Path, tmp_path: Path) -> None:
    """One channel a thousand times as large as the others takes all codes; floats have small ones for the rest."""
    source = runs.build("llama", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5] *= 1000
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for scheme, said in (("int8", ["model.layers.1.mlp.down_proj.input"]), ("fp8", [])):
        made = runs.run(source, tmp_path / scheme, scheme=scheme, **runs.data(text, 8))
        found = [line for line in made.report["warnings"] if "rounds" in line]
        assert [line.split(":")[0] for line in found] == said


def test_hidden_states_are_the_sources_where_clipped_weights_are_observed_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The range of scaled values is looked at again, for the cache; by then other weights are clipped."""
    source = rewriting.build("llama", tmp_path / "source")
    behind: list[tuple[torch.Tensor, torch.Tensor]] = []
    observed = Walk.observed

    def watched(self: Walk) -> None:
        observed(self)
        behind.extend((self.tokens[: len(states)], states) for states in self.served[:1])

    monkeypatch.setattr(Walk, "observed", watched)
    made = runs.run(
        source, tmp_path / "out", scheme="int4_wo_32", algorithm="awq", kv_cache="fp8", settings=["awq.clip=on"],
        target="none", **runs.data(text),
    )  # fmt: skip
    assert any("clipped" in note and note["taken"] for note in made.report["transforms"]["awq"]["model.layers.0"])
    tokens, ours = behind[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(tokens, output_hidden_states=True).hidden_states[1]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_weights_of_which_nothing_is_left_are_named(tmp_path: Path) -> None:
    """q, k and v share the scale over their block scales: a billionth as large, k becomes zero."""
    source = runs.build("llama", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1e-9
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for scheme, lost in (("nvfp4_weight_only", 1), ("mxfp4", 0)):
        made = runs.run(source, tmp_path / scheme, scheme=scheme)
        found = [line for line in made.report["warnings"] if "lost: model.layers.1.self_attn.k_proj (100%)" in line]
        assert len(found) == lost
