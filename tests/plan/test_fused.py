"""What servers multiply together has one scheme: refused in plan and job, found in files, allowed for no server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quarkcli.disk import verify
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import CheckError, ModelError
from quarkcli.job import preflight
from quarkcli.plan.model import Plan
from tests import runs
from tests.plan.layouts import LLAMA, MIXTRAL, gpt_oss, lay_out, plan

GPT_OSS = lay_out(gpt_oss(), "gpt_oss", num_local_experts=4)

SPLIT = {
    "q in another scheme": (LLAMA, {"layers": ["*q_proj=fp8"]}, 3),
    "k kept": (LLAMA, {"exclude": ["*k_proj"]}, 3),
    "v kept in one block": (LLAMA, {"exclude": ["*layers.1.*v_proj"]}, 1),
    "up in another scheme": (LLAMA, {"layers": ["*up_proj=mxfp8"]}, 3),
    "same weights, other inputs": (LLAMA, {"layers": ["*gate_proj=mxfp4_weight_only"]}, 3),
    "w1 of experts": (MIXTRAL, {"layers": ["*.w1=fp8"]}, 2),
    "w3 of one expert kept": (MIXTRAL, {"exclude": ["*layers.0.*experts.3.w3"]}, 1),
    "down of one expert": (MIXTRAL, {"layers": ["*layers.1.*experts.0.w2=fp8"]}, 1),
    "one expert of a fused tensor": (GPT_OSS, {"exclude": ["*experts.2.*"]}, 4),
}
WHOLE = {
    "one block": (LLAMA, {"layers": ["*layers.1.*=fp8"]}),
    "attention and MLP": (LLAMA, {"layers": ["*self_attn*=fp8"], "exclude": ["*mlp*"]}),
    "what stands alone": (LLAMA, {"layers": ["*o_proj=fp8"], "exclude": ["*down_proj"]}),
    "gate and up apart from down": (MIXTRAL, {"layers": ["*.w2=fp8"]}),
    "layers of experts": (MIXTRAL, {"exclude": ["*layers.1.*experts*"]}),
}


@pytest.mark.parametrize("case", SPLIT)
def test_a_split_is_refused_with_a_count(case: str) -> None:
    layout, flags, count = SPLIT[case]
    made = plan("mxfp4", layout, **flags)
    with pytest.raises(ModelError, match=f"^{count} groups? of weights that servers multiply together ha") as caught:
        preflight.check_servers(made, "auto")
    assert caught.value.code == 4 and "--target none" in caught.value.hint
    assert made.warnings == []
    preflight.check_servers(made, "none")
    assert len(made.warnings) == 1 and made.warnings[0].startswith(f"{count} group")


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_not_fused_may_differ(case: str) -> None:
    layout, flags = WHOLE[case]
    made = plan("mxfp4", layout, **flags)
    preflight.check_servers(made, "auto")
    assert len({target.weight for target in made.targets.values()}) > 1 and not made.disagreeing()


def test_both_sides_are_named() -> None:
    made: Plan = plan("mxfp4", LLAMA, exclude=["*layers.2.*k_proj"])
    with pytest.raises(ModelError) as caught:
        preflight.check_servers(made, "auto")
    assert "layers.2.self_attn.k_proj (kept)" in caught.value.what
    assert "layers.2.self_attn.q_proj, model.layers.2.self_attn.v_proj (fp4_e2m1" in caught.value.what


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
@pytest.mark.parametrize("flags", [{"exclude": ["*k_proj"]}, {"layers": ["*up_proj=mxfp8"]}], ids=["kept", "other"])
def test_files_with_a_split(dialect: str, flags: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        runs.run("demo", tmp_path / "never", scheme="mxfp4", dialect=dialect, **flags)
    assert not list(tmp_path.iterdir())
    made = runs.run("demo", tmp_path / "out", scheme="mxfp4", dialect=dialect, target="none", **flags)
    assert sum("that servers multiply together have" in text for text in made.report["warnings"]) == 1
    with pytest.raises(CheckError, match=r"^4 groups of weights that servers multiply together have"):
        verify.directory(str(made.folder), str(EMBEDDED))
    found = verify.directory(str(made.folder), target="none")
    assert sum(text.startswith("accepted by --target none: 4 groups") for text in found) == 1


def test_files_with_one_expert_apart(tmp_path: Path) -> None:
    source = runs.build("gpt_oss", tmp_path / "source")
    made = runs.run(source, tmp_path / "out", scheme="mxfp4", target="none", exclude=["*layers.0.*experts.2.*"])
    with pytest.raises(CheckError, match=r"^2 groups of weights that servers multiply together have"):
        verify.directory(str(made.folder))


def test_files_of_one_scheme_pass(tmp_path: Path) -> None:
    source = runs.build("gpt_oss", tmp_path / "source")
    made = runs.run(source, tmp_path / "out", scheme="mxfp4", exclude=["*layers.0.*"])
    assert "weights that servers multiply together have one scheme" in verify.directory(str(made.folder))
