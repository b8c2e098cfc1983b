"""AutoRound on whole runs: nothing for no step, never worse, experts, activations as served, killed and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli import algorithms
from quarkcli.algorithms.autoround import AutoRound
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.errors import ConfigError, QuarkError
from quarkcli.job import tuning
from tests import runs

RECIPE = "schema: quark/recipe/1\nquantize:\n  scheme: %s\n  algorithm: [%s]\n"
QUICK = "{method: autoround, iters: 6, batch: 1, lr: 0.05}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt", 80_000)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("llama", tmp_path_factory.mktemp("llama") / "m", torch.float32)


def made(source: Path, folder: Path, scheme: str, steps: str, page: Path, **options: Any) -> runs.Made:
    path = folder.with_suffix(".yaml")
    path.write_text(RECIPE % (scheme, steps))
    return runs.run(source, folder, recipe=str(path), **{**runs.data(page, 24, 128), **options})


def files(run: runs.Made) -> dict[str, torch.Tensor]:
    return runs.read_all(run.folder)


def equal(one: runs.Made, other: runs.Made) -> bool:
    ours, theirs = files(one), files(other)
    return ours.keys() == theirs.keys() and all(runs.same_bytes(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_no_step_changes_nothing(solver: str, llama: Path, page: Path, tmp_path: Path) -> None:
    own = f"{{method: {solver}}}"
    plain = made(llama, tmp_path / "plain", "int2_wo_128", own, page)
    still = made(llama, tmp_path / "still", "int2_wo_128", f"{own}, {{method: autoround, iters: 0}}", page)
    assert equal(plain, still)


CASES = [
    ("llama", "int2_wo_128"), ("llama", "uint4_wo_32"), ("llama", "fp8"),
    *(pytest.param("llama", scheme, marks=pytest.mark.slow) for scheme in ("nvfp4", "mxfp4")),
    ("qwen3_moe", "int3_wo_128"), ("qwen3_moe_fused", "nvfp4"), ("gpt_oss", "mxfp4"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "scheme"), CASES)
def test_no_block_gets_worse(model: str, scheme: str, page: Path, tmp_path: Path) -> None:
    source = runs.build(model, tmp_path / "m", torch.float32)
    run = made(source, tmp_path / "out", scheme, QUICK, page)
    errors = [by["autoround"] for by in run.report["loss"]["tuning"].values()]
    assert len(errors) == 2 and all(error["after"] <= error["before"] for error in errors)
    assert any(error["after"] < error["before"] for error in errors)
    plain = made(source, tmp_path / "plain", scheme, "{method: rtn}", page)
    assert not equal(run, plain)


def test_it_betters_the_output_on_rows_of_others(llama: Path, page: Path, tmp_path: Path) -> None:
    """What the report says is the error of the decoded files, by a formula of its own."""
    run = made(llama, tmp_path / "out", "int2_wo_128", "{method: rtn}, {method: autoround, iters: 40}", page)
    error = run.report["loss"]["tuning"]["model.layers.0"]["autoround"]
    assert error["after"] < 0.9 * error["before"]


def test_what_a_solver_measured_is_not_told_of_other_codes(llama: Path, page: Path, tmp_path: Path) -> None:
    gptq = "{method: gptq, scale_search: false, refine: 'off', slots: ['*v_proj.weight_quantizer']}"
    run = made(llama, tmp_path / "out", "int2_wo_128", f"{gptq}, {QUICK}", page, calib_samples=8)
    told = {row["name"]: row["output_error"] for row in run.report["tensors"]}
    solved = run.report["outcomes"]["weights"]
    assert len(solved) == 2 and any(row["tuned"] for row in solved.values())
    assert all((told[name] is None) == row["tuned"] for name, row in solved.items())


def test_the_error_is_that_of_the_block(
    llama: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """|f(Q) - f(W)|^2 / |f(W)|^2 over the held-out rows, in float64, by transformers with the values of the files."""
    from transformers import AutoModelForCausalLM

    rows: list[torch.Tensor] = []
    take = tuning.TunedBlock.take

    def taking(self: Any, *given: Any) -> Any:
        rows[:] = [self._walk.split(self._walk.tokens)[n] for n in self.held]
        return take(self, *given)

    monkeypatch.setattr(tuning.TunedBlock, "take", taking)
    run = made(llama, tmp_path / "out", "int2_wo_128", QUICK, page)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    decoded = Checkpoint(Source.open(str(run.folder)))
    twin = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    state = {name: decoded.weight(name.removesuffix(".weight")).double() for name in _weights(run, 0)}
    twin.load_state_dict(state, strict=False)
    losses = []
    with torch.no_grad():
        for batch in rows:
            wanted, got = (m.model(batch, output_hidden_states=True).hidden_states[1] for m in (model, twin))
            losses.append(float((got - wanted).square().sum() / wanted.square().sum()))
    after = run.report["loss"]["tuning"]["model.layers.0"]["autoround"]["after"]
    assert after == pytest.approx(sum(losses) / len(losses), rel=1e-3)


def _weights(run: runs.Made, block: int) -> list[str]:
    return [t.view.tensor for t in run.prepared.plan.quantized() if f"layers.{block}." in t.name]


def test_activations_are_those_of_the_server(
    llama: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that a block starts from is that of its quantized weights and inputs together."""
    seen: list[tuple[float, float]] = []

    def tune(self: Any, block: Any, quantized: Any) -> Any:
        from quarkcli.algorithms.base import Tuned
        from quarkcli.model.handlers import Handlers

        source = {name: block.weight(name).float() for name in quantized}
        leaves = {name: weight.clone().requires_grad_() for name, weight in source.items()}
        block.loss(leaves, 0).backward()
        assert all(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves.values())
        served, block._served = block.error(source), Handlers()
        seen.append((served, block.error(source)))
        return Tuned({})

    monkeypatch.setattr(AutoRound, "tune", tune)
    made(llama, tmp_path / "out", "mxfp4", QUICK, page, kv_cache="fp8")
    assert all(served > 1e-4 for served, _ in seen)
    assert seen[0][1] < 1e-9


