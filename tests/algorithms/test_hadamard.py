"""Online Hadamards: the same function in float, what is served is what is measured, and who refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quarkcli.algorithms.base import Moment
from quarkcli.algorithms.hadamard import Hadamard
from quarkcli.cli import planview, summary
from quarkcli.disk import verify
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.journal import Journal
from quarkcli.disk.source import Source
from quarkcli.errors import CheckError, ConfigError, ModelError
from quarkcli.evaluation.run import evaluate
from quarkcli.forward.walk import SERVED, Walk
from quarkcli.job import rows as job_rows
from quarkcli.job import run as job
from quarkcli.job.rewriting import Rewriting
from quarkcli.model.handlers import Handlers
from quarkcli.model.runner import Runner
from quarkcli.numerics.hadamard import sylvester
from quarkcli.numerics.online import turned
from tests import runs

RECIPE = "schema: quark/recipe/1\nquantize:\n  scheme: %s\n  algorithm: [%s]\n"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt", 80_000)


def recipe(folder: Path, scheme: str, steps: str) -> str:
    path = folder / "online.yaml"
    path.write_text(RECIPE % (scheme, steps))
    return str(path)


def compared(folder: Path, baseline: Path, page: Path, **options: Any) -> dict[str, Any]:
    usual = {"window": 128, "max_tokens": 1024, "device": "cpu", "tell": lambda event: None}
    return evaluate(str(folder), baseline=str(baseline), text=str(page), **{**usual, **options})


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 32, 128, 1024])
def test_a_turned_row_is_a_product_with_the_matrix(block: int) -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    assert torch.equal(matrix, sylvester(block).double())
    x = torch.randn(3, 5, 2048, generator=torch.Generator().manual_seed(0))
    wanted = x.double() @ torch.kron(torch.eye(2048 // block, dtype=torch.float64), matrix) / block**0.5
    torch.testing.assert_close(turned(x, block).double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned(turned(x, block), block), x, rtol=0, atol=1e-5)


def test_moments_follow() -> None:
    made = torch.Generator().manual_seed(1)
    x, s = (torch.randn(400, 64, generator=made) for _ in range(2))

    def moments(x: torch.Tensor, s: torch.Tensor) -> Moment:
        half = len(x) // 2
        cross = x[:half].T @ s[:half] / half, x[half:].T @ s[half:] / half
        return Moment(x[:half].T @ x[:half] / half, half, cross[0], x[half:].T @ x[half:] / half, cross[1])

    wanted = moments(turned(x.double(), 16).float(), turned(s.double(), 16).float())
    for ours, theirs in zip(moments(x, s).turned(16).means(), wanted.means(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# -- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 32, 128, "full"])
def test_float_logits_stay(block: Any, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m", torch.float32)
    steps = f"{{method: hadamard, block: {block}}}"
    prepared = runs.prepare(source, recipe=recipe(tmp_path, "int8_dynamic", steps))
    tokens = torch.randint(0, runs.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    plain, own = (logits(prepared, tokens, turn=turn) for turn in (False, True))
    assert len(prepared.plan.online) == 14
    torch.testing.assert_close(own, plain, rtol=0, atol=1e-4)


def logits(prepared: job.Prepared, tokens: torch.Tensor, *, turn: bool) -> torch.Tensor:
    """Of the source's weights in float32, as they are or turned with their inputs."""
    plan = prepared.plan
    runner = Runner(
        prepared.source.folder,
        prepared.weights.headers,
        dtype=torch.float32,
        transposed_experts=prepared.layout.transposed_experts,
    )

    def read(names: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.float() for name, tensor in prepared.weights.read_many(names).items()}

    walk = Walk(runner, lambda: read(runner.outside_tensors()), tokens, None, 2, lambda event: None)
    walk.start()
    for part in plan.parts:
        if part.block is None or part.block >= runner.num_blocks:
            continue
        tensors = read(part.tensors)
        before = dict(tensors)
        if turn:
            blocks = Rewriting(plan, part, tensors, [], {}, prepared.weights).online()
            walk.turned[part.block] = {plan.targets[name].view.tensor: size for name, size in blocks.items()}
        changed = {name for name in tensors if not torch.equal(tensors[name], before[name])}
        online = (plan.targets[name] for name in plan.online if turn)
        assert changed == {target.view.tensor for target in online if target.part == part.index}
        runner.load_block(part.block, tensors)
        walk.advance(part.block, Handlers())
    runner.load_outside(walk.outside())
    return runner.logits(walk.recordings[SERVED][0], walk.served[0])


