"""SmoothQuant against its formula in float64, and against the function that must stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli.algorithms._scaling import fits
from quarkcli.errors import ConfigError
from quarkcli.numerics.smooth import smooth_factors
from tests import runs
from tests.forward.watch import hooked

from .rewriting import ROWS, build, logits, rewritten

OWN = "schema: quark/recipe/1\nquantize:\n  scheme: {scheme}\n  algorithm: [{{method: smoothquant{more}}}]\n"
ALL = ', scaling_layers: ["*"]'


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt", 80_000)


def prepared(source: Path, page: Path, folder: Path, scheme: str = "int8", more: str = "", **options: Any) -> Any:
    recipe = folder / "own.yaml"
    recipe.write_text(OWN.format(scheme=scheme, more=more))
    return runs.prepare(source, recipe=str(recipe), **runs.data(page, 32, 64), **options)


FAMILIES = ["llama", "gemma2", "qwen2_sliding", "qwen3_moe", "qwen3_moe_fused", "mixtral", "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family: str, page: Path, tmp_path: Path) -> None:
    """Norms with an offset, biases, grouped values, experts alone and fused: all pairs of the family."""
    source = build(family, tmp_path / "m")
    plan = prepared(source, page, tmp_path, "mxfp4", ALL)
    tensors, notes = rewritten(plan)
    before, after = logits(source, None, tmp_path), logits(source, tensors, tmp_path / "new")
    assert float((before - after).abs().max()) < 1e-4 * float(before.std())
    own = runs.read_all(source)
    changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, own[name])}
    assert changed == set(plan.plan.changed) and len(changed) >= 8
    assert all(note["scaled"] for part in notes.values() for note in part["smoothquant"])


def test_float64_formula_with_grouped_values(page: Path, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "m", num_hidden_layers=1)
    tensors, _ = rewritten(prepared(source, page, tmp_path, "int8", f", alpha: 0.3{ALL}"))
    seen, own = hooked(source, ROWS), {k: v.double() for k, v in runs.read_all(source).items()}
    block = "model.layers.0"

    def largest(module: str) -> torch.Tensor:
        return seen[f"{block}.{module}"].double().abs().reshape(-1, seen[f"{block}.{module}"].shape[-1]).amax(0)

    def columns(*modules: str) -> torch.Tensor:
        return torch.cat([own[f"{block}.{m}.weight"].abs() for m in modules]).amax(0)

    def divided(name: str, by: torch.Tensor) -> None:
        own[f"{block}.{name}.weight"] /= by[:, None]

    def factors(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x**0.3 / w**0.7

    down = factors(largest("mlp.down_proj"), columns("mlp.down_proj"))
    heads = [(x.view(2, 2, 64).amax(1).reshape(-1)) for x in (largest("self_attn.o_proj"), columns("self_attn.o_proj"))]
    value = factors(*heads)  # two query heads read one head of values
    divided("self_attn.v_proj", value)
    divided("mlp.up_proj", down)
    attention = factors(largest("self_attn.q_proj"), columns(*(f"self_attn.{n}_proj" for n in "qkv")))
    mlp = factors(largest("mlp.up_proj"), columns("mlp.gate_proj", "mlp.up_proj"))
    wanted = {
        "input_layernorm": own[f"{block}.input_layernorm.weight"] / attention,
        "self_attn.q_proj": own[f"{block}.self_attn.q_proj.weight"] * attention,
        "self_attn.v_proj": own[f"{block}.self_attn.v_proj.weight"] * attention,
        "self_attn.o_proj": own[f"{block}.self_attn.o_proj.weight"] * value.view(2, 1, 64).expand(2, 2, 64).reshape(-1),
        "post_attention_layernorm": own[f"{block}.post_attention_layernorm.weight"] / mlp,
        "mlp.gate_proj": own[f"{block}.mlp.gate_proj.weight"] * mlp,
        "mlp.up_proj": own[f"{block}.mlp.up_proj.weight"] * mlp,
        "mlp.down_proj": own[f"{block}.mlp.down_proj.weight"] * down,
    }
    for name, value_ in wanted.items():
        assert torch.allclose(tensors[f"{block}.{name}.weight"].double(), value_, rtol=2e-4, atol=1e-7), name


def test_experts_share_what_they_read_and_have_their_own_inside(page: Path, tmp_path: Path) -> None:
    source = build("qwen3_moe", tmp_path / "m", num_hidden_layers=1)
    tensors, _ = rewritten(prepared(source, page, tmp_path, "mxfp4", ALL))
    own = runs.read_all(source)
    block = "model.layers.0"
    norm = f"{block}.post_attention_layernorm.weight"
    factors = own[norm] / tensors[norm]
    readers = [f"{block}.mlp.gate.weight", *(f"{block}.mlp.experts.{e}.gate_proj.weight" for e in range(4))]
    for reader in readers:  # the router among them, which is not quantized
        assert torch.allclose(tensors[reader], own[reader] * factors, rtol=1e-5)
    inside = []
    for expert in range(4):
        down = f"{block}.mlp.experts.{expert}.down_proj.weight"
        inside.append((tensors[down] / own[down]).median(0).values)
        up = f"{block}.mlp.experts.{expert}.up_proj.weight"
        assert torch.allclose(tensors[up] * inside[-1][:, None], own[up] * factors, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(inside[0], inside[1], rtol=1e-2)


def test_twice_is_once_at_one_half(page: Path, tmp_path: Path) -> None:
    """Both are equally large afterwards, so that the second pass finds 1 (invariant 13)."""
    source = build("llama", tmp_path / "m")
    once, _ = rewritten(prepared(source, page, tmp_path, "int8", ALL))
    recipe = tmp_path / "twice.yaml"
    step = '{method: smoothquant, scaling_layers: ["*"]}'
    recipe.write_text(f"schema: quark/recipe/1\nquantize:\n  scheme: int8\n  algorithm: [{step}, {step}]\n")
    twice, notes = rewritten(runs.prepare(source, recipe=str(recipe), **runs.data(page, 32, 64)))
    assert set(notes["model.layers.0"]) == {"smoothquant", "smoothquant 2"}
    assert all(torch.allclose(once[name], twice[name], rtol=3e-6, atol=1e-9) for name in once)


def test_channels_that_nothing_moves_or_reads() -> None:
    seen, columns = torch.tensor([0.0, 4.0, 4.0, 1e-9]), torch.tensor([2.0, 1.0, 0.0, 100.0])
    found = smooth_factors(seen, columns, 0.5)
    assert found[0] == 1 and found[1] == 2 and bool(torch.isfinite(found).all())
    assert found[2] == pytest.approx(2 / 1e-5**0.5) and found[3] == pytest.approx(1e-3)
    assert torch.equal(smooth_factors(seen, columns, 1.0)[1:3], seen[1:3])
    assert smooth_factors(seen, columns, 0.5, clamp_min=0.1)[3] == pytest.approx(0.1)


def test_bfloat16_norms_keep_one_factor_per_channel(page: Path, tmp_path: Path) -> None:
    """The readers take over what the rounded norm really has: a channel's error is not that of its norm."""
    source = runs.build("llama", tmp_path / "m", torch.bfloat16, num_hidden_layers=1)
    tensors, _ = rewritten(prepared(source, page, tmp_path, "int8"))
    own, norm = runs.read_all(source), "model.layers.0.input_layernorm.weight"
    real = own[norm].double() / tensors[norm].double()
    q = "model.layers.0.self_attn.q_proj.weight"
    ratio = (tensors[q].double() / own[q].double()).median(0).values
    assert float((ratio / real - 1).abs().max()) < 2e-3  # the rounding of single weights
    assert float((ratio / real - 1).abs().mean()) < 3e-4


