"""Scales of the quantized cache, against k and v of the model class itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quarkcli.disk.embedded import EMBEDDED
from tests import runs

from .loading import windows


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "text.txt"
    path.write_text(runs.topics(10, 14)[:9_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def largest(text: Path) -> dict[str, float]:
    """Largest magnitude of k after rotary and of v in block 0, where nothing before it is quantized."""
    rows = windows(AutoTokenizer.from_pretrained(EMBEDDED), text.read_text(), 64)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.bfloat16).eval()
    attention = model.model.layers[0].self_attn
    seen: dict[str, torch.Tensor] = {}
    for name in "kv":
        linear = getattr(attention, f"{name}_proj")
        linear.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        model(rows)
        cos, sin = model.model.rotary_emb(seen["k"], torch.arange(rows.shape[1])[None])
        k = seen["k"].view(*rows.shape, -1, attention.head_dim).transpose(1, 2)
        k = apply_rotary_pos_emb(k, k, cos, sin)[1]
    return {"k": float(k.abs().max()), "v": float(seen["v"].abs().max()), "before rotary": float(seen["k"].abs().max())}


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
@pytest.mark.parametrize("scheme", ["nvfp4", "fp8"])
def test_scales_are_amax_over_448_after_rotary(
    scheme: str, dialect: str, text: Path, largest: dict[str, float], tmp_path: Path
) -> None:
    rows = len(windows(AutoTokenizer.from_pretrained(EMBEDDED), text.read_text(), 64))
    made = runs.run(
        "demo", tmp_path / "out", scheme=scheme, dialect=dialect, kv_cache="fp8", **runs.data(text, rows, 64)
    )
    tensors = runs.read_all(made.folder)
    name = {"compressed-tensors": "{}_scale", "quark": "{}_proj.output_scale"}[dialect]
    for kind in "kv":
        found = float(tensors["model.layers.0.self_attn." + name.format(kind)])
        assert found == pytest.approx(largest[kind] / 448, rel=2**-7)  # one step of bfloat16
    assert largest["k"] != pytest.approx(largest["before rotary"], rel=2**-6)  # else this proves nothing