# -- as served --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "block"), [("nvfp4", 128), ("fp8", 128), ("mxfp4", 32)])
def test_scales_are_those_of_turned_inputs(scheme: str, block: int, page: Path, tmp_path: Path) -> None:
    """Static scales against a pass of transformers' own model, whose inputs are turned by a matrix product."""
    made = runs.run("demo", tmp_path / "out", scheme=scheme, algorithm="hadamard", **runs.data(page, 16, 128))
    plan = made.prepared.plan
    assert set(plan.online.values()) == {block} and len(plan.online) == 28
    decoded, source = Checkpoint(Source.open(str(made.folder))), runs.read_all(made.source)
    assert decoded.view.online == plan.online
    for name in plan.online:
        weight = source[f"{name}.weight"].float()
        found = turned(decoded.weight(name), block)
        assert float((found - weight).norm() / weight.norm()) < 0.15
    if scheme not in runs.CALIBRATED:
        return
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.bfloat16)
    seen: dict[str, float] = {}
    for name in plan.online:
        model.get_submodule(name).register_forward_pre_hook(looking(seen, name, block))
    rows = job_rows.token_rows(made.prepared, lambda event: None)
    assert rows is not None
    with torch.no_grad():
        model(rows.tokens)
    for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.0.{leaf}"  # whose inputs are the source's own
        static = decoded.decode(decoded.view.targets[name]).input
        assert static is not None
        largest = {"fp8": 448.0, "nvfp4": 448.0 * 6.0}[scheme]
        assert float(static) * largest == pytest.approx(seen[name], rel=0.02), name


def looking(seen: dict[str, float], name: str, block: int) -> Any:
    """A hook that widens the range of what a module reads, once it is turned."""

    def hook(module: Any, args: Any) -> None:
        seen[name] = max(seen.get(name, 0.0), float(turned(args[0], block).float().abs().max()))

    return hook


def test_with_gptq_every_way_is_one(page: Path, tmp_path: Path) -> None:
    """Moments that follow, and those of turned inputs that are collected, leave the same weights but for rounding."""
    data = runs.data(page, 16, 128)
    steps = "{method: hadamard, block: 64}, {method: gptq}"
    made = runs.run("demo", tmp_path / "out", recipe=recipe(tmp_path, "int4_wo_128", steps), **data)
    plain = runs.run("demo", tmp_path / "plain", scheme="int4_wo_128", algorithm="gptq", **data)
    nearest = runs.run("demo", tmp_path / "rtn", scheme="int4_wo_128", algorithm="hadamard")
    source = made.source
    kl = {key: compared(m.folder, source, page)["kl"] for key, m in (("m", made), ("p", plain), ("n", nearest))}
    assert kl["m"] < 1.2 * kl["p"] and kl["m"] < 0.8 * kl["n"]
    assert set(made.report["changed"].values()) == {"hadamard"} and len(made.report["changed"]) == 28
    assert made.report["algorithms"] == ["hadamard", "gptq"]


def test_cut_off_and_resumed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = "{method: hadamard, block: 128}, {method: gptq}"
    data = {**runs.data(page, 8, 128), "recipe": recipe(tmp_path, "mxfp4", steps)}
    calm = runs.run("demo", tmp_path / "calm", **data)
    finish, calls = Journal.finish, []

    def dying(self: Journal, *given: Any) -> None:
        finish(self, *given)
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError

    monkeypatch.setattr(Journal, "finish", dying)
    with pytest.raises(MemoryError):
        runs.run("demo", tmp_path / "out", **data)
    monkeypatch.setattr(Journal, "finish", finish)
    again = runs.run("demo", tmp_path / "out", **{**data, "resume": "require"})
    assert runs.same_files(calm.folder, again.folder)
    assert sum(name.endswith(".hadamard_128_input.weight") for name in runs.read_all(again.folder)) == 1


