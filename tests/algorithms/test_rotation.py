"""Rotations against their formula in float64; what must stay, what is refused, and how little bf16 loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quarkcli.algorithms import rotation
from quarkcli.errors import ConfigError
from quarkcli.evaluation.run import evaluate
from quarkcli.job.fingerprint import fingerprint
from quarkcli.job.finish import resolved_recipe
from quarkcli.job.options import Options
from quarkcli.job.run import prepare
from tests import runs
from tests.algorithms import turning
from tests.algorithms.test_permutation import recipe


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt", 80_000)


def solved(before: Tensor, after: Tensor) -> Tensor:
    """The Q of after = before Q, float64."""
    found: Tensor = torch.linalg.lstsq(before.double(), after.double()).solution
    return found


def close(one: Tensor, other: Tensor) -> bool:
    return float((one.double() - other.double()).abs().max()) < 2e-6 * float(other.double().abs().max())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"hidden_size": 144, "head_dim": 36}])
def test_formula(changes: dict[str, Any], tmp_path: Path) -> None:
    """Every tensor from the Q that turned the embedding, and from the R of each head."""
    source = runs.build("llama", tmp_path / "m", torch.float32, **changes)
    old = turning.source_tensors(source)
    new, plan = turning.turned(source, [("rotation", {})], old)
    embedding, tied = "model.embed_tokens.weight", "lm_head.weight" not in old
    q = solved(old[embedding], new[embedding])
    n = len(q)
    assert close(q @ q.T, torch.eye(n)) and close(q.abs() * n**0.5, torch.ones(n, n))
    assert (q < 0).any(0).all()  # signs are drawn: no column is constant
    head = old[embedding] if tied else old["lm_head.weight"]
    assert close(new["lm_head.weight"], head.double() * old["model.norm.weight"].double() @ q)
    assert bool((new["model.norm.weight"] == 1).all())
    assert plan.config_changes == ({"tie_word_embeddings": False} if tied else {})
    size = changes.get("head_dim", 64)
    for block in ("model.layers.0", "model.layers.1"):
        first, second = (old[f"{block}.{x}_layernorm.weight"].double() for x in ("input", "post_attention"))
        for leaf, norm in (("self_attn.q", first), ("self_attn.k", first), ("mlp.gate", second), ("mlp.up", second)):
            name = f"{block}.{leaf}_proj.weight"
            assert close(new[name], old[name].double() * norm @ q), name
        assert close(new[f"{block}.mlp.down_proj.weight"], q.T @ old[f"{block}.mlp.down_proj.weight"].double())
        v, o = (f"{block}.self_attn.{leaf}_proj.weight" for leaf in "vo")
        turns = []
        for group in range(len(old[v]) // size):
            rows = slice(group * size, (group + 1) * size)
            r = solved((old[v][rows].double() * first @ q).T, new[v][rows].T)
            assert close(r @ r.T, torch.eye(size))
            turns += [r] * (old[o].shape[1] // len(old[v]))
        assert not close(turns[0], turns[-1])
        assert close(new[o], q.T @ old[o].double() @ torch.block_diag(*turns))


def test_plain_and_in_blocks(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32)
    old = turning.source_tensors(source)
    name = "model.embed_tokens.weight"
    plain, _ = turning.turned(source, [("rotation", {"random": False})], old)
    q = solved(old[name], plain[name])
    assert close(q[:, 0], torch.full((128,), 128**-0.5)) and close(q, q.T)
    blocks, _ = turning.turned(source, [("rotation", {"block": 32})], old)
    q = solved(old[name], blocks[name])
    inside = torch.block_diag(*[torch.ones(32, 32)] * 4)
    assert close(q * q, inside.double() / 32 * 1.0) or float((q.abs() - inside * 32**-0.5).abs().max()) < 1e-6
    one, other = turning.logits(source, old), turning.logits(source, blocks)
    assert float((one - other).abs().max()) < 1e-4 * float(one.std())


def test_seeds(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32)
    old = turning.source_tensors(source)
    made = [turning.turned(source, [("rotation", {})], old, seed)[0] for seed in (0, 0, 1)]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0]["lm_head.weight"], made[2]["lm_head.weight"])


@pytest.mark.parametrize("random", [True, False])
def test_a_seed_without_data_counts_where_signs_are_drawn_from_it(random: bool, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32)
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "schema: quark/recipe/1\nmetadata: {name: own}\nquantize:\n  scheme: mxfp4\n"
        f"  algorithm: [{{method: rotation, random: {random}}}]\n"
    )
    made = prepare(Options(model=str(source), recipe=str(recipe), output=tmp_path / "out", seed=3))
    assert any("--seed not used" in line for line in made.warnings) is not random
    assert fingerprint(made, None, "cpu")["data"]["seed"] == (3 if random else None)
    again = tmp_path / "again.yaml"
    again.write_text(resolved_recipe(made))
    second = prepare(Options(model=str(source), recipe=str(again), output=tmp_path / "out"))
    assert second.seed == (3 if random else 0)
    assert not any("not used" in line for line in second.warnings)


def test_bf16_loses_no_more_than_it_does_unrotated(tmp_path: Path) -> None:
    """One rounding of each tensor: the error to float32 of the rotated model is that of the model itself."""
    source = runs.build("qwen2_sliding", tmp_path / "m", torch.bfloat16)
    tensors = runs.read_all(source)
    exact = turning.logits(source, turning.source_tensors(source)).double()
    rotated, _ = turning.turned(source, [("rotation", {})], tensors)
    assert all(rotated[name].dtype == torch.bfloat16 for name in rotated)
    errors = [
        float((turning.logits(source, own, torch.bfloat16).double() - exact).norm()) for own in (tensors, rotated)
    ]
    assert errors[1] < 1.5 * errors[0], errors


def test_a_tied_model_as_written(page: Path, tmp_path: Path) -> None:
    """One linear in int8, the rest as changed: head, config and all load as they are written."""
    source = runs.build("llama", tmp_path / "m", torch.float32, tie_word_embeddings=True)
    made = runs.run(source, tmp_path / "out", recipe=recipe(tmp_path, "int8_dynamic", [{"method": "rotation"}]),
                    exclude=["*_proj"], include=["*layers.0.*down_proj"])  # fmt: skip
    assert made.report["added"] == ["lm_head.weight"]
    assert json.loads((made.folder / "config.json").read_text())["tie_word_embeddings"] is False
    result = evaluate(str(made.folder), baseline=str(source), text=str(page), window=128, max_tokens=512, device="cpu",
                      dtype="float32", tell=lambda event: None)  # fmt: skip
    assert abs(result["kl"]) < 5e-5
    planned = made.prepared.forecast.output_bytes
    assert planned == sum(file.stat().st_size for file in made.folder.glob("*.safetensors"))


def test_permuted_first_or_last_a_tied_head_follows(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32, tie_word_embeddings=True)
    old = turning.source_tensors(source)
    one = turning.logits(source, old)
    for names in (("permutation", "rotation"), ("rotation", "permutation")):
        new, _ = turning.turned(source, [(name, {}) for name in names], old)
        assert float((one - turning.logits(source, new)).abs().max()) < 1e-4 * float(one.std()), names


@pytest.mark.parametrize(
    ("scheme", "given", "what"),
    [
        ("nvfp4", {"block": 16}, "a block of 16 inside the groups of"),
        ("nvfp4", {"block": 8}, "a block of 8 inside the groups of"),
        ("mxfp4", {"block": 48}, "a block of 48 does not divide 128 channels"),
        ("mxfp4", {"block": 4}, "block is a number of channels from 8 on"),
        ("mxfp4", {"r1": False, "r2": False}, "nothing to do"),
        ("mxfp4", {"r1": False, "block": 32}, "block has no effect without r1"),
        ("mxfp4", {"r2": "yes"}, "r2 is true, false or auto"),
        ("mxfp4", {"random": 1}, "random is true or false"),
    ],
)
def test_refusals(scheme: str, given: dict[str, Any], what: str, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    with pytest.raises(ConfigError, match=what):
        runs.prepare(source, recipe=recipe(tmp_path, scheme, [{"method": "rotation", **given}]), calib_data="builtin")


def test_a_block_of_the_group_is_for_powers_of_two(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    steps = [{"method": "rotation", "block": 32}]
    assert runs.prepare(source, recipe=recipe(tmp_path, "mxfp4", steps)).plan.changed


def test_sizes() -> None:
    assert rotation.size_of(576, None) == 576 and rotation.size_of(2880, None) == 2880
    assert rotation.size_of(27392, None) == 256  # 107 * 256: no factor is known, blocks of the power of two
    with pytest.raises(ConfigError, match="no Hadamard matrix of size 92 is known"):
        rotation.size_of(92, None)
