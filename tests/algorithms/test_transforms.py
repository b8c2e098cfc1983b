"""A transform from a file of its own: an exact identity in every format, dense and with experts, killed and resumed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli import algorithms
from quarkcli.algorithms.base import Refiner, Transform
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.evaluation.run import evaluate
from quarkcli.plan.model import Added, Changes, Fate
from tests import runs

OWN = """\
schema: quark/recipe/1
quantize:
  scheme: %s
  algorithm: [{method: eighths, through: %s, when: %s}%s]
"""


@pytest.fixture(autouse=True)
def dropped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if both files had been dropped beside the other algorithms."""
    folder = tmp_path / "members"
    folder.mkdir()
    for name in ("eighths", "nudge"):
        shutil.copy(Path(__file__).parent / f"{name}.py", folder)
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(folder)])
    yield
    for name in ("eighths", "nudge"):
        sys.modules.pop(f"quarkcli.algorithms.{name}", None)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt", 80_000)


def recipe(folder: Path, scheme: str, through: str = "pair", when: str = "after", more: str = "") -> str:
    path = folder / f"own-{through}-{when}.yaml"
    path.write_text(OWN % (scheme, through, when, more))
    return str(path)


def compared(folder: Path, baseline: Path, page: Path, **options: Any) -> dict[str, Any]:
    usual = {"window": 128, "max_tokens": 1024, "device": "cpu", "tell": lambda event: None}
    return evaluate(str(folder), baseline=str(baseline), text=str(page), **{**usual, **options})


def changed(made: runs.Made) -> set[str]:
    return {t.view.tensor for t in made.prepared.plan.targets.values() if t.role in {"v", "o"}}


CASES = [
    ("demo", "fp8", {}, ""),
    pytest.param("demo", "int4_wo_32", {}, ", {method: gptq}", marks=pytest.mark.slow),
    pytest.param("demo", "nvfp4", {}, "", marks=pytest.mark.slow),
    pytest.param("demo", "fp8", {"kv_cache": "fp8"}, "", marks=pytest.mark.slow),
    ("qwen3_moe", "nvfp4", {"kv_cache": "fp8"}, ""), ("qwen3_moe", "int4_wo_32", {}, ", {method: gptq}"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "scheme", "flags", "more"), CASES)
def test_nothing_more_is_lost(
    model: str, scheme: str, flags: dict[str, Any], more: str, page: Path, tmp_path: Path
) -> None:
    source = EMBEDDED if model == "demo" else runs.build(model, tmp_path / "m")
    data = {**runs.data(page, 16, 128), **flags}
    algorithm = {"algorithm": "gptq"} if more else {}
    plain = runs.run(source, tmp_path / "plain", scheme=scheme, **algorithm, **data)
    wanted = compared(plain.folder, source, page, max_tokens=2048)["kl"]
    for through, when in (("pair", "after"), ("hand", "before")):
        own = recipe(tmp_path, scheme, through, when, more)
        made = runs.run(source, tmp_path / f"{through}-{when}", recipe=own, **data)
        found = compared(made.folder, source, page, max_tokens=2048)["kl"]
        assert found == pytest.approx(wanted, rel=0.05), (through, when)
        assert set(made.report["changed"]) == changed(made)
        assert set(made.report["changed"].values()) == {"eighths"}
        decoded, weights = Checkpoint(Source.open(str(made.folder))), runs.read_all(source)
        for name, factor in (("v_proj", 8.0), ("o_proj", 0.125)):
            module = f"model.layers.1.self_attn.{name}"
            weight = weights[f"{module}.weight"].float()
            assert float((decoded.weight(module) * factor - weight).norm() / weight.norm()) < 0.2


def test_by_hand_and_by_pair_are_the_same_bytes(page: Path, tmp_path: Path) -> None:
    """Statistics follow a scaled pair exactly; by hand they are collected again: ranges of caches and inputs too."""
    data = {**runs.data(page, 16, 128), "kv_cache": "fp8"}
    made = [
        runs.run("demo", tmp_path / f"{through}-{when}", recipe=recipe(tmp_path, "fp8", through, when), **data)
        for through, when in (("pair", "after"), ("hand", "after"), ("hand", "before"), ("pair", "before"))
    ]
    files = [runs.read_all(m.folder) for m in made]
    for other in files[1:]:
        assert all(runs.same_bytes(files[0][name], other[name]) for name in files[0])