def test_r4_is_the_input_of_down_alone(page: Path, tmp_path: Path) -> None:
    steps = "{method: hadamard, block: full, slots: ['*down_proj.weight_quantizer']}"
    made = runs.run("demo", tmp_path / "out", recipe=recipe(tmp_path, "mxfp4", steps))
    assert made.prepared.plan.online == {f"model.layers.{i}.mlp.down_proj": 128 for i in range(4)}  # 384 = 3 * 128
    plain = runs.run("demo", tmp_path / "plain", scheme="mxfp4")
    ours, theirs = runs.read_all(made.folder), runs.read_all(plain.folder)
    assert set(ours) - set(theirs) == {"model.layers.0.mlp.down_proj.hadamard_128_input.weight"}
    assert all(runs.same_bytes(ours[n], theirs[n]) for n in theirs if "down_proj" not in n)
    planned = made.prepared.forecast.output_bytes
    assert planned == sum(file.stat().st_size for file in made.folder.glob("*.safetensors"))
    kl = compared(made.folder, plain.folder, page)["kl"]
    assert kl < 0.1


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1, 3, 48, -32, True, "whole", 1 << 16, 32.0])
def test_a_block_is_a_power_of_two(block: Any) -> None:
    with pytest.raises(ConfigError, match="a power of two from 2 to 32768"):
        Hadamard(block, False)


def test_queries_and_keys_stay() -> None:
    with pytest.raises(
        ConfigError, match="hadamard r3 is not supported: no server rotates queries and keys while the model runs"
    ):
        Hadamard("auto", True)


def test_a_block_divides_the_width(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a block of 256 does not divide 384 input features") as caught:
        runs.prepare("demo", recipe=recipe(tmp_path, "mxfp4", "{method: hadamard, block: 256}"))
    assert caught.value.hint == "write block: 128, or full"


@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4_weight_only"])
def test_nvfp4_takes_no_block_of_its_own_size(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="costs accuracy: an outlier harms its group either way"):
        runs.prepare("demo", recipe=recipe(tmp_path, scheme, "{method: hadamard, block: 16}"))
    runs.prepare("demo", recipe=recipe(tmp_path, scheme, "{method: hadamard, block: 32}"))


def test_all_that_read_one_input_are_turned(tmp_path: Path) -> None:
    steps = "{method: hadamard, slots: ['*q_proj.weight_quantizer']}"
    with pytest.raises(
        ConfigError,
        match="with the same input has a Hadamard of 32; servers rotate an input once for all layers that read it",
    ):
        runs.prepare("demo", recipe=recipe(tmp_path, "mxfp4", steps))


def test_no_input_is_turned_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="and hadamard 2 both rotate its input"):
        runs.prepare("demo", recipe=recipe(tmp_path, "mxfp4", "{method: hadamard}, {method: hadamard}"))


def test_who_cannot_say_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no place for inputs that are rotated while the model runs"):
        runs.prepare("demo", scheme="mxfp4", algorithm="hadamard", dialect="quark")
    prepared = runs.prepare("demo", scheme="mxfp4", algorithm="hadamard")
    assert prepared.dialect.name == "compressed-tensors"
    assert "loads in vLLM only" in prepared.dialect_reason and "one GPU per replica" in prepared.dialect_reason
    with pytest.raises(ConfigError, match="no checkpoint format can hold this plan"):
        runs.prepare("demo", scheme="mx6", algorithm="hadamard")


def test_experts_and_biases_are_left_out(tmp_path: Path) -> None:
    experts = runs.prepare(runs.build("qwen3_moe", tmp_path / "moe"), scheme="mxfp4", algorithm="hadamard")
    online = experts.plan.online
    assert online and not any("experts" in name for name in online)
    assert any(
        "servers run routed experts together and rotate only inputs of single linear layers" in warning
        for warning in experts.warnings
    )
    biased = runs.prepare(runs.build("qwen2_sliding", tmp_path / "qwen2"), scheme="mxfp4", algorithm="hadamard")
    assert {name.rpartition(".")[2] for name in biased.plan.online} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert any(
        "vLLM 0.32 stops at a linear layer with a bias and a rotated input" in warning for warning in biased.warnings
    )
    steps = "{method: hadamard, slots: ['*experts*']}"
    with pytest.raises(ConfigError, match="hadamard finds no linear layer whose input it can rotate"):
        runs.prepare(experts.source.folder, recipe=recipe(tmp_path, "mxfp4", steps))


