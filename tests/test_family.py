"""Families: roles, sites, scale groups and views, by the published names and by transformers' own parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quarkcli import family
from quarkcli.errors import ConfigError, ModelError
from quarkcli.family import FusedModel, WeightView, fused_views, view_shape
from quarkcli.recipe import catalog
from tests import runs
from tests.plan import layouts
from tests.plan.layouts import GPT_OSS, LLAMA, MIXTRAL, lay_out
from tests.tiny import Header


def test_parts_of_a_dense_model() -> None:
    assert [part.name for part in LLAMA.parts] == ["embed", *(f"model.layers.{i}" for i in range(3)), "tail"]
    assert LLAMA.parts[0].tensors == ("model.embed_tokens.weight",)
    assert LLAMA.parts[-1].tensors == ("model.norm.weight", "lm_head.weight")
    assert sum(len(part.tensors) for part in LLAMA.parts) == len(layouts.llama())


def test_what_reads_one_activation_shares_a_site_and_what_servers_fuse_a_group() -> None:
    block = "model.layers.1"
    sites = {site.name: site.members for site in LLAMA.sites.values() if site.part == 2}
    assert sites == {
        f"{block}.self_attn.q_proj+k_proj+v_proj.input": tuple(f"{block}.self_attn.{x}_proj" for x in "qkv"),
        f"{block}.self_attn.o_proj.input": (f"{block}.self_attn.o_proj",),
        f"{block}.mlp.gate_proj+up_proj.input": (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"),
        f"{block}.mlp.down_proj.input": (f"{block}.mlp.down_proj",),
    }
    groups = {weight.group for weight in LLAMA.weights.values() if weight.part == 2}
    assert len(groups) == 4
    assert LLAMA.weights["lm_head"].site == "lm_head.input"
    assert LLAMA.weights["model.embed_tokens"].site is None


def test_experts_share_two_sites_per_layer() -> None:
    for layout, prefix, names in (
        (MIXTRAL, "model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
        (GPT_OSS, "model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ):
        gate, up, down = (layout.weights[f"{prefix}.2.{name}"] for name in names)
        assert (gate.role, up.role, down.role) == ("expert_gate", "expert_up", "expert_down")
        assert gate.site == up.site == f"{prefix}.input" != down.site
        assert gate.group == up.group != down.group != layout.weights[f"{prefix}.1.{names[2]}"].group
        assert gate.expert == (prefix, 2)
        assert gate.shape == up.shape == (256, 128) and down.shape == (128, 256)
        assert layout.sites[f"{prefix}.input"].kind == "experts_in"
        assert len(layout.sites[f"{prefix}.input"].members) == 8
        assert layout.sites[down.site].kind == "experts_down"


def test_routers_read_what_experts_read() -> None:
    router = MIXTRAL.weights["model.layers.0.block_sparse_moe.gate"]
    assert router.role == "router"
    assert router.site is not None


def test_attention() -> None:
    assert [module.name for module in LLAMA.attention] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert LLAMA.attention[1].k_proj == "model.layers.1.self_attn.k_proj"
    assert LLAMA.attention[1].part == 2


def test_tied_heads() -> None:
    shapes = {name: shape for name, shape in layouts.llama().items() if name != "lm_head.weight"}
    assert lay_out(shapes, "llama", tie_word_embeddings=True).tied_head == "lm_head"
    assert lay_out(shapes, "llama").tied_head is None
    assert lay_out(layouts.llama(), "llama", tie_word_embeddings=True).tied_head is None  # stored all the same
    assert LLAMA.tied_head is None


def test_layers_that_the_model_does_not_run() -> None:
    layout = lay_out(layouts.mixtral(layers=3), "mixtral", num_hidden_layers=2)
    extra = [weight for name, weight in layout.weights.items() if ".layers.2." in name]
    assert len(extra) == 4 + 1 + 12
    assert {weight.role for weight in extra} == {"mtp"}
    assert all(weight.site is None for weight in extra)
    assert layout.parts[-1].kind == "rest"


def test_tensors_outside_the_family_are_kept() -> None:
    layout = lay_out({**layouts.llama(), "extra.weight": (8, 8), "extra.q_proj.weight": (8, 8)}, "llama")
    assert not any(name.startswith("extra") for name in layout.weights)
    assert layout.tensor_roles["extra.q_proj.weight"] == "other"
    assert layout.parts[-1].tensors == ("extra.weight", "extra.q_proj.weight")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "mistral"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "llama"}, "qwen3_moe"),  # the class before the type
        ({"architectures": ["Other"], "model_type": "qwen3"}, "qwen3"),
    ],
)
def test_the_family_of_a_config(config: dict, name: str) -> None:
    assert family.identify(config)[0] == name


def test_unknown_families_are_inferred_from_names() -> None:
    renamed = {
        name.replace("model.layers", "transformer.h").replace("model.embed_tokens", "transformer.wte"): shape
        for name, shape in layouts.mixtral().items()
    }
    layout = lay_out(renamed, "novel")
    assert (layout.family, layout.inferred) == ("novel", True)
    roles = {weight.role for weight in layout.weights.values()}
    assert roles == {"embedding", "head", "router", *"qkvo", "expert_gate", "expert_up", "expert_down"}
    assert [part.name for part in layout.parts] == ["embed", "transformer.h.0", "transformer.h.1", "tail"]
    assert [module.name for module in layout.attention] == [f"transformer.h.{i}.self_attn" for i in range(2)]
    q, o = (layout.weights[f"transformer.h.0.self_attn.{leaf}_proj"] for leaf in "qo")
    assert q.group == layout.weights["transformer.h.0.self_attn.v_proj"].group != o.group
    assert layout.weights["transformer.h.1.block_sparse_moe.experts.3.w2"].role == "expert_down"
    with pytest.raises(ModelError, match="no numbered decoder blocks"):
        lay_out({"a.weight": (4, 4)}, "novel")


def test_views_of_fused_tensors() -> None:
    halves = dict(fused_views(FusedModel(targets=["gate", "up"]), "t", (3, 8, 5), 1))
    assert halves == {"gate": WeightView("t", 1, False, (0, 4, 1)), "up": WeightView("t", 1, False, (4, 8, 1))}
    mixed = dict(
        fused_views(FusedModel(targets=["gate", "up"], split="interleaved", transpose=True), "t", (3, 5, 8), 2)
    )
    assert view_shape(mixed["up"], (3, 5, 8)) == (4, 5)
    tensor = torch.arange(3 * 5 * 8).view(3, 5, 8)
    assert torch.equal(mixed["gate"].of(tensor), tensor[2, :, 0::2].T)
    assert torch.equal(mixed["up"].of(tensor), tensor[2, :, 1::2].T)
    mixed["up"].of(tensor).zero_()  # memory is shared
    assert int(tensor[2, :, 1::2].abs().sum()) == 0 and int(tensor[2, :, 0::2].abs().sum()) > 0


@pytest.mark.parametrize("name", ["qwen3_moe", runs.FUSED, "mixtral", "gpt_oss"])
def test_views_find_what_transformers_computes_with(name: str, tmp_path: Path) -> None:
    """Every expert's weights, in the model that transformers loads from the file."""
    import transformers

    source = runs.build(name, tmp_path / "m")
    tensors = runs.read_all(source)
    headers = {key: Header("BF16", tuple(tensor.shape)) for key, tensor in tensors.items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = model.config.to_dict()
    layout = family.lay_out(*family.for_checkpoint(config, headers), config, headers)
    experts = [weight for weight in layout.weights.values() if weight.expert]
    assert len(experts) == 2 * 4 * 3
    for weight in experts:
        found = weight.view.of(tensors[weight.view.tensor])
        assert tuple(found.shape) == weight.shape
        prefix, index = weight.expert
        module = model.get_submodule(prefix.replace("block_sparse_moe", "mlp"))
        assert torch.equal(found, of_module(module, index, weight.role, name == "gpt_oss"))


def of_module(module: torch.nn.Module, index: int, role: str, oss: bool) -> torch.Tensor:
    """[out, in] by the module's own forward: gpt-oss multiplies from the right and takes every second column."""
    both, down = module.gate_up_proj[index], module.down_proj[index]
    if role == "expert_down":
        return down.T if oss else down
    if oss:
        return both.T[role == "expert_up" :: 2]
    return both.chunk(2)[role == "expert_up"]


@pytest.mark.parametrize("name", sorted(catalog.files("models")))
def test_family_files_are_good(name: str) -> None:
    model = family.load(catalog.files("models")[name])
    assert model.architectures and model.blocks and model.attention
    for architecture in model.architectures:
        config = {"architectures": [architecture], "model_type": model.model_types[0]}
        assert family.identify(config)[0] == name


def test_a_bad_family_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("blocks: model.layers\nembed: [e]\ntail: [t]\nroles: {q: '*q'}\nsite: []\n")
    with pytest.raises(ConfigError) as caught:
        family.load(path)
    assert "unknown key 'site' (did you mean 'sites'?)" in caught.value.what
    assert "roles.q" in caught.value.what
