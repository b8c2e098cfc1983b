"""AWQ and AutoSmoothQuant: costs against float64 formulas, what is taken and what is not, the function that stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quarkcli.algorithms._searching import SearchedScaling
from quarkcli.algorithms._trials import Trial
from quarkcli.errors import ConfigError, Stopped
from quarkcli.numerics import smooth
from quarkcli.numerics.hadamard import sylvester
from quarkcli.numerics.quantize import dequantize, fake_quantize, quantize, static_scale, tensor_amax
from quarkcli.numerics.sample import Sample
from quarkcli.spec import PerChannel, TensorSpec
from tests import runs
from tests.forward.watch import hooked

from .rewriting import ROWS, build, logits, rewritten

OWN = "schema: quark/recipe/1\nquantize:\n  scheme: {scheme}\n  algorithm: {steps}\n"
AWQ, SCALES = "[{method: awq}]", "[{method: awq, clip: off}]"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt", 80_000)


def recipe(folder: Path, scheme: str, steps: str) -> dict[str, Any]:
    path = folder / "own.yaml"
    path.write_text(OWN.format(scheme=scheme, steps=steps))
    return {"recipe": str(path)}


def prepared(source: Path, page: Path, folder: Path, scheme: str, steps: str) -> Any:
    return runs.prepare(source, **recipe(folder, scheme, steps), **runs.data(page, 32, 64))


def spec(scheme: str) -> tuple[TensorSpec, TensorSpec | None]:
    target = next(runs.prepare("demo", scheme=scheme).plan.quantized())
    return target.weight, target.input


# -- the cost


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", ["int4_wo_128", "nvfp4", "int8", "fp8", "mxfp4", "ptpc_fp8"])
@pytest.mark.parametrize("power", [1, 2])
def test_cost_is_that_of_the_outputs(scheme: str, power: int) -> None:
    weight_spec, input_spec = spec(scheme)
    weights, rows = [random(24, 128), random(8, 128, seed=1) * 3], random(40, 128, seed=2) * 2
    factors = random(128, seed=3).abs() + 0.3
    seen = rows.abs().amax(0) * 1.5  # other tokens were larger
    readers = [smooth.Reader(w, w.abs().amax(0), weight_spec, input_spec, "together") for w in weights]
    counts = random(40, seed=4).abs() + 0.1
    found = smooth.Cost(readers, seen=seen, power=power)(factors, Sample(rows, counts / counts.mean()))
    amax = max(tensor_amax(w * factors) for w in weights) if weight_spec.has_tensor_scale else None
    read = rows / factors
    if input_spec is not None:
        static = static_scale((seen / factors).max(), input_spec) if input_spec.needs_amax else None
        read = fake_quantize(read, input_spec, static)
    wanted = 0.0
    for weight in weights:
        codes = quantize(weight * factors, weight_spec, amax=amax)
        lost = read.double() @ dequantize(codes, weight_spec).double().T - rows.double() @ weight.double().T
        wanted += float((counts.double() @ (lost.abs() ** power)).sum() / counts.double().sum())
    assert found == pytest.approx(wanted, rel=1e-4)


def test_cost_where_a_solver_makes_up_for_errors() -> None:
    weight_spec, input_spec = spec("nvfp4")
    weight, rows, left = random(16, 128), random(40, 128, seed=1), random(128, seed=2).square()
    readers = [smooth.Reader(weight, weight.abs().amax(0), weight_spec, input_spec, "g", 2.0)]
    factors = random(128, seed=3).abs() + 0.3
    seen = rows.abs().amax(0)
    counts = random(40, seed=4).abs() + 0.1
    found = smooth.Cost(readers, seen=seen, conditional=left)(factors, Sample(rows, counts / counts.mean()))
    error = dequantize(quantize(weight * factors, weight_spec), weight_spec).double() / factors - weight
    read = fake_quantize(rows / factors, input_spec, static_scale((seen / factors).max(), input_spec)).double()
    lost = (read * factors - rows) @ weight.double().T
    inputs = (counts.double() @ lost.square()).sum() / counts.double().sum()
    assert found == pytest.approx(2 * float((error.square() @ left.double()).sum() + inputs), rel=1e-4)


@pytest.mark.parametrize("scheme", ["int4_wo_128", "nvfp4", "int8", "mxfp4"])
def test_cost_behind_a_hadamard(scheme: str) -> None:
    """What the server multiplies has weights and inputs turned; the range of a static input is that of turned rows."""
    weight_spec, input_spec = spec(scheme)
    weights, rows = [random(24, 128), random(8, 128, seed=1) * 3], random(40, 128, seed=2) * 2
    rows[0, 5], factors = 300.0, random(128, seed=3).abs() + 0.3
    matrix = torch.kron(torch.eye(4), sylvester(32)).double() / 32**0.5
    of = [smooth.Reader(w, w.abs().amax(0), weight_spec, input_spec, "together", block=32) for w in weights]
    found = smooth.Cost(of, seen=rows.abs().amax(0))(factors, Sample.alike(rows))
    changed = [((weight * factors).double() @ matrix).float() for weight in weights]
    amax = max(map(tensor_amax, changed)) if weight_spec.has_tensor_scale else None
    read = ((rows / factors).double() @ matrix).float()
    if input_spec is not None:
        static = static_scale(read.abs().max(), input_spec) if input_spec.needs_amax else None
        read = fake_quantize(read, input_spec, static)
    wanted = 0.0
    for weight, own in zip(weights, changed, strict=True):
        decoded = dequantize(quantize(own, weight_spec, amax=amax), weight_spec).double()
        wanted += float((read.double() @ decoded.T - rows.double() @ weight.double().T).square().sum() / len(rows))
    assert found == pytest.approx(wanted, rel=1e-3)  # a value between two codes may fall to either


@pytest.mark.parametrize("solver", ["", ", {method: gptq}"])
def test_factors_are_judged_behind_the_hadamard_that_follows(
    solver: str, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors chosen are no worse, as the server computes, than those chosen without the Hadamard."""
    source = build("llama", tmp_path / "m", num_hidden_layers=1)
    steps = f"[{{method: autosmoothquant}}, {{method: hadamard, block: 32}}{solver}]"
    plan, tried = prepared(source, page, tmp_path, "int8", steps), []
    factors = SearchedScaling.factors

    def both(self: SearchedScaling, channels: Any) -> Any:
        aware = factors(self, channels)
        with monkeypatch.context() as patched:
            patched.setattr("quarkcli.algorithms._trials._block", lambda part, target: 1)
            blind = factors(self, channels)
        trial = Trial(channels, self.solvers(channels.part.plan), self.power)
        ones = torch.ones(channels.count)
        tried.append([trial.cost(ones if own[0] is None else own[0]) for own in (aware, blind)])
        return aware

    monkeypatch.setattr(SearchedScaling, "factors", both)
    rewritten(plan)
    assert len(tried) == 4
    assert all(aware <= blind for aware, blind in tried) and any(aware < blind for aware, blind in tried)


