"""Ranges other than the largest magnitude: what is counted where, and a calibrated run against numpy on plain hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quarkcli
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import ConfigError, DataError
from quarkcli.events import silent
from quarkcli.forward.statistics import Statistics
from quarkcli.job import rows as job_rows
from quarkcli.job import run as job
from quarkcli.spec import ObserverSpec, PerTensor, ScaleSpec, TensorSpec
from tests import runs

from .watch import ROWS, collect, hooked, inner, plan

LAYER = "model.layers.1.block_sparse_moe.experts"
SPEC = TensorSpec(
    "fp8_e4m3", PerTensor(), ScaleSpec("f32"), observer=ObserverSpec("percentile", (("percentile", 90.0),))
)
PLAIN = TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32"))
RECIPE = """\
schema: quark/recipe/1
quantize:
  quant_cfg:
    - {{quantizer_path: '*', enable: false}}
    - quantizer_path: '*.weight_quantizer'
      cfg: {weight}
    - quantizer_path: '*.input_quantizer'
      cfg: {input}
"""
FP8 = "{element: fp8_e4m3}"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.text_file(tmp_path_factory.mktemp("text") / "t.txt")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("mixtral", tmp_path_factory.mktemp("mixtral") / "m", torch.float32)


def headroom(values: np.ndarray, anchor: float = 1, upper: float = 99.99, rho: float = 16384) -> float:
    """ModelOpt's rule for nvfp4 inputs, on every block instead of a histogram of them."""
    blocks = np.abs(values).reshape(-1, 16).max(axis=1)
    blocks = blocks[blocks > 0]
    top = np.quantile(blocks, upper / 100, method="inverted_cdf")
    return max(rho * np.quantile(blocks[blocks >= top / 1e6], anchor / 100, method="inverted_cdf"), top)


def counting(prepared: job.Prepared) -> job.Prepared:
    """The same plan; every range also has to be counted."""
    for kinds in prepared.needs.values():
        if "absmax" in kinds:
            kinds.add("histogram")
    return prepared


def counted(statistics: Statistics, site: str) -> int:
    return int(statistics._ranges[site, "histogram"].counts.sum())


def near(found: torch.Tensor, values: torch.Tensor) -> bool:
    """The 90 % magnitude of `values` by nearest rank, to what another way to compute them may differ."""
    wanted = np.quantile(values.abs().double().numpy(), 0.9, method="inverted_cdf")
    return float(found) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_every_value_is_counted_once_and_padding_never(padded: bool, mixtral: Path, text: Path) -> None:
    real = torch.ones_like(ROWS, dtype=torch.bool)
    if padded:
        real[:, 50:] = False
        real[3, 7:] = False
    rows = ROWS.masked_fill(~real, 0)
    statistics = collect(counting(plan(mixtral, text)), rows, real if padded else None)[1]
    seen, tokens = hooked(mixtral, rows), int(real.sum())
    site = "model.layers.1.self_attn.q_proj.input"
    if site not in statistics.needs:
        site = next(name for name in statistics.needs if name.startswith("model.layers.1.self_attn.") and "q" in name)
    values = seen["model.layers.1.self_attn.q_proj"][real]
    assert counted(statistics, site) == values.numel()
    assert near(statistics.amax(site, SPEC), values)
    for kind in "kv":  # 2 heads of 64
        assert counted(statistics, f"model.layers.1.self_attn.{kind}") == tokens * 128
    hidden, index, _ = seen["model.layers.1.mlp.experts"]
    hidden, index = hidden[real.reshape(-1)], index[real.reshape(-1)]
    assert counted(statistics, f"{LAYER}.input") == hidden.numel()
    assert near(statistics.amax(f"{LAYER}.input", SPEC), hidden)
    weights = runs.read_all(mixtral)
    inside = [inner(weights, f"{LAYER}.{e}", hidden[(index == e).any(-1)], ("w1", "w3")) for e in range(4)]
    assert counted(statistics, f"{LAYER}.w2.input") == sum(part.numel() for part in inside)
    assert near(statistics.amax(f"{LAYER}.w2.input", SPEC), torch.cat(inside))
    largest = float(torch.cat(inside).abs().max())
    assert float(statistics.amax(f"{LAYER}.w2.input", PLAIN)) == pytest.approx(largest, rel=1e-4)


