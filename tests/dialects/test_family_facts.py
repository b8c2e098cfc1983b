"""What family files say of the classes that servers have for their models: plans that these classes do not load.

Each was tried in transformers 5.23 and in vLLM 0.32's CPU build, and read in the sources of the others.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from quarkcli import dialects, servers
from quarkcli.family import FamilyModel, known
from quarkcli.family.rewrites import Rewrites
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog

from .plans import PAIRS, Module, linears, llama, plan

CT = dialects.writer("compressed-tensors")
BOTH = {"vllm", "transformers"}


def family(name: str) -> FamilyModel:
    return known.load(catalog.find("models", name))


def of(made: Plan, name: str) -> Plan:
    """The plan, as one of a model of a family."""
    return replace(made, rewrites=Rewrites(family(name)))


def test_a_head_to_which_vllm_gives_no_scheme() -> None:
    """Phi 3.5 MoE."""
    whole = plan(llama(), linears(PAIRS["int4-32"]))
    head = plan(llama(), lambda m: None if m.role == "embedding" else PAIRS["int4-32"])
    assert CT.loaders(of(head, "mixtral")) == CT.loaders(of(whole, "phimoe")) == BOTH
    assert CT.loaders(of(head, "phimoe")) == {"transformers"}


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt", "quark"])
def test_a_head_with_another_name_in_memory_is_left_out_by_both(dialect: str) -> None:
    """GPT-NeoX, in transformers and vLLM: modelopt's class there takes codes for a head that is not listed."""
    modules = [Module("gpt_neox.layers.0.attention.dense", (128, 128), "o"), Module("embed_out", (512, 128), "head")]
    made = of(plan(modules, lambda m: PAIRS["ptpc"] if m.role == "o" else None), "gpt_neox")
    writer = dialects.writer(dialect)
    config = writer.config(made)
    assert config["exclude" if dialect == "quark" else "ignore"] == ["embed_out", "lm_head"]
    assert writer.config_faults(config, "vllm", made) == [] and "vllm" in writer.loaders(made)


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("gpt_neox", ["tensorrt-llm"]), ("phimoe", ["tensorrt-llm"]),
        ("lfm2_moe", ["tensorrt-llm"]), ("llama", []),
    ],
)  # fmt: skip
def test_servers_without_a_class(name: str, lacking: list[str]) -> None:
    seen = servers.planned(of(plan(llama(), linears(PAIRS["ptpc"])), name), CT)
    told = {server.name: server.refusals(seen) for server in servers.servers()}
    assert sorted(one for one, found in told.items() if "it has no class for these models" in found) == lacking


def test_an_architecture_that_servers_do_not_know() -> None:
    """transformers writes another one for Phi 3.5 MoE than its published files have."""
    own = family("phimoe")
    config = {"attention_bias": True, "lm_head_bias": True, "architectures": ["PhiMoEForCausalLM"]}
    assert own.unserved(config) == ""
    assert own.unserved(config | {"architectures": ["PhimoeForCausalLM"]}) == "architectures: ['PhimoeForCausalLM']"
    assert own.unserved(config | {"lm_head_bias": False}) == "lm_head_bias: False"


@pytest.mark.parametrize(
    ("name", "loaders"),
    [("gpt_neox", {"vllm"}), ("lfm2_moe", {"transformers"}), ("phimoe", BOTH)],
)
def test_scales_of_a_cache_have_a_place_in_some_classes(name: str, loaders: set[str]) -> None:
    cached = plan(llama(), linears(PAIRS["ptpc"]), kv=PAIRS["fp8"][0])
    assert CT.loaders(cached) == BOTH and CT.loaders(of(cached, name)) == loaders