@pytest.mark.parametrize(
    ("row", "source", "means"),
    [
        ("up_proj", "mlp.up_proj", True), ("mlp.up_proj", "mlp.up_proj", True), ("up_proj", "mlp.gate_up_proj", False),
        ("experts.*.up_proj", "mlp.experts.12.up_proj", True), ("layernorm", "input_layernorm", False),
        ("*layernorm", "input_layernorm", True),
    ],
)  # fmt: skip
def test_rows_name_whole_steps(row: str, source: str, means: bool) -> None:
    assert fits(row, source) is means


def test_default_pairs_and_those_of_a_recipe(page: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", num_hidden_layers=1)

    def sources(more: str) -> set[str]:
        plan = prepared(source, page, tmp_path, "int8", more)
        return {note["source"] for note in rewritten(plan)[1]["model.layers.0"]["smoothquant"]}

    norms = {"input_layernorm", "post_attention_layernorm"}
    assert sources("") == norms | {"mlp.up_proj"}
    assert sources(ALL) == norms | {"mlp.up_proj", "self_attn.v_proj"}
    assert sources(", scaling_layers: [v_proj]") == {"self_attn.v_proj"}
    row = "{prev_op: input_layernorm, layers: [self_attn.q_proj], inp: self_attn.q_proj}"
    assert sources(f", scaling_layers: [{row}]") == {"input_layernorm"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (", alpha: 1.5", "alpha must lie between 0 and 1"),
        (", scale_clamp_min: 0", "scale_clamp_min must lie between"),
        (", scaling_layers: [inputlayernorm]", "has no channels to scale in 'inputlayernorm'"),
        (", scaling_layers: [{layers: []}]", "names no source"),
        (", beta: 1", "has no parameter 'beta'"),
    ],
)
def test_refusals(more: str, said: str, page: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", num_hidden_layers=1)
    with pytest.raises(ConfigError, match=said):
        prepared(source, page, tmp_path, "int8", more)


def test_a_family_without_pairs_is_refused_with_what_to_add(page: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", num_hidden_layers=1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["Unknown"], "model_type": "unknown"}))
    with pytest.raises(ConfigError, match="names no channels that a quantized weight reads") as error:
        prepared(source, page, tmp_path, "int8")
    assert "readers: [self_attn.k_proj, self_attn.q_proj, self_attn.v_proj]" in error.value.hint


def test_memory_counts_rows_and_changed_weights(page: Path, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", num_hidden_layers=2)
    found = {}
    for more in ("", ALL):
        plan = prepared(source, page, tmp_path, "int8", more)
        (step,) = [step for step in plan.steps if step.name == "smoothquant"]
        found[more] = step.memory(plan.plan)
    qkv, mlp, o = (256 + 128 + 128) * 128, 3 * 256 * 128, 256 * 128
    assert found[ALL] == 4 * (qkv + mlp + o + 864 * (128 + 128 + 256 + 256))
    assert found[""] == 4 * (qkv + mlp + 864 * (128 + 128 + 256))


def test_a_run_says_what_it_did_and_resumes(page: Path, tmp_path: Path) -> None:
    from quarkcli.errors import Stopped

    source = build("llama", tmp_path / "m")
    recipe = tmp_path / "own.yaml"
    recipe.write_text(OWN.format(scheme="int8", more=""))
    data = {"recipe": str(recipe), **runs.data(page, 16, 64)}
    calm = runs.run(source, tmp_path / "calm", **data)
    notes = calm.report["transforms"]["smoothquant"]["model.layers.1"]
    assert {"source": "mlp.up_proj", "scaled": True, "alpha": 0.5} in notes
    assert "model.layers.1.mlp.up_proj.weight" in calm.report["changed"]
    with pytest.raises(Stopped):
        runs.run(source, tmp_path / "out", time_budget=0.0, **data)
    again = runs.run(source, tmp_path / "out", resume="require", calib_batch=1, **data)
    assert runs.same_files(calm.folder, again.folder)
    assert again.report["transforms"] == calm.report["transforms"]