def test_all_tokens_are_counted_once_for_every_expert(mixtral: Path, text: Path) -> None:
    statistics = collect(counting(plan(mixtral, text)), all_tokens=True)[1]
    hidden, _, _ = hooked(mixtral)["model.layers.1.mlp.experts"]
    weights = runs.read_all(mixtral)
    inside = torch.cat([inner(weights, f"{LAYER}.{e}", hidden, ("w1", "w3")) for e in range(4)])
    assert counted(statistics, f"{LAYER}.w2.input") == inside.numel() == 4 * ROWS.numel() * 256
    assert near(statistics.amax(f"{LAYER}.w2.input", SPEC), inside)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_the_batch_changes_no_count(family: str, text: Path, tmp_path: Path) -> None:
    prepared = counting(plan(runs.build(family, tmp_path / "m"), text))
    one, three = (collect(prepared, batch=batch) for batch in (1, 3))
    for block, statistics in one.items():
        histograms = [key for key in statistics._ranges if key[1] == "histogram"]
        assert histograms
        for key in histograms:
            assert torch.equal(statistics._ranges[key].counts, three[block]._ranges[key].counts), key


def test_no_tokens_and_bad_numbers(mixtral: Path, text: Path) -> None:
    prepared = counting(plan(mixtral, text))
    statistics = Statistics(prepared.plan, 2, prepared.needs, None)
    with pytest.raises(DataError, match="no calibration token reached") as error:
        statistics.amax(f"{LAYER}.input", SPEC)
    assert error.value.where == f"{LAYER}.input" and "--exclude" in error.value.hint
    x = torch.ones(1000, 1)
    x[3] = torch.inf
    with pytest.raises(DataError, match="NaN or inf") as error:
        statistics.take(f"{LAYER}.input", x)
    assert error.value.where == f"{LAYER}.input"


# ---- in a job


def recipe(folder: Path, input_: str, weight: str = FP8) -> str:
    path = folder / "own.yaml"
    path.write_text(RECIPE.format(weight=weight, input=input_))
    return str(path)


def test_a_percentile_in_a_run(text: Path, tmp_path: Path) -> None:
    """Ranges are those of the source model, as transformers runs it."""
    data: dict[str, Any] = {**runs.data(text, 8), "device": "cpu"}
    own = recipe(tmp_path, "{element: fp8_e4m3, observer: {name: percentile, percentile: 99.9}}")
    quarkcli.quantize("demo", recipe=own, output=tmp_path / "percentile", **data)
    quarkcli.quantize("demo", recipe=recipe(tmp_path, FP8), output=tmp_path / "plain", **data)
    found, plain = (runs.read_all(tmp_path / name) for name in ("percentile", "plain"))
    prepared = runs.prepare("demo", recipe=own, **runs.data(text, 8))
    rows = job_rows.token_rows(prepared, silent)
    assert rows is not None and rows.mask is None
    seen = hooked(EMBEDDED, rows.tokens)
    leaves = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    for name in (f"model.layers.{block}.{leaf}" for block in range(4) for leaf in leaves):
        values = seen[name].abs().double().numpy()
        wanted = np.quantile(values, 0.999, method="inverted_cdf")
        assert float(found[f"{name}.input_scale"]) == pytest.approx(wanted / 448, rel=0.01)
        assert float(plain[f"{name}.input_scale"]) == pytest.approx(values.max() / 448, rel=0.01)
        assert wanted < 0.9 * values.max()


def test_headroom_in_a_run(text: Path, tmp_path: Path) -> None:
    name = "nvfp4_act_headroom-kv_fp8_cast"
    data: dict[str, Any] = {**runs.data(text, 8), "device": "cpu"}
    quarkcli.quantize("demo", recipe=name, output=tmp_path / "out", **data)
    found = runs.read_all(tmp_path / "out")
    rows = job_rows.token_rows(runs.prepare("demo", recipe=name, **runs.data(text, 8)), silent)
    seen = hooked(EMBEDDED, rows.tokens)
    for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        module = f"model.layers.0.{leaf}"
        values = seen[module].double().numpy()
        wanted = headroom(values)
        assert wanted > 100 * np.abs(values).max()  # there is room
        assert float(found[f"{module}.input_global_scale"]) == pytest.approx(448 * 6 / wanted, rel=0.02)


