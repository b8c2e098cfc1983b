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


@pytest.mark.parametrize(("kind", "prefix"), [("opt", "model.decoder"), ("novel", "model")])
def test_a_stored_head_is_the_table_of_tokens(kind: str, prefix: str) -> None:
    """A table of positions is as wide."""
    shapes = {f"{prefix}.embed_positions.weight": (66, 128)} | {
        name.replace("model.", f"{prefix}.", 1): shape for name, shape in layouts.llama().items()
    }
    layout = lay_out(shapes, kind, tie_word_embeddings=True)
    assert layout.doubled_head == ("lm_head.weight", f"{prefix}.embed_tokens.weight")


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
        ({"model_type": "llava", "text_config": {"model_type": "mistral"}}, "llava"),
        ({"model_type": "llava", "text_config": {}}, "llava"),
        ({"model_type": "llava"}, "llava"),
    ],
)
def test_the_family_of_a_config(config: dict, name: str) -> None:
    assert family.identify(config)[0] == name


def test_a_wrapper_of_another_text_model_is_another_family(home: Path) -> None:
    """What its norms and experts do is not said: quark guesses it."""
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "gemma"}}
    assert family.identify(config) is None
    write(home, "mine", "extends: llava\narchitectures: [LlavaForConditionalGeneration]\ntexts: [gemma]\n")
    assert family.identify(config)[0] == "mine"


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
    assert model.architectures and model.blocks and (model.attention is None) == (name == "mamba")
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


# ---- what families take over, and a user's own


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / "models" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUARK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_family_takes_over_what_it_does_not_say(home: Path) -> None:
    path = write(
        home, "mine", "extends: qwen3-moe\narchitectures: [MyModel]\nroles: {router: ['*.r']}\nexperts: null\n"
    )
    mine, base = family.load(path), family.load(catalog.find("models", "qwen3_moe"))
    assert mine.roles == {**base.roles, "router": ["*.r"]}
    assert mine.experts is None and base.experts is not None
    assert (mine.architectures, mine.model_types, mine.sites) == (["MyModel"], [], base.sites)
    assert family.identify({"architectures": ["MyModel"]})[0] == "mine"
    assert family.load(write(home, "other", "extends: llama\nrenamed: null\n")).renamed == {} != mine.renamed
    cards = {card.name: card for card in family.cards()}
    assert not family.has_experts(cards["mine"]) and family.has_experts(cards["kimi_k25"])


def test_a_users_family_comes_before_a_built_in_one(home: Path) -> None:
    write(home, "mine", "extends: llama\narchitectures:\n  - LlamaForCausalLM\n")  # a list in another form
    assert family.identify({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})[0] == "mine"
    assert family.identify({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})[0] == "qwen3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: lama\n", "unknown model family 'lama'"),
        ("extends: mine\n", "families extend each other: mine -> mine"),
        ("extends: llama\nsite: []\n", "unknown key 'site'"),
        ("extends: llama\nexperts: {path: x, up: u, down: d, fused: {f: {targets: []}}}\n", "fused.f.targets"),
        ("extends: llama\nrenamed: {'^(a': b}\n", "'^(a: b' is no regular expression with its replacement"),
        ("extends: llama\nrenamed: {'^a': '\\1'}\n", "invalid group reference"),
    ],
)
def test_a_bad_family_of_the_users(home: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        family.load(write(home, "mine", text))
    assert message in caught.value.what
    assert "mine.yaml" in caught.value.where


def test_the_spelling_is_told_from_the_tensors() -> None:
    gemma = family.load(catalog.files("models")["gemma3"])
    for text in ("model.language_model", "language_model.model"):
        spelled = family.spelled(gemma, [f"{text}.layers.0.self_attn.q_proj.weight"])
        assert spelled.blocks == f"{text}.layers"
        assert spelled.embed == spelled.roles["embedding"] == [f"{text}.embed_tokens"]
    assert family.spelled(gemma, []).blocks == "model.layers"


def test_extra_layers_of_a_mixture_are_kept() -> None:
    """The MTP layer of DeepSeek V3 has the same names; it is no block, and its experts are not fused when read back."""
    layout = lay_out(layouts.mixtral(layers=3), "mixtral", num_hidden_layers=2)
    extra = [name for name in layout.weights if ".layers.2." in name]
    assert {layout.protected[name] for name in extra} == {"mtp"}
    model = family.spelled(family.load(catalog.files("models")["mixtral"]), ["model.layers.0.x"])
    config = {"num_hidden_layers": 2}
    assert [model.runs(f"model.layers.{index}.mlp", config) for index in (0, 1, 2)] == [True, True, False]


def test_views_of_stacked_experts() -> None:
    rule = FusedModel(targets=["w2"], stacked=True, transpose=True)
    tensor = torch.arange(3 * 4 * 5).view(12, 5)  # 3 experts of [4, 5]
    (name, view), *rest = fused_views(rule, "t", (12, 5), 1, 3)
    assert (name, rest) == ("w2", [])
    assert torch.equal(view.of(tensor), tensor[4:8].T)
    assert view_shape(view, (12, 5)) == (5, 4)
    assert family.fused_shape(rule, 3, (5, 4)) == (12, 5)
    with pytest.raises(ModelError, match="number of experts"):
        lay_out({"transformer.blocks.0.ffn.experts.mlp.w1": (12, 5)}, "dbrx")


def test_orientation_is_told_from_the_hidden_size() -> None:
    for rows, columns in ((8, 5), (5, 8)):  # hidden 5, inner 4
        shapes = {
            "model.layers.0.mlp.experts.gate_up_proj": (3, rows, columns),
            "model.layers.0.mlp.experts.down_proj": (3, 5, 4) if rows == 8 else (3, 4, 5),
        }
        layout = lay_out(shapes, "qwen3_vl_moe", text_config={"hidden_size": 5, "num_hidden_layers": 1})
        assert layout.weights["model.layers.0.mlp.experts.2.up_proj"].shape == (4, 5)
        assert layout.weights["model.layers.0.mlp.experts.2.down_proj"].shape == (5, 4)


# ---- inferred families


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_an_inferred_family_is_a_file_that_reads_back(name: str, home: Path) -> None:
    shapes = getattr(layouts, name)()
    headers = {key: Header("BF16", shape) for key, shape in shapes.items()}
    guessed, comment = family.guess({"architectures": ["New"], "model_type": "new"}, headers)
    path = write(home, "new", family.to_yaml(guessed, comment))
    assert family.load(path) == guessed
    ours, known = (lay_out(shapes, kind, hidden_size=128) for kind in ("new", name))
    assert ours.weights.keys() == known.weights.keys()
    assert [module.name for module in ours.attention] == [module.name for module in known.attention]
    assert {key: site.members for key, site in ours.sites.items()} == {
        key: site.members for key, site in known.sites.items()
    }
    assert ours.protected == known.protected


def test_every_family_reads_back_from_its_own_yaml(home: Path) -> None:
    for name, path in catalog.files("models").items():
        found = family.load(path)
        if name in {"llama", "dbrx", "kimi_k2", "qwen3_5_moe"}:
            again = family.load(write(home, f"my_{name}", family.to_yaml(found)))
            assert again == found.model_copy(update={"extends": None})