def test_picked_rows_are_whole_tiles() -> None:
    weight = torch.arange(64.0)[:, None].expand(64, 4)
    plain, _ = spec("int4_wo_128")
    assert smooth.picked_rows(weight, 16, plain)[:, 0].tolist() == list(range(0, 64, 4))
    assert len(smooth.picked_rows(weight, 100, plain)) == 64


def test_candidates() -> None:
    seen, columns = random(64).abs(), random(64, seed=1).abs()
    seen[3] = 0.0
    for ratio in (0.0, 0.25, 1.0):
        for weights in (None, columns):
            factors = smooth.scaled_factors(seen, weights, ratio).double()
            live = torch.arange(64) != 3
            assert float(factors[live].max() * factors[live].min()) == pytest.approx(1.0, rel=1e-5)
            plain = seen.double() ** ratio / (columns.double() ** (1 - ratio) if weights is not None else 1.0)
            ratio_of = factors[live] / plain[live]
            assert torch.allclose(ratio_of, ratio_of[0].expand_as(ratio_of), rtol=1e-5)
            assert factors[3] == 1
    assert torch.equal(smooth.scaled_factors(seen, None, 0.0), torch.ones(64))
    assert torch.equal(smooth.scaled_factors(torch.zeros(4), columns[:4], 0.5), torch.ones(4))