@pytest.mark.parametrize("observer", ["mse", "histogram"])
def test_a_search_in_a_run(observer: str, text: Path, tmp_path: Path) -> None:
    own = recipe(tmp_path, f"{{element: int8, observer: {observer}}}", "{element: int8, granularity: channel}")
    quarkcli.quantize("demo", recipe=own, output=tmp_path / "out", device="cpu", **runs.data(text, 8))
    prepared = runs.prepare("demo", recipe=own, **runs.data(text, 8))
    values = hooked(EMBEDDED, job_rows.token_rows(prepared, silent).tokens)["model.layers.0.mlp.down_proj"]
    magnitudes = values.abs().bfloat16().double().numpy().ravel()

    def error(scale: float) -> float:
        return float(np.sum((np.clip(np.rint(magnitudes / scale), 0, 127) * scale - magnitudes) ** 2))

    got = float(runs.read_all(tmp_path / "out")["model.layers.0.mlp.down_proj.input_scale"])
    full = magnitudes.max() / 127.5
    least = min(error(full * factor) for factor in np.linspace(1, 0.02, 99))
    assert error(got) <= 1.02 * least
    assert error(got) <= error(full)


def test_a_clipped_weight_scale_is_that_of_the_whole_group(text: Path, tmp_path: Path) -> None:
    """q, k and v share one scale: the largest that the observer keeps of the three."""
    own = recipe(tmp_path, "{element: fp8_e4m3, scale: {when: dynamic}}", "{element: fp8_e4m3, observer: {name: percentile, percentile: 99}}")  # fmt: skip  # noqa: E501
    quarkcli.quantize("demo", recipe=own, output=tmp_path / "out", device="cpu")
    found, source = runs.read_all(tmp_path / "out"), runs.read_all(EMBEDDED)
    names = [f"model.layers.2.self_attn.{leaf}_proj" for leaf in "qkv"]
    kept = [np.quantile(source[f"{name}.weight"].float().abs().numpy(), 0.99, method="inverted_cdf") for name in names]
    for name in names:
        assert float(found[f"{name}.weight_scale"]) == pytest.approx(max(kept) / 448, rel=1e-6)


@pytest.mark.parametrize(
    ("input_", "weight", "what"),
    [
        ("{element: uint8, zero_point: int}", FP8, "a static scale of an activation cannot have a zero point"),
        ("{element: fp8_e4m3, granularity: {group: 16}}", FP8, "an activation can have only one static scale"),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, "
            "scale: {dtype: e4m3, when: static, global_scale: {dtype: f32}}}",
            FP8,
            "the scales of groups of an activation cannot be stored",
        ),
        (
            "{element: fp4_e2m1, granularity: {group: 16}, observer: mse, "
            "scale: {dtype: e4m3, when: dynamic, global_scale: {dtype: f32}}}",
            FP8,
            "does not see the groups",
        ),
        (
            "{element: fp8_e4m3, scale: {when: dynamic}, observer: percentile}",
            FP8,
            "observer 'percentile' would have no effect",
        ),
        (
            "{element: fp8_e4m3, scale: {constant_amax: 3}, observer: mse}",
            FP8,
            "observer 'mse' would have no effect",
        ),
        ("{element: fp8_e4m3, then: {element: int8}}", FP8, "an activation cannot have a chain"),
        (FP8, "{element: fp8_e4m3, observer: histogram}", "observer 'histogram' works only for activations"),
        (
            FP8,
            "{element: fp8_e4m3, granularity: {tile: [16, 16]}, observer: percentile}",
            "observer 'percentile' does not work with tiles",
        ),
        (
            FP8,
            "{element: fp8_e4m3, granularity: channel, then: {element: int8, observer: mse}}",
            "observer 'mse' would have no effect",
        ),
    ],
)
def test_observers_that_cannot_work_are_refused(input_: str, weight: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        runs.prepare("demo", recipe=recipe(tmp_path, input_, weight), calib_data="builtin")
    assert "model.layers.0" in str(error.value.where)
    assert error.value.hint


def test_what_a_plan_waits_for(tmp_path: Path) -> None:
    own = recipe(tmp_path, "{element: fp8_e4m3, observer: mse}")
    prepared = runs.prepare("demo", recipe=own, layers=["*down_proj=fp8"], kv_cache="fp8", calib_data="builtin")
    kinds = {site: sorted(kinds) for site, kinds in prepared.needs.items() if "layers.0" in site}
    down = prepared.plan.targets["model.layers.0.mlp.down_proj"].site
    assert {site for site, kind in kinds.items() if kind == ["absmax"]} == {
        down,
        "model.layers.0.self_attn.k",
        "model.layers.0.self_attn.v",
    }
    assert all(kind in (["absmax"], ["histogram"]) for kind in kinds.values())
    assert len(kinds) == 6
