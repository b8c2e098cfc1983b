"""Forecasts of time, memory and disk by rank, against sums by hand; the machine as it is measured."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from quarkcli.errors import ConfigError, ResourceError, UsageError
from quarkcli.job import predict, probe, rates
from quarkcli.job import run as job
from quarkcli.job.options import Options, Prepared
from tests.bench.clock import processor_seconds

# Whole numbers: seconds can be summed by hand.
ROUND = rates.Rates(
    name="round", origin="by hand", products=1e9, moments=1e9, plain=1e9, factors=1e9, candidates=1e9, read=1e9,
    write=1e9, weight=1e-3, start=(1.0, 2.0), values={"other": 1e6}, fake={"other": 1e6}, memory=10**12, link=1e12,
    node=8, shared=False,
)  # fmt: skip
HIDDEN, INNER, BLOCKS, KV = 128, 384, 4, 64  # of the embedded model
WEIGHTS = 2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * HIDDEN * INNER


@cache
def prepared(scheme: str, algorithm: str | None = None) -> Prepared:
    return job.prepare(
        Options("demo", scheme=scheme, algorithm=algorithm, calib_data="builtin", calib_samples=16, calib_seqlen=64)
    )


def forecast(scheme: str, algorithm: str | None = None, ranks: int = 1, **changes: Any) -> predict.Prediction:
    return predict.of_plan(prepared(scheme, algorithm), replace(ROUND, **changes), ranks)


def test_data_free_by_hand() -> None:
    found = forecast("mxfp4").ranks[0]
    assert found.parts == BLOCKS + 2
    assert found.seconds["quantize"] == pytest.approx(
        BLOCKS * WEIGHTS / 1e6 + BLOCKS * 7 * 1e-3 + (found.read + found.written) / 1e12
    )
    assert found.seconds["forward"] == found.seconds["moments"] == found.seconds["solve"] == 0
    assert found.read == pytest.approx(prepared("mxfp4").forecast.source_bytes, abs=BLOCKS)
    assert found.written == prepared("mxfp4").forecast.output_bytes
    assert 1 + found.seconds["quantize"] < found.time < 1 + sum(found.seconds.values())


def test_forwards_and_moments_by_hand() -> None:
    found = forecast("int4_wo_128", "gptq").ranks[0]
    tokens = 16 * 64
    passes = 2 * BLOCKS - 1  # nothing is handed on behind the last block
    product = 2 * WEIGHTS + 2 * HIDDEN * 64  # each token with half of its row, scores and values
    assert found.seconds["forward"] == pytest.approx(tokens * passes * product / 1e9)
    squares = 3 * HIDDEN**2 + INNER**2
    assert found.seconds["moments"] == pytest.approx(tokens * 2 * BLOCKS * squares / 1e9)
    assert found.seconds["solve"] > 0


def test_quantized_inputs_cost_and_observers_do_not_multiply() -> None:
    plain, inputs = (forecast(scheme).ranks[0].seconds["forward"] for scheme in ("nvfp4_weight_only", "nvfp4"))
    assert plain == 0  # it needs no data
    again = 128 / (16 * 64)  # the share of tokens that run in the quantized block as well
    values = again * BLOCKS * (6 * HIDDEN + INNER)
    product = (1 + again) * BLOCKS * (2 * WEIGHTS + 2 * HIDDEN * 64)
    assert inputs == pytest.approx(16 * 64 * (product / 1e9 + values / 1e6))


def test_one_long_row_runs_again_whole() -> None:
    """A row is not cut for the error of a block, however few tokens that would take."""
    made = job.prepare(Options("demo", scheme="nvfp4", calib_data="builtin", calib_samples=4, calib_seqlen=256))
    found = predict.of_plan(made, ROUND, 1).ranks[0].seconds["forward"]
    values = BLOCKS * (6 * HIDDEN + INNER) / 4
    product = (1 + 1 / 4) * BLOCKS * (2 * WEIGHTS + 2 * HIDDEN * 256)
    assert found == pytest.approx(4 * 256 * (product / 1e9 + values / 1e6))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_parts_are_dealt_out(ranks: int) -> None:
    one, several = forecast("mxfp4"), forecast("mxfp4", ranks=ranks)
    assert sum(rank.parts for rank in several.ranks) == one.ranks[0].parts
    assert sum(rank.written for rank in several.ranks) == one.ranks[0].written
    assert sum(rank.read for rank in several.ranks) == one.ranks[0].read
    assert several.time < one.time


def test_rows_are_cut_into_lanes() -> None:
    one = forecast("int4_wo_128", "gptq").ranks[0].seconds["forward"]
    shares = [rank.seconds["forward"] / one for rank in forecast("int4_wo_128", "gptq", ranks=3).ranks]
    assert shares == pytest.approx([2 / 8, 2 / 8, 4 / 8])  # those of one subtree
    shares = [rank.seconds["forward"] / one for rank in forecast("int4_wo_128", "gptq", ranks=10).ranks]
    assert sorted(shares) == pytest.approx([0, 0] + [1 / 8] * 8)


def test_calibrated_ranks_read_every_block_and_solve_some() -> None:
    one, two = forecast("int4_wo_128", "gptq"), forecast("int4_wo_128", "gptq", ranks=2)
    assert {rank.read for rank in two.ranks} == {one.ranks[0].read}
    half = one.ranks[0].seconds["solve"] / 2
    assert half <= two.ranks[0].seconds["solve"] < 1.5 * half


def test_ranks_on_one_machine_share_its_processors_and_its_disk() -> None:
    one, two = (forecast("mxfp4", ranks=ranks, shared=True, read=1e5) for ranks in (1, 2))
    assert two.time == pytest.approx(one.time, rel=0.3)
    assert two.time > 0.9 * one.time


def test_more_work_for_more_steps() -> None:
    plain = forecast("int4_wo_128", "gptq")
    for more in ("awq,gptq", "qronos", "gptq,autoround"):
        assert forecast("int4_wo_128", more).time > plain.time, more


def test_a_device_that_is_too_small() -> None:
    found = forecast("mxfp4", memory=10**8)
    assert not found.fits
    assert forecast("mxfp4").fits
    assert predict.as_json(found)["fits"] is False


@pytest.mark.parametrize("name", rates.names())
def test_every_device_of_the_table(name: str) -> None:
    found = rates.of_gpu(name)
    assert found.name == name
    assert found.memory is not None and found.memory >= 24e9
    assert found.products > found.plain > found.factors > 1e12  # tensor cores, vectors, what is serial
    assert 1e8 < found.quantizing(prepared("mxfp4").plan.targets["model.layers.0.mlp.up_proj"].weight) < found.products
    assert forecast_on(found) > found.start[0]


def forecast_on(found: rates.Rates) -> float:
    return predict.of_plan(prepared("mxfp4"), found, 2).time


def test_names_are_spelled_freely() -> None:
    assert rates.of_gpu("RTX 4090").name == "rtx4090"
    with pytest.raises(UsageError, match="unknown device 'h1000'") as caught:
        rates.of_gpu("h1000")
    assert "h100" in caught.value.hint


# ---- rates that were measured


def test_rates_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARK_HOME", str(tmp_path))
    guessed = rates.of_this_machine()
    assert "guess" in guessed.origin and "quark env --measure" in guessed.origin
    rates.write(ROUND, rates.default_file())
    assert rates.of_this_machine() == ROUND
    assert rates.of_this_machine(rates.default_file()) == ROUND


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"schema": "quark/rates/1"}',
        json.dumps({"schema": "quark/rates/2", **asdict(ROUND)}),
        json.dumps({"schema": "quark/rates/1", **asdict(ROUND), "products": 0}),
        json.dumps({"schema": "quark/rates/1", **asdict(ROUND), "read": float("nan")}),
        json.dumps({"schema": "quark/rates/1", **asdict(ROUND), "values": {"float4 group": 1.0}}),
        json.dumps({"schema": "quark/rates/1", **asdict(ROUND), "start": [1.0]}),
        json.dumps({"schema": "quark/rates/1", **asdict(ROUND), "node": 1.5}),
        json.dumps({"schema": "quark/rates/1", **asdict(ROUND), "link": "fast"}),
    ],
)  # fmt: skip
def test_files_that_hold_no_rates(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was named is an error; one of the cache is said, and a guess stands in."""
    monkeypatch.setenv("QUARK_HOME", str(tmp_path))
    file = rates.default_file()
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        rates.read(file)
    assert "env --measure" in caught.value.hint
    assert str(file) in rates.of_this_machine().origin


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        rates.write(ROUND, tmp_path / "file" / "rates.json")


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By jobs on a model that is next to nothing: every rate is there, and a plan can be forecast with them."""
    for name, value in {"HIDDEN": 128, "INNER": 256, "BLOCKS": 3, "ROWS": 2, "SEQLEN": 32, "REPEATS": 1}.items():
        monkeypatch.setattr(probe, name, value)
    monkeypatch.setattr(probe, "_DATA_FREE", ("nvfp4_weight_only", "mxfp4", "int4_wo_128"))
    told: list[Any] = []
    found = probe.measure("cpu", processor_seconds, told.append)
    assert found.memory is None and found.shared
    assert {"float4 group", "float4 global group", "integer4 group", "float8 tensor", "other"} <= set(found.values)
    assert {"float8 tensor", "float4 global group"} <= set(found.fake)
    rates.write(found, tmp_path / "rates.json")
    assert rates.read(tmp_path / "rates.json") == found
    assert 0 < predict.of_plan(prepared("nvfp4"), found, 1).time < 600
    assert told
