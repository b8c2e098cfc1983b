"""Every family file, on a tiny model that transformers builds or on headers: planned, quantized, accounted for."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from quarkcli import family, verify
from quarkcli.recipe import catalog
from tests import runs
from tests.families import models

NAMES = tuple(models.RECIPES)
FILES = catalog.files("models")
BUILDABLE = {recipe["file"] for recipe in models.RECIPES.values()}
# Families of the peers without a class in transformers 5.
FROM_HEADERS = {"chatglm", "deepseek", "deepseek_vl_v2", "grok_1", "instella", "qwen"}
# Linears that some members have and the tiny models do not.
ELSEWHERE = {
    "self_attn.q_proj": "DeepSeek V2 Lite",
    **dict.fromkeys(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], "mixtures with dense blocks"),
}


def test_every_file_is_tried() -> None:
    assert set(FILES) == BUILDABLE | FROM_HEADERS
    assert not BUILDABLE & FROM_HEADERS


# ---- runs


@pytest.mark.parametrize("name", NAMES)
def test_without_data(name: str, built: dict[str, Path], tmp_path: Path) -> None:
    made = runs.run(built[name], tmp_path / "out", scheme="mxfp4")
    assert made.report["model"]["family"] == models.RECIPES[name]["file"]
    assert made.report["warnings"] == []
    check_accounts(made)


@pytest.mark.parametrize("name", NAMES)
def test_calibrated(name: str, built: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """With everything quantized that the family leaves alone by default, so that its sites are all measured."""
    options = {"unprotect": list(family.load(FILES[models.RECIPES[name]["file"]]).exclude), **runs.data(text, 8, 32)}
    made = runs.run(built[name], tmp_path / "out", scheme="nvfp4", **options)
    check_accounts(made)
    assert all("experts saw no calibration token" in warning for warning in made.report["warnings"])
    scaled = {key for key in runs.read_all(made.folder) if key.endswith("input_global_scale")}
    assert scaled == {f"{target.name}.input_global_scale" for target in made.prepared.plan.quantized()}


def check_accounts(made: runs.Made) -> None:
    """Every tensor of the source is quantized, or kept byte for byte for a reason that names a rule."""
    plan, source, written = made.prepared.plan, runs.read_all(made.source), runs.read_all(made.folder)
    quantized = {target.view.tensor for target in plan.quantized()}
    assert quantized | set(plan.kept) == set(source) and not quantized & set(plan.kept)
    for name, reason in plan.kept.items():
        assert runs.same_bytes(written[name], source[name]), name
        assert reason not in {"no entry matched", "not part of the family"}, name
    for target in plan.quantized():
        assert f"{target.name}.weight_packed" in written, target.name
    assert verify.directory(str(made.folder), str(made.source))[-1] == (
        f"all {len(source)} source tensors accounted for"
    )  # fmt: skip


# ---- what the files say


@pytest.mark.parametrize("file", sorted(BUILDABLE))
def test_names_exist(file: str, built: dict[str, Path]) -> None:
    """Roles, sites, groups, exclusions, pairs and rotation name tensors of one of the family's tiny models."""
    leaves: set[str] = set()
    modules: set[str] = set()
    for name in (name for name in NAMES if models.RECIPES[name]["file"] == file):
        found, layout = models.described(built[name])
        modules |= {tensor.removesuffix(".weight") for tensor in runs.read_all(built[name])} | set(layout.weights)
        leaves |= {re.sub(rf"^{re.escape(found.blocks)}\.\d+\.", "", module) for module in modules}
    said = family.load(FILES[file])
    listed = [*said.sites, *(said.scale_groups or []), *([pair.source, *pair.readers] for pair in said.scaling)]
    if said.rotation:
        listed += [said.rotation.reads, said.rotation.writes]
    unknown = {leaf for group in listed for leaf in group if not any(fnmatchcase(known, leaf) for known in leaves)}
    assert unknown <= set(ELSEWHERE)
    for role, patterns in found.exclude.items():
        assert all(any(fnmatchcase(module, pattern) for module in modules) for pattern in patterns), role


@pytest.mark.parametrize("name", NAMES)
def test_attention_and_experts_are_found(name: str, built: dict[str, Path]) -> None:
    found, layout = models.described(built[name])
    config = models.RECIPES[name]["config"]
    text = config.get("text_config", config)
    count = next((text[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), 0)
    layers = {weight.expert[0] for weight in layout.weights.values() if weight.expert}
    if found.experts is not None and count:
        assert layers
        per_expert = 3 if found.experts.gate else 2
        assert sum(weight.expert is not None for weight in layout.weights.values()) == len(layers) * count * per_expert
    assert layout.attention
    assert all(module.k_proj in layout.weights and module.v_proj in layout.weights for module in layout.attention)