@pytest.mark.parametrize(("steps", "tried"), [(10, 11), (20, 13), (40, 17)])
def test_search_takes_the_least(steps: int, tried: int) -> None:
    seen: list[float] = []

    def make(ratio: float) -> torch.Tensor:
        seen.append(ratio)
        return torch.tensor([ratio])

    first = smooth.Choice("none", 0.0, torch.ones(1), 10.0)
    best = smooth.search({"a": make}, steps, lambda f: float((f - 0.55).abs()), [first])
    assert best.kind == "a" and best.ratio == pytest.approx(0.55, abs=0.5 / steps + 1e-9)
    assert len(seen) == len(set(seen)) <= tried and {0.0, 1.0} <= set(seen)
    assert smooth.search({"a": make}, steps, lambda f: 11.0, [first]) is first


def clipped_by_hand(weight: torch.Tensor, sample: Sample, spec_: TensorSpec, size: int) -> tuple[Any, Any]:
    """The descent over groups, row by row and candidate by candidate in float64: limits, and what outputs lose."""
    x, counts = sample.rows.double(), sample.weights.double()
    groups = [slice(start, start + size) for start in range(0, weight.shape[1], size)]
    limits, losses = torch.empty(len(weight), len(groups)), torch.empty(len(weight), dtype=torch.float64)
    for number, row in enumerate(weight.unsqueeze(1)):
        largest = [row[:, group].abs().max() for group in groups]

        def error(group: slice, limit: torch.Tensor, row: torch.Tensor = row) -> torch.Tensor:
            own = row[:, group]
            return dequantize(quantize(own.clamp(-limit, limit), spec_), spec_).double() - own

        errors = torch.cat([error(group, most) for group, most in zip(groups, largest, strict=True)], 1)
        chosen = [0] * len(groups)
        for steps in (lambda _: range(0, 11, 2), lambda now: (now, max(0, now - 1), min(10, now + 1))):
            for at, group in enumerate(groups):
                found = {}
                for step in steps(chosen[at]):
                    errors[:, group] = error(group, largest[at] * (1 - 0.05 * step))
                    found[step] = float(counts @ (x @ errors[0]).square())
                chosen[at] = min(found, key=lambda step: found[step])
                errors[:, group] = error(group, largest[at] * (1 - 0.05 * chosen[at]))
        limits[number] = torch.stack(largest) * (1 - 0.05 * torch.tensor(chosen))
        losses[number] = counts @ (x @ errors[0]).square()
    return limits, losses


@pytest.mark.parametrize(("scheme", "size", "count"), [("int4_wo_128", 128, 300), ("int8", 256, 40), ("mxfp4", 32, 20)])
def test_clipping_lowers_the_loss_group_by_group(scheme: str, size: int, count: int) -> None:
    """With more rows than columns of a group, and with fewer."""
    weight_spec = replace(spec(scheme)[0], granularity=PerChannel(0)) if scheme == "int8" else spec(scheme)[0]
    weight, rows = random(12, 256), random(count, 256, seed=1) * (random(256, seed=2).abs() + 0.1) + 0.3
    weight[3, 5] = 12.0  # a value that spoils its group, at an input that hardly moves
    rows[:, 5] *= 1e-3
    counts = random(count, seed=4).abs() + 0.1
    sample = Sample(rows, counts / counts.mean())
    limits, clipped = smooth.clip_limits(weight, sample, weight_spec, None, 0.5, 0.05)
    wanted, least = clipped_by_hand(weight, sample, weight_spec, size)
    assert limits.shape == wanted.shape and (limits - wanted).abs().lt(1e-5).float().mean() > 0.95
    assert torch.equal(clipped, limits < weight.view(12, -1, size).abs().amax(-1))
    kept = smooth.clamped(weight, limits)
    error = dequantize(quantize(kept, weight_spec), weight_spec).double() - weight
    found = sample.weights.double() @ (rows.double() @ error.T).square()
    torch.testing.assert_close(found, least, rtol=1e-2, atol=0)
    plain = dequantize(quantize(weight, weight_spec), weight_spec).double() - weight
    before = sample.weights.double() @ (rows.double() @ plain.T).square()
    assert bool((found <= before * (1 + 1e-5)).all()) and float(found.sum()) < 0.9 * float(before.sum())
    assert torch.equal(kept.view(12, -1, size).abs().amax(-1), limits)