def test_moments_follow_exactly(page: Path, tmp_path: Path) -> None:
    """gptq on a scaled pair (moments multiplied) and on one changed beforehand (moments collected so)."""
    data = runs.data(page, 16, 128)
    made = [
        runs.run(
            "demo", tmp_path / when, recipe=recipe(tmp_path, "int4_wo_128", "pair", when, ", {method: gptq}"), **data
        )
        for when in ("after", "before")
    ]
    first, second = (runs.read_all(m.folder) for m in made)
    for name in first:  # powers of two: nothing is rounded on the way
        assert runs.same_bytes(first[name], second[name]), name


def test_kept_tensors_change_too_and_the_function_stays(page: Path, tmp_path: Path) -> None:
    """v and o are not quantized here: they are written changed, in float32, and logits are those of a run without.

    Both go through gptq: where nothing transforms or solves, static scales are measured on the source's hidden states.
    """
    source = runs.build("llama", tmp_path / "m", torch.float32)
    data = {**runs.data(page, 8), "exclude": ["*_proj"], "include": ["*down_proj"]}
    plain = runs.run(source, tmp_path / "plain", scheme="fp8", algorithm="gptq", **data)
    made = runs.run(source, tmp_path / "own", recipe=recipe(tmp_path, "fp8", more=", {method: gptq}"), **data)
    result = compared(made.folder, plain.folder, page, dtype="float32")
    assert abs(result["kl"]) < 1e-9 and result["top1_agreement"] == 1.0
    before, after = runs.read_all(source), runs.read_all(made.folder)
    for name in changed(made):
        factor = 0.125 if "v_proj" in name else 8.0
        assert torch.equal(after[name], before[name] * factor)
    fates = made.prepared.plan.fates()
    assert set(fates) == set(before)
    assert {name for name, fate in fates.items() if fate == Fate("changed", "by eighths")} == changed(made)
    quantized = {name for name, fate in fates.items() if fate.kind == "quantized"}
    assert quantized == {name for name in before if "down_proj" in name}
    untouched = set(before) - changed(made) - quantized
    assert all(torch.equal(after[name], before[name]) for name in untouched)


