"""Polish on whole runs: codes stay, norms, biases and float scales move, no block gets worse, killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quarkcli import algorithms
from quarkcli.algorithms import polish
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import ConfigError
from quarkcli.job import rows as job_rows
from quarkcli.plan.model import Fate
from tests import runs

RECIPE = "schema: quark/recipe/1\nquantize:\n  scheme: %s\n  algorithm: [%s]\n"
QUICK = "{method: rtn}, {method: polish, iters: 8, batch: 1}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt", 80_000)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("llama", tmp_path_factory.mktemp("llama") / "m")


def made(source: Path, folder: Path, scheme: str, steps: str, page: Path, **options: Any) -> runs.Made:
    path = folder.with_suffix(".yaml")
    path.write_text(RECIPE % (scheme, steps))
    return runs.run(source, folder, recipe=str(path), **{**runs.data(page, 16, 128), **options})


def different(one: runs.Made, other: runs.Made) -> set[str]:
    ours, theirs = runs.read_all(one.folder), runs.read_all(other.folder)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not runs.same_bytes(ours[name], theirs[name])}


CASES = [
    ("llama", "nvfp4"), ("qwen2_sliding", "int2_wo_128"), ("gemma2", "int4_wo_128"), ("qwen3_moe", "int4_wo_32"),
    ("gpt_oss", "mxfp4"),
    *(pytest.param("llama", scheme, marks=pytest.mark.slow) for scheme in ("int4_wo_128", "mxfp4")),
]  # fmt: skip


@pytest.mark.parametrize(("model", "scheme"), CASES)
def test_what_stays_in_16_bits_moves_and_no_block_gets_worse(
    model: str, scheme: str, page: Path, tmp_path: Path
) -> None:
    source = runs.build(model, tmp_path / "m", **({"head_dim": 64} if model in {"gemma2", "qwen2_sliding"} else {}))
    run = made(source, tmp_path / "out", scheme, QUICK, page)
    plain = made(source, tmp_path / "plain", scheme, "{method: rtn}", page)
    errors = [by["polish"] for by in run.report["loss"]["tuning"].values()]
    assert len(errors) == 2 and all(error["after"] <= error["before"] for error in errors)
    assert any(error["after"] < error["before"] for error in errors)
    moved = {name for name in different(run, plain) if "input" not in name.rpartition(".")[2]}
    declared = set(run.prepared.plan.changed)
    scales = {name for name in moved if name.endswith("scale")}
    assert moved - scales <= declared and moved & declared
    assert bool(scales) == scheme.startswith("int")
    before, after = runs.read_all(source), runs.read_all(run.folder)
    assert all(after[name].dtype == before[name].dtype and after[name].isfinite().all() for name in declared)
    if model in {"qwen2_sliding", "gpt_oss"}:
        assert any(name.endswith("bias") for name in moved)
    fates = run.prepared.plan.fates()
    assert all(fates[name] == Fate("changed", "by polish") for name in declared)
    assert run.report["changed"] == dict.fromkeys(declared, "polish")


def test_what_the_plan_says_it_changes(llama: Path, page: Path, tmp_path: Path) -> None:
    """Norms of blocks with quantized weights; none of blocks that are left alone, nor the last one."""
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE % ("int4_wo_128", QUICK))
    whole = runs.prepare(llama, recipe=str(path), **runs.data(page)).plan
    norms = {name for name in runs.read_all(llama) if "layernorm" in name}
    assert whole.changes["polish"].tensors == norms and len(norms) == 4
    part = runs.prepare(llama, recipe=str(path), exclude=["*layers.0.*"], **runs.data(page)).plan
    assert part.changes["polish"].tensors == {name for name in norms if "layers.1." in name}


def test_no_step_changes_nothing(llama: Path, page: Path, tmp_path: Path) -> None:
    plain = made(llama, tmp_path / "plain", "int4_wo_128", "{method: gptq}", page)
    still = made(llama, tmp_path / "still", "int4_wo_128", "{method: gptq}, {method: polish, iters: 0}", page)
    assert not different(plain, still)
    assert still.report["changed"] == {}


def test_the_error_is_that_of_the_written_block(page: Path, tmp_path: Path) -> None:
    """By transformers, in float64, with the values of the files: norms as stored, weights as decoded."""
    from transformers import AutoModelForCausalLM

    source = runs.build("llama", tmp_path / "m", torch.float32)
    run = made(source, tmp_path / "out", "int2_wo_128", QUICK, page, calib_samples=16)
    model, twin = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64) for _ in range(2))
    decoded, files = Checkpoint(Source.open(str(run.folder))), runs.read_all(run.folder)
    modules = [t.name for t in run.prepared.plan.quantized() if "layers.0." in t.name]
    state = {f"{name}.weight": decoded.weight(name).double() for name in modules}
    state |= {n: value.double() for n, value in files.items() if "norm" in n}
    twin.load_state_dict(state, strict=False)

    rows = job_rows.token_rows(run.prepared, lambda event: None).tokens[-4:]  # the last of four lanes
    with torch.no_grad():
        wanted, got = (m.model(rows, output_hidden_states=True).hidden_states[1] for m in (model, twin))
    error = run.report["loss"]["tuning"]["model.layers.0"]["polish"]["after"]
    assert error == pytest.approx(float((got - wanted).square().sum() / wanted.square().sum()), rel=1e-3)


def test_one_batch_is_judged_by_tokens_that_are_held_out(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is never cut; what is one forward has no other batch to be judged by."""
    from quarkcli.job.tuning import TunedBlock

    seen = set()

    def keep_best(name: str, block: TunedBlock, *given: Any) -> Any:
        leading = torch.Size(block._walk.tokens.shape)
        fit, judged = (block._counted(0, leading, held) for held in (False, True))
        assert fit is not None and judged is not None
        seen.add((block.batches, int(fit.sum()), int(judged.sum()), bool((fit & judged).any())))
        return None, 0.0, 0.0

    monkeypatch.setattr(polish, "keep_best", keep_best)
    long = runs.build("llama", tmp_path / "m", max_position_embeddings=2048)
    made(long, tmp_path / "out", "int4_wo_128", QUICK, page, calib_samples=1, calib_seqlen=2048)
    assert seen == {(1, 7 * 256, 256, False)}