@pytest.mark.parametrize(("least", "step"), [(0.6, 0.4), (0.5, 0.3), (0.9, 0.1)])
def test_clipping_by_one_step_alone(least: float, step: float) -> None:
    weight, rows = random(4, 64), random(40, 64, seed=1)
    weight[:, 0] = 9.0
    limits, clipped = smooth.clip_limits(weight, Sample.alike(rows), spec("int4_wo_32")[0], None, least, step)
    largest = weight.view(4, 2, 32).abs().amax(-1)
    assert torch.equal(limits, torch.where(clipped, largest * (1 - step), largest))


# -- at work


CASES = [
    ("llama", "int4_wo_128", SCALES), ("llama", "nvfp4", "[{method: autosmoothquant}]"),
    ("llama", "int8", "[{method: autosmoothquant}]"), ("gemma2", "int4_wo_32", SCALES),
    ("qwen2_sliding", "int4_wo_32", "[{method: awq, clip: off}, {method: gptq}]"),
    ("qwen3_moe_fused", "nvfp4", "[{method: autosmoothquant}]"), ("gpt_oss", "mxfp4", SCALES),
    ("qwen3_moe", "int4_wo_32", "[{method: awq, clip: off}, {method: gptq}]"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "scheme", "steps"), CASES)
def test_the_function_stays_and_nothing_is_worse(
    family: str, scheme: str, steps: str, page: Path, tmp_path: Path
) -> None:
    source = build(family, tmp_path / "m")
    plan = prepared(source, page, tmp_path, scheme, steps)
    tensors, notes = rewritten(plan)
    before, after = logits(source, None, tmp_path), logits(source, tensors, tmp_path / "new")
    assert float((before - after).abs().max()) < 1e-4 * float(before.std())
    own = runs.read_all(source)
    changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, own[name])}
    assert changed and changed <= set(plan.plan.changed)
    found = [note for part in notes.values() for key in part for note in part[key]]
    taken = [note for note in found if note["scaled"]]
    assert len(taken) >= len(found) / 2
    for note in found:
        assert note["after"] <= note["before"]
        if note["scaled"]:
            assert note["held_out_after"] < 0.99 * note["held_out_before"] or note.get("pairs")
        else:
            assert note["reason"]


def test_the_taken_scale_lowers_the_outputs_error(page: Path, tmp_path: Path) -> None:
    """What a served gate_proj loses, by a float64 formula on every token: with the factors, and without."""
    source = build("llama", tmp_path / "m", num_hidden_layers=1)
    tensors, notes = rewritten(prepared(source, page, tmp_path, "int4_wo_128", SCALES))
    (note,) = [n for n in notes["model.layers.0"]["awq"] if n["source"] == "post_attention_layernorm"]
    own, block = {k: v.double() for k, v in runs.read_all(source).items()}, "model.layers.0"
    norm = f"{block}.post_attention_layernorm.weight"
    factors = own[norm] / tensors[norm].double()
    rows = hooked(source, ROWS)[f"{block}.mlp.gate_proj"].reshape(-1, 128).double()
    weight_spec, _ = spec("int4_wo_128")

    def lost(by: torch.Tensor) -> float:
        total = 0.0
        for leaf in ("gate_proj", "up_proj"):
            weight = own[f"{block}.mlp.{leaf}.weight"]
            made = dequantize(quantize((weight * by).float(), weight_spec), weight_spec).double() / by
            total += float((rows @ (made - weight).T).square().mean(0).sum())
        return total

    assert lost(factors) < 0.9 * lost(torch.ones_like(factors))
    assert lost(factors) / lost(torch.ones_like(factors)) == pytest.approx(note["after"] / note["before"], rel=0.1)
    for ratio in (0.0, 0.5, 1.0):  # published grids, in float64
        x, w = rows.abs().mean(0), torch.cat([own[f"{block}.mlp.{leaf}_proj.weight"] for leaf in ("gate", "up")])
        for candidate in (x**ratio, x**ratio / w.square().mean(0).sqrt() ** (1 - ratio)):
            assert lost(factors) <= 1.03 * lost(candidate / (candidate.max() * candidate.min()).sqrt())


