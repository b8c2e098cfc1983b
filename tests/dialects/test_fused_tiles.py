"""Tiles of weights that servers fuse along the output: they end with every module but the last."""

from __future__ import annotations

import pytest

from quarkcli import dialects
from tests.dialects.plans import FP8_GROUP, FP8_TILE, Module, Pair, linears, plan

PAIRS: list[Pair] = [(FP8_TILE, FP8_GROUP), (FP8_TILE, None)]
MLA, QKV, GATED = ("q_a_proj", "kv_a_proj_with_mqa"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def fused(names: tuple[str, ...], *rows: int, expert: bool = False) -> list[Module]:
    """Modules with these numbers of rows, which servers fuse in this order."""
    block = f"model.layers.0.{'mlp.experts.0' if expert else 'self_attn'}"
    owner = ("model.layers.0.mlp.experts", 0) if expert else None
    group = f"{block}.{'gate+up' if expert else '+'.join(names)}"
    role = "expert_up" if expert else "q"
    return [Module(f"{block}.{name}", (n, 256), role, owner, group) for name, n in zip(names, rows, strict=True)]


def loading(modules: list[Module]) -> set[tuple[str, int]]:
    """Dialects, with the number of the pair, that hold these modules and that vLLM loads them in."""
    made = [(writer, number, plan(modules, linears(pair)))
            for writer in dialects.writers() for number, pair in enumerate(PAIRS)]  # fmt: skip
    return {(w.name, number) for w, number, each in made if not w.refusals(each) and "vllm" in w.loaders(each)}


@pytest.mark.parametrize(
    ("whole", "modules", "loads"),
    [
        # nothing follows the last, as in DeepSeek-V3: 1536 and 576 rows
        (fused(MLA, 256, 256), fused(MLA, 256, 192), True),
        (fused(MLA, 256, 256), fused(MLA, 192, 256), False),
        (fused(QKV, 256, 128, 128), fused(QKV, 256, 128, 64), True),
        (fused(QKV, 256, 128, 128), fused(QKV, 256, 64, 64), False),
        (fused(MLA[1:], 256), fused(MLA[1:], 192), True),
        (fused(GATED, 256, 256), fused(GATED, 192, 192), False),
        # gate and up of experts lie apart
        (fused(GATED, 256, 256, expert=True), fused(GATED, 192, 192, expert=True), False),
        (fused(GATED, 256, 256, expert=True), fused(GATED, 256, 192, expert=True), False),
    ],
)
def test_the_last_of_fused_modules_may_end_within_a_tile(
    whole: list[Module], modules: list[Module], loads: bool
) -> None:
    """As vLLM 0.32 checks it in every dialect: `validate_fp8_block_shape`, and its relative for experts."""
    able = loading(whole)
    assert len({name for name, _ in able}) >= 3
    assert loading(modules) == (able if loads else set())