def test_killed_and_resumed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the transform decided is in the journal: the second run makes no pass over the source."""
    data = {**runs.data(page, 8, 128), "recipe": recipe(tmp_path, "int4_wo_128", more=", {method: gptq}"), "seed": 3}
    calm = runs.run("demo", tmp_path / "calm", **data)
    runs.killed(3, lambda: runs.run("demo", tmp_path / "out", **data))
    monkeypatch.setattr("quarkcli.job.prepass._observed", None)
    again = runs.run("demo", tmp_path / "out", resume="require", **data)
    assert runs.same_files(calm.folder, again.folder)


def test_it_works_on_its_own_weights_alone(page: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "schema: quark/recipe/1\nquantize:\n  scheme: fp8\n  algorithm:\n"
        "    - {method: eighths, slots: ['*layers.2.self_attn.[vo]_proj.weight_quantizer']}\n"
    )
    made = runs.run("demo", tmp_path / "out", recipe=str(own), **runs.data(page, 8, 128))
    assert set(made.report["changed"]) == {f"model.layers.2.self_attn.{leaf}_proj.weight" for leaf in "vo"}


def test_what_is_not_declared_is_refused(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = recipe(tmp_path, "fp8")
    algorithms.create("eighths", {})
    member = sys.modules["quarkcli.algorithms.eighths"].Eighths
    monkeypatch.setattr(member, "changes", algorithms.Transform.changes)
    with pytest.raises(AssertionError, match=r"transform eighths changes model\.layers\.0\.self_attn\.v_proj\.weight"):
        runs.run("demo", tmp_path / "out", recipe=own, **runs.data(page, 8, 128))


def test_a_refiner_runs_after_any_solver(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(Refiner):
        name = "nothing"
        seen: list[str] = []  # noqa: RUF012

        def refine(self, problem: Any, quantized: Any) -> Any:
            self.seen += [target.name for target in problem.targets]
            return quantized

    create = algorithms.create
    monkeypatch.setattr(algorithms, "create", lambda n, p, *w: Nothing() if n == "nothing" else create(n, p, *w))
    made = runs.run("demo", tmp_path / "out", scheme="mxfp4", algorithm="nothing")
    plain = runs.run("demo", tmp_path / "plain", scheme="mxfp4")
    assert sorted(Nothing.seen) == sorted(t.name for t in made.prepared.plan.quantized())
    assert runs.same_bytes(
        *(runs.read_all(m.folder)["model.layers.0.mlp.up_proj.weight_packed"] for m in (made, plain))
    )


@pytest.mark.parametrize("model", ["demo", "qwen3_moe"])
def test_a_tuner_betters_blocks_through_their_outputs(model: str, page: Path, tmp_path: Path) -> None:
    source = EMBEDDED if model == "demo" else runs.build(model, tmp_path / "m", torch.float32)
    data, scheme = runs.data(page, 8, 64), "int4_wo_32"
    plain = runs.run(source, tmp_path / "plain", scheme=scheme)
    made = runs.run(source, tmp_path / "out", scheme=scheme, algorithm="nudge", **data)
    seen = sys.modules["quarkcli.algorithms.nudge"].Nudge.seen
    assert len(seen) == len([p for p in made.prepared.plan.parts if p.kind == "block"])
    assert all(after < before for before, after in seen)
    assert compared(made.folder, source, page)["kl"] < 1.05 * compared(plain.folder, source, page)["kl"]
    still = runs.run(source, tmp_path / "still", recipe=tuning(tmp_path, scheme, "0.0"), **data)
    ours, theirs = runs.read_all(still.folder), runs.read_all(plain.folder)
    assert all(runs.same_bytes(ours[name], theirs[name]) for name in theirs)


def tuning(folder: Path, scheme: str, share: str) -> str:
    path = folder / "tuning.yaml"
    path.write_text(
        f"schema: quark/recipe/1\nquantize:\n  scheme: {scheme}\n  algorithm: [{{method: nudge, share: {share}}}]\n"
    )
    return str(path)


def test_a_transform_before_and_a_tuner_after_a_solver(page: Path, tmp_path: Path) -> None:
    own = recipe(tmp_path, "int4_wo_128", more=", {method: gptq}, {method: nudge, slots: ['*down_proj*']}")
    made = runs.run("demo", tmp_path / "out", recipe=own, **runs.data(page, 16, 128))
    assert made.report["algorithms"] == ["eighths", "gptq", "nudge"]
    plain = runs.run("demo", tmp_path / "plain", scheme="int4_wo_128", algorithm="gptq", **runs.data(page, 16, 128))
    source = EMBEDDED
    assert compared(made.folder, source, page)["kl"] < 1.05 * compared(plain.folder, source, page)["kl"]


class Untie(Transform):
    """Gives a model whose head is its embedding a head of its own, twice as large, and halves the norm before it."""

    name = "untie"

    def changes(self, plan: Any) -> Changes:
        head = Added("lm_head.weight", "F32", plan.targets["model.embed_tokens"].shape, 0)
        return Changes(frozenset({"model.norm.weight"}), (head,), config={"tie_word_embeddings": False})

    def before(self, part: Any, state: Any) -> None:
        if part.part.kind == "embed":
            part.add("lm_head.weight", part.read("model.embed_tokens.weight") * 2)
        elif part.part.kind == "tail":
            part.vector("model.norm.weight").div_(2)


def test_a_head_that_the_source_lacks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = algorithms.create
    monkeypatch.setattr(algorithms, "create", lambda n, p, *w: Untie() if n == "untie" else create(n, p, *w))
    source = runs.build("llama", tmp_path / "m", torch.float32, tie_word_embeddings=True)
    assert "lm_head.weight" not in runs.read_all(source)
    plain = runs.run(source, tmp_path / "plain", scheme="mxfp4")
    made = runs.run(source, tmp_path / "out", scheme="mxfp4", algorithm="untie")
    assert made.report["added"] == ["lm_head.weight"] and made.report["changed"] == {"model.norm.weight": "untie"}
    assert made.report["config_changes"] == {"tie_word_embeddings": False}
    assert json.loads((made.folder / "config.json").read_text())["tie_word_embeddings"] is False
    planned = made.prepared.forecast.output_bytes
    assert planned == sum(file.stat().st_size for file in made.folder.glob("*.safetensors"))
    result = compared(made.folder, plain.folder, page, dtype="float32")
    assert abs(result["kl"]) < 1e-9 and result["top1_agreement"] == 1.0


def test_a_tensor_that_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(Transform):
        name = "dropping"

        def changes(self, plan: Any) -> Changes:
            return Changes(dropped={"model.layers.0.self_attn.rotary_emb.inv_freq": "made anew by every loader"})

    create = algorithms.create
    monkeypatch.setattr(algorithms, "create", lambda n, p, *w: Dropping() if n == "dropping" else create(n, p, *w))
    source = runs.build("llama", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = runs.run(source, tmp_path / "out", scheme="mxfp4", algorithm="dropping")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in runs.read_all(made.folder)
    assert list(made.report["dropped"].values()) == ["made anew by every loader"]
    assert made.prepared.plan.fates()["model.layers.0.self_attn.rotary_emb.inv_freq"].kind == "dropped"
