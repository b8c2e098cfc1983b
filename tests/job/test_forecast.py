"""Forecasts before any weight is read, against what is written and against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from quarkcli import dialects
from quarkcli.disk import contents
from quarkcli.job import costs, forecast, preflight
from quarkcli.plan import sizes
from tests import runs
from tests.plan import layouts
from tests.plan.layouts import GPT_OSS, LLAMA, MIXTRAL, plan
from tests.tiny import Header


def forecast_of(scheme: str, layout, shapes, dialect: str = "compressed-tensors", **flags) -> forecast.Forecast:
    headers = {name: Header("BF16", shape) for name, shape in shapes.items()}
    return forecast.forecast(
        plan(scheme, layout, **flags), dialects.writer(dialect), headers, source_bytes=1, calibrated=True, tokens=1000,
        hidden=128, solving=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("int4_wo_128", 4 + 16 / 128),
        ("mxfp4", 4 + 8 / 32),
        # One 32-bit number for every matrix besides the groups' scales.
        ("nvfp4", 4 + 8 / 16 + 32 * 7 / (128 * 128 * 2 + 64 * 128 * 2 + 3 * 256 * 128)),
        ("fp8", 8 + 32 * 7 / (128 * 128 * 2 + 64 * 128 * 2 + 3 * 256 * 128)),
    ],
)
def test_effective_bits(scheme: str, bits: float) -> None:
    assert sizes.effective_bits(plan(scheme)) == pytest.approx(bits, rel=1e-12)


def test_bytes_by_dtype() -> None:
    found = forecast_of("mxfp4", MIXTRAL, layouts.mixtral())
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 4 * 3 * 256 * 128)
    kept = 2 * 300 * 128 + 128 + 2 * (128 + 4 * 128)
    assert found.dtypes == {"BF16": 2 * kept, "U8": weights // 2 + weights // 32}
    assert found.output_bytes > sum(found.dtypes.values())  # the files' headers
    assert found.output_bytes - sum(found.dtypes.values()) < 40_000


def test_hidden_and_largest_part() -> None:
    found = forecast_of("nvfp4", LLAMA, layouts.llama())
    assert found.hidden_bytes == 1000 * 128 * 2
    assert found.disk_bytes == found.output_bytes + 2 * found.hidden_bytes
    assert found.largest_part == 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128 + 128)
    assert found.memory_bytes > found.largest_part


@pytest.mark.parametrize("name", ["n_embd", "d_model"])
def test_the_width_of_hidden_states_has_several_names(name: str) -> None:
    prepared = runs.prepare("demo", scheme="fp8", calib_data="builtin", calib_samples=8, calib_seqlen=64)
    config = dict(prepared.source.config)
    config[name] = width = config.pop("hidden_size")
    source = SimpleNamespace(config=config, files=prepared.source.files)
    headers = prepared.weights.headers
    found = preflight.forecast_of(
        prepared.plan, prepared.dialect, source, headers, prepared.calibration, prepared.steps
    )  # fmt: skip
    assert found.hidden_bytes == 8 * 64 * width * 2
    assert found == prepared.forecast


def test_share_of_experts_that_a_token_passes() -> None:
    """Of those that the files have, whatever config.json calls their number."""
    sparse = plan("mxfp4", MIXTRAL)
    for config, share in (({"num_experts_per_tok": 2}, 0.5), ({"moe_top_k": 9, "num_experts": 16}, 1.0), ({}, None)):
        assert costs.routed_share(sparse, config) == share
    assert costs.routed_share(plan("mxfp4"), {}) == 1.0


def test_share_of_experts() -> None:
    everything = 2 * 4 * 3 * 256 * 128
    for layout in (MIXTRAL, GPT_OSS):
        assert sizes.expert_share(plan("mxfp4", layout)) == (everything, everything)
        some = plan("mxfp4", layout, exclude=["*experts.3.*"])
        assert sizes.expert_share(some) == (everything * 3 // 4, everything)
    assert sizes.expert_share(plan("mxfp4")) == (0, 0)


def test_names_of_shards() -> None:
    assert [contents.slug(part) for part in LLAMA.parts] == [
        "embed", "block-00000", "block-00001", "block-00002", "tail",
    ]  # fmt: skip


@pytest.mark.parametrize("dialect", ["compressed-tensors", "quark"])
@pytest.mark.parametrize(
    "flags",
    [
        {"scheme": "mxfp4", "exclude": ["*layers.0.*", "*experts.2.*"], "target": "none"},  # experts apart
        {"scheme": "fp8", "kv_cache": "fp8"},
        {"scheme": "mxfp4", "layers": ["*self_attn*=int4_wo_128"]},
    ],
    ids=["exclude", "cache", "mixed"],
)
def test_bytes_are_exact(flags: dict, dialect: str, tmp_path: Path) -> None:
    source = runs.build("gpt_oss", tmp_path / "m")
    data = runs.data(runs.text_file(tmp_path / "t.txt"), 8) if flags["scheme"] == "fp8" else {}
    made = runs.run(source, tmp_path / "out", dialect=dialect, **flags, **data)
    files = sorted(made.folder.glob("*.safetensors"))
    assert made.prepared.forecast.output_bytes == sum(file.stat().st_size for file in files)
    index = json.loads((made.folder / "model.safetensors.index.json").read_text())
    tensors = runs.read_all(made.folder)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total == sum(made.prepared.forecast.dtypes.values())
