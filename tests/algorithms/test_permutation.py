"""Channels in order of their size: where they go, what follows them, and what it is good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli import algorithms
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import ConfigError
from quarkcli.evaluation.run import evaluate
from tests import runs
from tests.algorithms import turning
from tests.algorithms.rewriting import ROWS
from tests.forward.watch import hooked
from tests.plan import layouts

OWN = "schema: quark/recipe/1\nquantize:\n  scheme: {scheme}\n  algorithm: {steps}\n"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt", 80_000)


def recipe(folder: Path, scheme: str, steps: list[dict[str, Any]]) -> str:
    path = folder / f"own-{len(list(folder.glob('own-*')))}.yaml"
    path.write_text(OWN.format(scheme=scheme, steps=json.dumps(steps)))
    return str(path)


def with_outliers(folder: Path) -> Path:
    """The embedded model with eight channels of its norms 30 times as large, and their readers as much smaller."""
    folder.mkdir()
    for file in EMBEDDED.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    width = tensors["model.norm.weight"].shape[0]
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(1))[:8]
    scale = torch.ones(width)
    scale[chosen] = 32.0
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor.mul_(scale.to(tensor))
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor.div_(scale.to(tensor))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def kl(folder: Path, baseline: Path, page: Path, **options: Any) -> float:
    usual = {"window": 128, "max_tokens": 1024, "device": "cpu", "tell": lambda event: None}
    return float(evaluate(str(folder), baseline=str(baseline), text=str(page), **{**usual, **options})["kl"])


def test_the_order_is_that_of_sizes(page: Path, tmp_path: Path) -> None:
    """Against a float64 formula: of the residual stream, of the MLP, and of values inside their heads."""
    source = runs.build("llama", tmp_path / "m", torch.float32)
    data = runs.data(page, 16, 128)
    made = runs.run(source, tmp_path / "out", recipe=recipe(tmp_path, "mxfp8", [{"method": "permutation"}]),
                    exclude=["*_proj"], include=["*q_proj"], target="none", **data)  # fmt: skip
    before, after = runs.read_all(source), runs.read_all(made.folder)
    embedding = "model.embed_tokens.weight"
    order = [int((before[embedding] == column[:, None]).all(0).nonzero()) for column in after[embedding].T]
    assert sorted(order) == list(range(len(order))) and order != sorted(order)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(after[norm], before[norm][order])
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"][:, order])
    up = "model.layers.0.mlp.up_proj.weight"
    rows = [int((before[up][:, order] == row).all(1).nonzero()) for row in after[up]]
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(after[gate], before[gate][rows][:, order])
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(after[down], before[down][order][:, rows])
    v, o = (f"model.layers.1.self_attn.{leaf}_proj.weight" for leaf in "vo")
    values = [int((before[v][:, order] == row).all(1).nonzero()) for row in after[v]]
    assert [place // 64 for place in values] == [place // 64 for place in range(len(values))]
    columns = [64 * head + values[64 * (head // 2) + i] % 64 for head in range(4) for i in range(64)]
    assert torch.equal(after[o], before[o][order][:, columns])
    assert made.prepared.plan.config_changes == {} and not made.report["added"]


def test_sizes_by_an_independent_pass(tmp_path: Path, page: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32, num_hidden_layers=2)
    seen = hooked(source, ROWS)
    plan = runs.prepare(source, scheme="int8_dynamic", target="none").plan
    member = algorithms.create("permutation", {})

    class Known:
        def channel_amax(self, site: str) -> torch.Tensor:
            return self.rows(site).abs().amax(0)

        def rows(self, site: str) -> torch.Tensor:
            x = seen[plan.sites[site].members[0]]
            return x.reshape(-1, x.shape[-1])

    prepass: Any = {part.index: Known() for part in plan.parts}
    state = member.prepare(plan, 0, prepass)  # type: ignore[attr-defined]
    total = torch.zeros(128, dtype=torch.float64)
    for index in range(2):
        for module in ("self_attn.q_proj", "mlp.gate_proj"):
            own = seen[f"model.layers.{index}.{module}"].double().reshape(-1, 128).abs().amax(0)
            total += own / own.mean()
    sizes = total[state["order"]]
    assert bool((sizes[:-1] >= sizes[1:] - 1e-6).all())


def test_outliers_share_blocks(page: Path, tmp_path: Path) -> None:
    source, data = with_outliers(tmp_path / "m"), runs.data(page, 16, 128)
    plain = runs.run(source, tmp_path / "plain", scheme="mxfp4", **data)
    sorted_ = runs.run(source, tmp_path / "s", recipe=recipe(tmp_path, "mxfp4", [{"method": "permutation"}]), **data)
    turned = runs.run(source, tmp_path / "r", recipe=recipe(tmp_path, "mxfp4", [{"method": "rotation"}]))
    base = kl(plain.folder, source, page)
    assert kl(sorted_.folder, source, page) < 0.8 * base
    assert kl(turned.folder, source, page) < 0.5 * base


def test_before_smoothing_and_gptq_on_experts(page: Path, tmp_path: Path) -> None:
    """Statistics are those of channels in their new places: the composition is no worse than gptq alone."""
    data, source = runs.data(page, 16, 128), runs.build("qwen3_moe", tmp_path / "m")
    steps: list[dict[str, Any]] = [{"method": "permutation"}, {"method": "smoothquant"}, {"method": "gptq"}]
    made = runs.run(source, tmp_path / "out", recipe=recipe(tmp_path, "nvfp4", steps), **data)
    plain = runs.run(source, tmp_path / "plain", scheme="nvfp4", algorithm="gptq", **data)
    assert made.report["algorithms"] == ["permutation", "smoothquant", "gptq"]
    assert kl(made.folder, source, page) < 1.15 * kl(plain.folder, source, page)


@pytest.mark.parametrize("steps", [[{"method": "permutation"}, {"method": "rotation"}, {"method": "gptq"}]])
def test_killed_and_resumed(steps: list[dict[str, Any]], page: Path, tmp_path: Path) -> None:
    data = {**runs.data(page, 8, 128), "recipe": recipe(tmp_path, "nvfp4", steps), "seed": 3}
    calm = runs.run("demo", tmp_path / "calm", **data)
    runs.killed(3, lambda: runs.run("demo", tmp_path / "out", **data))
    again = runs.run("demo", tmp_path / "out", resume="require", **data)
    assert runs.same_files(calm.folder, again.folder)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"residual": 1}, "residual is true or false"),
        ({"size": "rms"}, "size is mean or max"),
        ({"residual": False, "inner": False, "values": False}, "has nothing to do: residual, inner and values are all"),
    ],
)
def test_parameters_without_sense(given: dict[str, Any], what: str, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    with pytest.raises(ConfigError, match=what):
        runs.prepare(source, recipe=recipe(tmp_path, "mxfp4", [{"method": "permutation", **given}]))


@pytest.mark.parametrize("scheme", ["ptpc_fp8", "int8"])
def test_a_scale_for_all_channels_has_no_use_for_their_order(scheme: str) -> None:
    with pytest.raises(ConfigError, match="permutation changes nothing: no weight and no layer input has a scale for"):
        runs.prepare("demo", scheme=scheme, algorithm="permutation", calib_data="builtin")


@pytest.mark.parametrize(
    ("on", "what", "hint"),
    [
        ((), "residual, inner and values are all off", "write residual: true, or leave permutation out"),
        (("inner", "values"), "names no channels that", "'channels' and 'heads' in the family file, or write res"),
        (("values",), "names no values of heads that", "'heads' in the family file, or write inner: true or res"),
    ],
)
def test_what_is_off_is_said_apart_from_what_the_family_lacks(on: tuple[str, ...], what: str, hint: str) -> None:
    given = {key: key in on for key in ("residual", "inner", "values")}
    bare = layouts.plan("mxfp4", layouts.lay_out(layouts.llama(), "novel", hidden_size=128, num_hidden_layers=3))
    with pytest.raises(ConfigError, match=what) as caught:
        algorithms.create("permutation", given).check(bare)
    assert hint in caught.value.hint


def test_a_family_that_nobody_described(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["NobodyForCausalLM"], "model_type": "nobody"}
    (source / "config.json").write_text(json.dumps(config))
    for name in ("permutation", "rotation"):
        with pytest.raises(ConfigError, match="the family file says nothing about the residual stream") as caught:
            runs.prepare(source, scheme="mxfp4", algorithm=name)
        assert "or name in the family file and in 'slots' all that reads and writes the stream" in caught.value.hint


def test_some_weights_alone(tmp_path: Path) -> None:
    """A stream cannot change for some of its readers; channels inside a block can."""
    source = runs.build("llama", tmp_path / "m")
    slots = ["*layers.1.*.weight_quantizer"]
    with pytest.raises(
        ConfigError, match="the channels of the residual stream cannot change places in model family 'llama'"
    ) as caught:
        runs.prepare(source, recipe=recipe(tmp_path, "mxfp4", [{"method": "permutation", "slots": slots}]))
    assert "slots" in caught.value.hint
    own = {"method": "permutation", "slots": slots, "residual": False}
    plan = runs.prepare(source, recipe=recipe(tmp_path, "mxfp4", [own])).plan
    leaves = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.v_proj")
    assert sorted(plan.changed) == [f"model.layers.1.{leaf}.weight" for leaf in leaves]


def test_a_tensor_whose_place_is_not_known(tmp_path: Path) -> None:
    """One more vector of the stream's width in a block: refused by name."""
    source = runs.build("llama", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.gain"] = torch.ones(128, dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for name in ("permutation", "rotation"):
        with pytest.raises(ConfigError, match="one of its sizes is 128") as caught:
            runs.prepare(source, scheme="mxfp4", algorithm=name)
        assert caught.value.where == "model.layers.0.self_attn.gain"


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32, tie_word_embeddings=True)
    before = turning.source_tensors(source)
    after, plan = turning.turned(source, [("permutation", {})], before)
    assert set(after) == set(before) and not plan.added and not plan.config_changes
    one, other = turning.logits(source, before), turning.logits(source, after)
    assert float((one - other).abs().max()) < 1e-4 * float(one.std())