def test_an_expert_without_tokens_keeps_its_solvers_codes(page: Path, tmp_path: Path) -> None:
    source = runs.build("qwen3_moe", tmp_path / "m", torch.float32)
    weights = runs.read_all(source)
    routers = [name for name in weights if name.endswith("mlp.gate.weight")]
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    for name in routers:  # the last expert's score is the least for every token
        tensors[name] = tensors[name] * 0
        tensors[name][:-1] += torch.randn(tensors[name][:-1].shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        tensors[name][-1] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plain = made(source, tmp_path / "plain", "int4_wo_32", "{method: rtn}", page)
    run = made(source, tmp_path / "out", "int4_wo_32", QUICK, page)
    counts = run.report["experts"]["calibration_tokens"]
    unseen = {(layer, int(e)) for layer, by in counts.items() for e, n in by.items() if n == 0}
    moved = set()
    ours, theirs = files(run), files(plain)
    for target in run.prepared.plan.quantized():
        names = [name for name in ours if name.startswith(f"{target.name}.")]
        same = all(runs.same_bytes(ours[name], theirs[name]) for name in names)
        if target.expert in unseen:
            assert same, target.name
        elif not same:
            moved.add(target.expert is not None)
    assert moved == {True, False}


@pytest.mark.slow  # `test_invariants` kills every algorithm alone
def test_killed_and_resumed(llama: Path, page: Path, tmp_path: Path) -> None:
    steps = "{method: gptq}, " + QUICK
    calm = made(llama, tmp_path / "calm", "int3_wo_128", steps, page, seed=3)
    runs.killed(2, lambda: made(llama, tmp_path / "out", "int3_wo_128", steps, page, seed=3))
    again = made(llama, tmp_path / "out", "int3_wo_128", steps, page, seed=3, resume="require")
    assert runs.same_files(calm.folder, again.folder)


@pytest.mark.slow  # `test_invariants` does so with nvfp4
def test_batch_size_changes_no_bits(llama: Path, page: Path, tmp_path: Path) -> None:
    one = made(llama, tmp_path / "one", "mxfp4", QUICK, page, calib_batch=1)
    other = made(llama, tmp_path / "other", "mxfp4", QUICK, page, calib_batch=16)
    assert equal(one, other)


def test_offsets_stay_within_half_a_step(
    llama: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quarkcli.algorithms.autoround import _Moving

    step, seen = _Moving.step, []

    def stepping(self: Any, *given: Any) -> None:
        step(self, *given)
        seen.append((float(self.offset.abs().max()), float(self.factors.min()), float(self.factors.max())))

    monkeypatch.setattr(_Moving, "step", stepping)
    made(llama, tmp_path / "out", "int4_wo_128", "{method: autoround, iters: 4, batch: 1, lr: 0.4}", page)
    assert max(offset for offset, _, _ in seen) == 0.5
    assert min(low for _, low, _ in seen) >= 0.5 and max(high for _, _, high in seen) <= 1.5


def test_other_weights_are_as_their_tuner_left_them(llama: Path, page: Path, tmp_path: Path) -> None:
    """A tuner of some weights sees the others quantized: alone its error is that of both."""
    part = "{method: autoround, iters: 6, batch: 1, slots: ['*down_proj*']}"
    run = made(llama, tmp_path / "out", "int2_wo_128", part, page)
    whole = made(llama, tmp_path / "whole", "int2_wo_128", QUICK, page)
    first = [m.report["loss"]["tuning"]["model.layers.0"]["autoround"]["before"] for m in (run, whole)]
    assert first[0] == first[1]
    plain = made(llama, tmp_path / "plain", "int2_wo_128", "{method: rtn}", page)
    ours, theirs = files(run), files(plain)
    different = {name for name in theirs if not runs.same_bytes(ours[name], theirs[name])}
    assert different and all("down_proj" in name for name in different)


BAD = [{"iters": -1}, {"iters": 1.5}, {"batch": 0}, {"lr": 0}, {"lr": "fast"}, {"minmax_lr": 1}, {"minmax": "yes"}]


@pytest.mark.parametrize("given", BAD)
def test_refused_parameters(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"autoround {next(iter(given))} must be"):
        algorithms.create("autoround", given)


def test_without_data_it_says_so(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(QuarkError) as raised:
        runs.run(llama, tmp_path / "out", scheme="int4_wo_128", algorithm="autoround", calib_data="none.txt")
    assert "none.txt" in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_nothing_to_tune_is_refused(llama: Path, page: Path) -> None:
    for name in ("autoround", "polish"):
        with pytest.raises(ConfigError, match=f"{name} has nothing to do"):
            runs.prepare(
                llama, scheme="int4_wo_128", algorithm=name, exclude=["*"], include=["lm_head"], **runs.data(page)
            )


def test_out_of_memory_it_goes_on_with_half_the_rows(
    llama: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []
    tune = AutoRound.tune

    def failing(self: Any, block: Any, quantized: Any) -> Any:
        seen.append((block.number, block.rows, block.batches))
        if len(seen) == 1:
            raise torch.OutOfMemoryError("of the test")
        return tune(self, block, quantized)

    monkeypatch.setattr(AutoRound, "tune", failing)
    run = made(llama, tmp_path / "out", "int4_wo_128", QUICK, page)
    assert seen == [(0, 6, 4), (0, 3, 8), (1, 3, 8)]
    errors = [by["autoround"] for by in run.report["loss"]["tuning"].values()]
    assert all(error["after"] <= error["before"] for error in errors)