def test_after_autoround_killed_and_resumed(llama: Path, page: Path, tmp_path: Path) -> None:
    steps = "{method: gptq}, {method: autoround, iters: 4, batch: 1}, {method: polish, iters: 4, batch: 1}"
    few = runs.data(page, 8, 128)
    calm = made(llama, tmp_path / "calm", "int3_wo_128", steps, page, **few)
    for errors in calm.report["loss"]["tuning"].values():
        assert errors["polish"]["before"] == errors["autoround"]["after"]
    runs.killed(2, lambda: made(llama, tmp_path / "out", "int3_wo_128", steps, page, **few))
    again = made(llama, tmp_path / "out", "int3_wo_128", steps, page, resume="require", **few)
    assert runs.same_files(calm.folder, again.folder)


def test_memory_grows_with_the_largest_block(page: Path) -> None:
    for name in ("autoround", "polish"):
        steps = algorithms.create(name, {}), algorithms.create(name, {"iters": 0})
        plan = runs.prepare(EMBEDDED, scheme="int4_wo_128", algorithm=name, **runs.data(page)).plan
        sizes = [sum(t.numel for t in plan.quantized(part.index)) for part in plan.parts]
        assert steps[1].memory(plan) == 0
        assert 12 * max(sizes) < steps[0].memory(plan) < 40 * max(sizes) + 400_000_000


@pytest.mark.parametrize("given", [{"iters": -1}, {"batch": 0}, {"lr": "auto"}, {"lr": 1}])
def test_refused_parameters(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"polish {next(iter(given))} must"):
        algorithms.create("polish", given)
