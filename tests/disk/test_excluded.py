"""Entries of lists of what is left out, as other tools write them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quarkcli import dialects
from quarkcli.dialects import gptq, modelopt
from quarkcli.dialects.base import Reader
from quarkcli.disk.excluded import Entries, check
from quarkcli.errors import CheckError
from tests.dialects.plans import linears, llama, plan
from tests.dialects.test_roundtrip import HELD, PAIRS

MODULES = ["lm_head", *(f"model.layers.{n}.{leaf}" for n in (1, 10) for leaf in
           ("self_attn.q_proj", "mlp.gate", "mlp.gate_proj", "mlp.experts.0.up_proj"))]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "left", "loosely"),
    [
        ("lm_head", {"lm_head"}, set()),
        ("*lm_head", {"lm_head"}, set()),
        ("model.layers.1.mlp.gate", {"model.layers.1.mlp.gate"}, {"model.layers.1.mlp.gate_proj"}),
        ("model.layers.1.mlp.experts", {"model.layers.1.mlp.experts.0.up_proj"}, set()),
        ("model.layers.*.self_attn", {f"model.layers.{n}.self_attn.q_proj" for n in (1, 10)}, set()),
        ("re:.*mlp[.]gate$", {f"model.layers.{n}.mlp.gate" for n in (1, 10)}, set()),
        ("re:lm_head", {"lm_head"}, set()),
        ("re:head", set(), set()),  # patterns match from the start
        ("q_proj", set(), {f"model.layers.{n}.self_attn.q_proj" for n in (1, 10)}),
    ],
)
def test_what_an_entry_speaks_of(entry: str, left: set[str], loosely: set[str]) -> None:
    entries = Entries([entry])
    assert entries.left(MODULES) == left
    assert entries.left(MODULES, loosely=True) == left | loosely


class Listing(Reader):
    lists = ("ignore",)


class Headless(Reader):
    lists = ("modules_to_not_convert",)
    unlisted = frozenset({"embedding", "head"})
    head_key = "quantizes_head"


class Parted(Listing):
    lists_parts = True


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("reader", "config", "fault"),
    [
        (Listing(), {}, ""),
        (Listing(), {"ignore": ["lm_head", "re:.*gate$"]}, ""),
        (
            Listing(),
            {"ignore": ["re:.*gate$"]},
            "modules are not quantized, but ignore does not list them",
        ),
        (
            Listing(),
            {"ignore": ["lm_head", "re:.*gate$", "model.up"]},
            "modules are quantized, but ignore lists them",
        ),
        (Headless(), {"modules_to_not_convert": ["gate"]}, ""),  # the head goes without saying
        (Headless(), {"modules_to_not_convert": None}, ""),
        (Headless(), {"modules_to_not_convert": ["visual"]}, "modules_to_not_convert does not list them: model.gate"),
        (modelopt.READER, {"quantization": {"exclude_modules": ["lm_head*", "*gate"]}}, ""),
        (
            modelopt.READER,
            {"quantization": {"exclude_modules": ["*gate"]}},
            "exclude_modules does not list them: lm_head",
        ),
        (Listing(), {"ignore": ["lm_head", "re:.*gate$", "up"]}, ""),
        (Parted(), {"ignore": ["lm_head", "gate", "up"]}, "modules are quantized, but ignore lists them"),
        (Headless(), {"quantizes_head": True}, "lm_head: is not quantized, but quantizes_head is true"),
    ],
)
def test_lists_of_every_tool(reader: Reader, config: dict[str, Any], fault: str) -> None:
    told(reader, config, fault, {"lm_head": "head", "model.gate": "router"})


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({}, ""),
        ({"dynamic": None}, ""),
        ({"dynamic": {}}, "modules are not quantized, but dynamic does not list them"),
        ({"dynamic": {"+:.*": {"bits": 8}, r"-:.*\.(down|other)$": {}}}, ""),
        (
            {"dynamic": {r"-:model\.": {}}},
            "modules are quantized, but dynamic lists them",
        ),
        ({"lm_head": True, "dynamic": {}}, "lm_head: is not quantized, but lm_head is true"),
    ],
)
def test_what_gptqmodel_leaves_out(config: dict[str, Any], fault: str) -> None:
    """It knows the linears of a model's blocks, and says what it leaves out of those."""
    told(gptq.READER, config, fault, {"lm_head": "head", "model.gate": "router", "model.down": "down"})


def test_routers_that_no_loader_quantizes_need_no_entry() -> None:
    """Those of DeepSeek's and Kimi's published checkpoints have none; one of another family is missed."""
    told(Listing(), {"ignore": ["lm_head"]}, "", {"lm_head": "head", "model.gate": "router"}, frozenset({"router"}))
    told(Listing(), {"ignore": ["lm_head"]}, "list them: model.gate", {"lm_head": "head", "model.gate": "router"})


def told(
    reader: Reader, config: dict[str, Any], fault: str, kept: dict[str, str], whole: frozenset[str] = frozenset()
) -> None:
    """Checks a model with one quantized weight and these kept ones, by name -> role. `whole`: roles left alone."""
    roles = {**kept, "model.up": "up", "model.embed": "embedding"}
    weights = {name: SimpleNamespace(name=name, role=role) for name, role in roles.items()}
    layout: Any = SimpleNamespace(weights=weights, tied_head=None, protected={}, unlisted=whole)
    if not fault:
        check(reader, config, layout, ["model.up"])
        return
    with pytest.raises(CheckError) as caught:
        check(reader, config, layout, ["model.up"])
    assert fault in str(caught.value)


@pytest.mark.parametrize("name", HELD)
def test_every_dialect_reads_the_lists_that_it_writes(name: str) -> None:
    writer = dialects.writer(name)
    pair = next(iter({**HELD[name], **PAIRS}.values()))
    made = plan(llama(layers=1), linears(pair))
    assert writer.reader is not None
    found = writer.reader.left_out(writer.config(made))
    assert found