def test_nothing_is_taken_that_held_out_rows_do_not_confirm(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quarkcli.algorithms import _trials

    source = build("llama", tmp_path / "m", num_hidden_layers=1)
    proof = _trials.Trial.proof
    monkeypatch.setattr(_trials.Trial, "proof", lambda self, factors: proof(self, factors)[::-1])
    tensors, notes = rewritten(prepared(source, page, tmp_path, "int4_wo_128", SCALES))
    own = runs.read_all(source)
    assert all(torch.equal(own[name], tensors[name]) for name in own)
    assert {n["reason"] for n in notes["model.layers.0"]["awq"]} == {"not better on held-out rows"}


def test_experts_have_factors_of_their_own_inside(page: Path, tmp_path: Path) -> None:
    source = build("mixtral", tmp_path / "m", num_hidden_layers=1)
    tensors, notes = rewritten(prepared(source, page, tmp_path, "int4_wo_32", SCALES))
    own = runs.read_all(source)
    inside = [n for n in notes["model.layers.0"]["awq"] if "experts" in n["source"]]
    assert [n["source"] for n in inside] == ["block_sparse_moe.experts.*.w3"]
    assert inside[0]["pairs"] == 4 and 1 <= inside[0]["scaled"] <= 4
    router = "model.layers.0.block_sparse_moe.gate.weight"
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert torch.allclose(tensors[router] * tensors[norm], own[router] * own[norm], rtol=1e-4)


def test_clipping_with_round_to_nearest(page: Path, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m", num_hidden_layers=1)
    tensors, notes = rewritten(prepared(source, page, tmp_path, "int4_wo_128", "[{method: awq, scales: false}]"))
    own, block = runs.read_all(source), "model.layers.0"
    clipped = {n["clipped"]: n for n in notes[block]["awq"]}
    assert set(clipped) == {"self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    seen, (weight_spec, _) = hooked(source, ROWS), spec("int4_wo_128")
    for leaf, note in clipped.items():
        name = f"{block}.{leaf}.weight"
        assert note["taken"] and not torch.equal(tensors[name], own[name])
        assert bool((tensors[name].abs() <= own[name].abs()).all())
        rows = seen[f"{block}.{leaf}"].reshape(-1, own[name].shape[1]).double()
        lost = [
            float((rows @ (dequantize(quantize(w, weight_spec), weight_spec).double() - own[name].double()).T).norm())
            for w in (tensors[name], own[name])
        ]
        assert lost[0] < lost[1]
    for leaf in ("q_proj", "k_proj"):
        assert torch.equal(tensors[f"{block}.self_attn.{leaf}.weight"], own[f"{block}.self_attn.{leaf}.weight"])


@pytest.mark.parametrize(
    ("scheme", "steps", "clips"),
    [
        ("int4_wo_128", AWQ, True), ("int4_wo_128", "[{method: awq}, {method: gptq}]", False),
        ("int4_wo_128", "[{method: awq, clip: on}, {method: gptq}]", True), ("int8", AWQ, False),
        ("int4_wo_128", SCALES, False), ("int4_wo_32", "[{method: awq}, {method: hadamard, block: 64}]", False),
    ],
)  # fmt: skip
def test_who_clips(scheme: str, steps: str, clips: bool, page: Path, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m", num_hidden_layers=1)
    plan = prepared(source, page, tmp_path, scheme, steps)
    said = any("awq clips nothing" in warning for warning in plan.warnings)
    assert said == (not clips and "off" not in steps)
    notes = rewritten(plan)[1]["model.layers.0"]["awq"]
    assert any("clipped" in note for note in notes) == clips


def test_gptq_after_it_needs_no_second_look(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second moments and samples follow the factors: one forward for statistics per block.

    Where inputs are quantized, moments are of quantized inputs, and these are seen again.
    """
    from quarkcli.job.part import PartWorker

    source, calls = build("llama", tmp_path / "m", num_hidden_layers=1), []
    observe = PartWorker._observe
    spy = lambda self, *given, **more: calls.append(1) or observe(self, *given, **more)  # noqa: E731
    monkeypatch.setattr(PartWorker, "_observe", spy)
    steps = "[{method: awq}, {method: gptq}]"
    for scheme, again in (("int4_wo_128", 0), ("nvfp4", 1)):
        calls.clear()
        data = {**recipe(tmp_path, scheme, steps), **runs.data(page, 16, 128)}
        made = runs.run(source, tmp_path / scheme, **data)
        assert len(calls) == len(made.prepared.plan.parts) + again
        notes = made.report["transforms"]["awq"]["model.layers.0"]
        assert len(notes) == 4 and "held_out_after" in notes[0]


@pytest.mark.parametrize(("model", "scheme"), [("llama", "int4_wo_128"), ("mixtral", "nvfp4")])
def test_killed_batched_and_repeated_runs_are_the_same_bytes(
    model: str, scheme: str, page: Path, tmp_path: Path
) -> None:
    source = build(model, tmp_path / "m", num_hidden_layers=2 if model == "llama" else 1)
    data = {**recipe(tmp_path, scheme, "[{method: awq}]"), **runs.data(page, 16, 128)}
    calm = runs.run(source, tmp_path / "calm", **data)
    with pytest.raises(Stopped):
        runs.run(source, tmp_path / "out", time_budget=0.0, **data)
    again = runs.run(source, tmp_path / "out", resume="require", calib_batch=1, **data)
    assert runs.same_files(calm.folder, again.folder)
    assert again.report["transforms"] == json.loads(json.dumps(calm.report["transforms"]))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("[{method: awq, clip: sometimes}]", "clip must be auto, on or off"),
        ("[{method: awq, clip: off, scales: false}]", "awq has nothing to do: scales and clip are both off"),
        ("[{method: awq, n_grid: 0}]", "n_grid must be a whole number"),
        ("[{method: awq, shrink_step: 1.0e-9}]", "shrink_step 1e-09 asks for more than 1000 ranges"),
        ("[{method: awq, shrink_step: 0.6}]", "shrink_step 0.6 leads below min_clip_ratio 0.5 at once"),
        ("[{method: awq, shrink_step: 1}]", "shrink_step must lie between 0 and 1"),
        ("[{method: awq, scaling_layers: [nothing]}]", "has no channels to scale in 'nothing'"),
        ("[{method: autosmoothquant, compute_scale_loss: L3}]", "compute_scale_loss must be MSE, RMSE, MAE"),
    ],
)
def test_refusals(steps: str, said: str, page: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        prepared(runs.build("llama", tmp_path / "m"), page, tmp_path, "int4_wo_128", steps)


def test_a_plan_with_nothing_to_clip_is_refused_when_that_is_all(page: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    for steps in ("[{method: awq, scales: false}]", "[{method: awq, clip: on}]"):
        with pytest.raises(ConfigError, match="no weight to clip"):
            prepared(source, page, tmp_path, "int8", steps)
    with pytest.raises(ConfigError, match="a Hadamard mixes the values of a group"):
        prepared(source, page, tmp_path, "int4_wo_32", "[{method: awq, clip: on}, {method: hadamard, block: 64}]")


def test_another_loss_is_another_choice(page: Path, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m", num_hidden_layers=1)
    found = {}
    for loss in ("MSE", "MAE"):
        steps = f"[{{method: autosmoothquant, compute_scale_loss: {loss}}}]"
        found[loss] = rewritten(prepared(source, page, tmp_path, "int8", steps))[1]["model.layers.0"]["autosmoothquant"]
    assert all(a["before"] != b["before"] for a, b in zip(found["MSE"], found["MAE"], strict=True))


def test_errors_of_the_source_count_in_the_unit_of_the_loss() -> None:
    """A mean magnitude and a mean square of independent errors: the magnitude of their sum."""
    generator = torch.Generator().manual_seed(0)
    readers, source = (size * torch.randn(20_000, 8, generator=generator) for size in (0.03, 0.04))
    trial: Any = Trial.__new__(Trial)
    trial.plain, trial.source = SimpleNamespace(outputs=8.0), lambda factors: float(source.square().mean(0).sum())
    both = trial._with_source(float(readers.abs().mean(0).sum()), torch.ones(8), squares=False)
    assert both == pytest.approx(float((readers + source).abs().mean(0).sum()), rel=0.02)
    squared = trial._with_source(float(readers.square().mean(0).sum()), torch.ones(8), squares=True)
    assert squared == pytest.approx(float((readers + source).square().mean(0).sum()), rel=0.02)