def test_it_is_shown_and_verified(tmp_path: Path) -> None:
    made = runs.run("demo", tmp_path / "out", scheme="mxfp4", algorithm="hadamard")
    assert made.report["online"] == dict.fromkeys((t.name for t in made.prepared.plan.quantized()), 32)
    said = "a Hadamard of 32 rotates the inputs of 28 layers"
    assert f"rotated as the config says: {said}" in made.report["checks"]
    assert f"| while it runs | {said} |" in (made.folder / "README.md").read_text()
    assert f"at run time {said}" in planview.header(made.prepared)
    assert said in summary.markdown(made.report)
    assert any(said in line for line in verify.directory(str(made.folder), str(made.source)))


def damaged(folder: Path, change: Any) -> str:
    """The reason why a checkpoint with another transform config is no good."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["transform_config"]["config_groups"]["hadamard_32"])
    path.write_text(json.dumps(config))
    with pytest.raises((CheckError, ModelError)) as caught:
        verify.directory(str(folder))
    return str(caught.value)


def applied(**keys: Any) -> Any:
    return lambda group: group["apply"][0].update(keys)


DAMAGE = [
    (lambda group: group.update(head_dim=256), "inputs are rotated in blocks that do not fit"),
    (lambda group: group.update(head_dim=48), "the size 48 of a Hadamard is not a power of two"),
    (
        lambda group: group.update(type="random-hadamard"),
        "this version cannot read a transform of type 'random-hadamard', only a plain '",
    ),
    (lambda group: group.update(randomize=True), "only a plain 'hadamard'"),
    (lambda group: group["apply"].append(dict(group["apply"][0])), "the transform config rotates its input twice"),
    (applied(location="output"), "it has a transform at 'output', and this version can read only those of inputs"),
    (applied(location="q_attn"), "it has a transform at 'q_attn', and this version can read only those of inputs"),
    (
        applied(ignore=["re:.*q_proj$"]),
        "groups of weights that servers multiply together have inputs that are rotated differently",
    ),
]


@pytest.mark.parametrize(("change", "reason"), DAMAGE)
def test_what_a_config_cannot_mean_is_refused(change: Any, reason: str, tmp_path: Path) -> None:
    made = runs.run("demo", tmp_path / "out", scheme="mxfp4", algorithm="hadamard")
    assert reason in damaged(made.folder, change)


def test_what_is_done_beforehand_is_passed_over(tmp_path: Path) -> None:
    """llm-compressor writes that weights were turned as well, and names the class."""
    made = runs.run("demo", tmp_path / "out", scheme="mxfp4", algorithm="hadamard")
    path = made.folder / "config.json"
    config = json.loads(path.read_text())
    row = {"targets": ["Linear"], "ignore": ["lm_head"], "location": "input", "inverse": False}
    group = config["quantization_config"]["transform_config"]["config_groups"]["hadamard_32"]
    group["apply"] = [row, {**row, "location": "weight_input", "inverse": True}]
    path.write_text(json.dumps(config))
    checkpoint = Checkpoint(Source.open(str(made.folder)))
    assert checkpoint.view.online == made.prepared.plan.online


def test_no_input_outside_the_blocks_is_passed_over(page: Path, tmp_path: Path) -> None:
    made = runs.run("demo", tmp_path / "out", scheme="mxfp4", algorithm="hadamard")
    path = made.folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["transform_config"]["config_groups"]["hadamard_32"]["apply"][0]["targets"] += [
        "lm_head"
    ]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lm_head\.weight: the config rotates its input, but it is outside"):
        compared(made.folder, made.source, page)


def test_a_stored_matrix_is_looked_at(tmp_path: Path) -> None:
    made = runs.run("demo", tmp_path / "out", scheme="mxfp4", algorithm="hadamard")
    for file in made.folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("_input.weight")]:
            tensors[name][3, 5] *= -1
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckError, match="matrices are no Hadamard"):
        verify.directory(str(made.folder))
