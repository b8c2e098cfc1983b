"""Which way a server runs a format on a GPU."""

from __future__ import annotations

import json

import pytest

from quarkcli import servers
from quarkcli.cli import listings
from quarkcli.job import rates
from quarkcli.recipe import catalog
from quarkcli.servers._kernels import EVERY, Kernel, way
from tests.docs import listings as page


def test_every_device_has_one_generation_and_every_generation_kernels():
    devices = [device for several in rates.generations().values() for device in several]
    assert sorted(devices) == sorted(rates.names())
    assert set(EVERY.split()) == set(rates.generations())
    named = {
        word
        for member in servers.servers()
        for row in member.kernels
        for where in (row.fast, row.weights, row.emulated)
        for word in where.split()
    }
    assert named <= set(rates.generations())


def test_the_first_row_that_fits_holds():
    rows = (Kernel("int4 *", "none", weights="hopper"), Kernel("*", "*", fast="hopper", emulated="ada"))
    assert way(rows, ("int4 group", "none"), "hopper") == "weight-only"
    assert way(rows, ("int4 group", "none"), "ada") is None
    assert way(rows, ("fp8 tensor", "fp8 static"), "hopper") == "fast"
    assert way(rows, ("fp8 tensor", "fp8 static"), "ada") == "emulated"


def listed(quark, *flags):
    answer = quark("schemes", "list", "--json", *flags)
    return {row["name"] for row in json.loads(answer.out)["schemes"] if row["kind"] == "weights"}


def test_a_list_has_what_the_server_runs_there(quark):
    hopper, ampere = listed(quark, "--server", "vllm", "--gpu", "h100"), listed(quark, "--gpu", "A100")
    assert {"fp8", "ptpc_fp8", "int4_wo_128", "nvfp4"} <= hopper
    assert not {"mx6", "amdfp4", "nvfp4_fp8"} & hopper
    assert {"int4_wa_64", "fp8"} <= ampere
    assert "int8_dynamic" not in listed(quark, "--server", "vllm", "--gpu", "b200")
    assert listed(quark, "--server", "sglang") < listed(quark)
    out = quark("schemes", "list", "--server", "vllm", "--gpu", "h100").out.splitlines()
    assert out[0].split() == ["NAME", "FOR", "BITS", "DATA", "RUNS", "WHAT"]
    ways = [line.split()[4] for line in out[1:]]
    assert ways == sorted(ways, key=["fast", "weight-only", "emulated"].index)


@pytest.mark.parametrize(
    ("flags", "message"), [(("--server", "vlm"), "did you mean vllm"), (("--gpu", "h10"), "did you mean h100")]
)
def test_unknown_names_get_the_nearest(quark, flags, message):
    answer = quark("schemes", "list", *flags)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err


def test_show_has_servers_hardware_and_what_it_has_cost(quark):
    out = quark("schemes", "show", "nvfp4").out
    assert "fast on blackwell" in out
    assert "SmolLM2-135M-Instruct, rtn: KL 0.4087" in out
    assert "the embedded model, 1.8M parameters, rtn: KL 0.0" in quark("schemes", "show", "mxfp8").out
    (row, *_) = json.loads(quark("schemes", "show", "nvfp4", "--json").out)["schemes"]
    assert row["servers"]["vllm"]["gpus"]["hopper"] == "weight-only"
    assert {loss["steps"] for loss in row["losses"]} >= {"rtn"}


def test_what_schemes_have_cost_is_what_was_measured():
    assert listings.LOSSES.read_text(encoding="utf-8") == page.losses(), "make docs"
    measured = {name: listings.losses(name) for name in catalog.files("schemes")}
    assert all(rows[-1]["model"].startswith("the embedded model") for rows in measured.values())
    kl = {name: rows[-1]["kl"] for name, rows in measured.items()}
    assert kl["ptpc_fp8"] < kl["int4_wo_32"] < kl["int4_wo_128"] < kl["int3_wo_128"] < kl["int2_wo_128"]
