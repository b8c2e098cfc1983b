"""Families that nobody described: which list of blocks, which way round, what is a router; exit 4 if nothing tells."""

from __future__ import annotations

from typing import Any

import pytest

from quarkcli import family
from quarkcli.errors import ModelError
from quarkcli.family.lists import tower
from quarkcli.recipe import catalog
from tests.plan import layouts
from tests.plan.layouts import Shapes, lay_out
from tests.tiny import Header

TEXT = {"hidden_size": 128, "num_hidden_layers": 3}


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name.removeprefix("model."): shape for name, shape in shapes.items()}


def stack(path: str, blocks: int, width: int) -> Shapes:
    """A transformer's list of blocks in names of towers and encoders."""
    out: Shapes = {}
    for index in range(blocks):
        for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out[f"{path}.{index}.self_attn.{leaf}.weight"] = (width, width)
        out[f"{path}.{index}.fc1.weight"] = (2 * width, width)
        out[f"{path}.{index}.fc2.weight"] = (width, 2 * width)
        out[f"{path}.{index}.norm.weight"] = (width,)
    return out


def check(shapes: Shapes, **more: int) -> None:
    config = {"model_type": "novel", **TEXT, **more}
    headers = {name: Header("BF16", shape) for name, shape in shapes.items()}
    name, model, inferred = family.for_checkpoint(config, headers)
    family.check_fit(model, family.lay_out(name, model, inferred, config, headers), config, headers)


# ---- which list


@pytest.mark.parametrize(
    "towers",
    [
        stack("vision_tower.vision_model.encoder.layers", 12, 48),
        stack("visual.blocks", 12, 128),  # as wide as the text
        stack("model.audio_tower.layers", 3, 128),  # as wide and as deep
        stack("image_encoder.trunk.blocks", 3, 128) | stack("speech_encoder.layers", 3, 128),
        stack("encoder.layers", 12, 48),  # no telling word: the width
        stack("extra.layers", 5, 96),
    ],
)
@pytest.mark.parametrize(
    "text", ["model.", "language_model.model.", "text_model.", "model.language_model.", "llm.transformer.", "decoder."]
)
def test_the_language_model_is_found_among_towers(text: str, towers: Shapes) -> None:
    layout = lay_out({**towers, **under(text, layouts.llama())}, "novel", text_config=TEXT)
    blocks = [part.name for part in layout.parts if part.kind == "block"]
    assert blocks == [f"{text}layers.{index}" for index in range(3)]
    assert {layout.weights[name].part for name in layout.weights if name.startswith(text + "layers")} == {1, 2, 3}
    kept = {name for name, role in layout.protected.items() if role in {"vision", "audio"}}
    known = {name.removesuffix(".weight") for name, shape in towers.items() if len(shape) == 2 and tower(name)}
    assert kept == known
    assert all(role != "mtp" for role in layout.tensor_roles.values())


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("thinker.audio_tower.layers", "audio"),
        ("clip.text_model.encoder.layers", None),
        ("model.vision_tower.blocks", "vision"),
        ("transformer.h", None),
        ("language_model.model.layers", None),
        ("talker.model.layers", "audio"),
    ],
)
def test_the_last_telling_step_says_what_a_list_is(name: str, role: str | None) -> None:
    assert tower(name) == role


@pytest.mark.parametrize(
    ("shapes", "config", "said"),
    [
        (stack("a.layers", 3, 128) | stack("b.layers", 3, 128), {}, "a.layers (3 blocks) and b.layers (3 blocks) all"),
        (layouts.llama(), {"num_hidden_layers": 4}, "no list of blocks fits config.json"),
        (layouts.llama(), {"hidden_size": 96}, "3 blocks of width 96"),
    ],
)
def test_lists_that_nothing_tells_apart_are_refused(shapes: Shapes, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        lay_out(shapes, "novel", **{**TEXT, **config})
    assert said in caught.value.what


@pytest.mark.parametrize(
    ("encoder", "decoder", "config"),
    [
        ("encoder.block", "decoder.block", {"d_model": 128, "num_layers": 3, "is_encoder_decoder": True}),
        ("model.encoder.layers", "model.decoder.layers", {"d_model": 128, "num_hidden_layers": 3}),
        ("encoder.layers", "decoder.layers", {"is_encoder_decoder": True}),
        ("language_model.model.encoder.layers", "language_model.model.decoder.layers", {"text_config": TEXT}),
        ("encoder.encoder.layer", "decoder.bert.encoder.layer", {"is_encoder_decoder": True}),
    ],
)
def test_encoder_decoders_are_refused_and_the_stack_left_out_is_named(
    encoder: str, decoder: str, config: dict[str, Any]
) -> None:
    with pytest.raises(ModelError) as caught:
        lay_out(stack(encoder, 3, 128) | stack(decoder, 2, 128), "novel", **config)
    assert f"{encoder} (3 blocks)" in caught.value.what
    assert f"{decoder} (2 blocks)" in caught.value.what


def test_an_encoder_alone_is_a_model() -> None:
    for path in ("encoder.layer", "bert.encoder.layer", "vit.encoder.layer"):
        layout = lay_out(stack(path, 3, 128), "novel", **TEXT)
        assert [part.name for part in layout.parts if part.kind == "block"] == [f"{path}.{index}" for index in range(3)]


def test_a_table_of_position_biases_is_no_linear() -> None:
    """T5's blocks have one; it is looked up."""
    shapes = stack("encoder.block", 3, 128) | {"encoder.block.0.self_attn.relative_attention_bias.weight": (32, 4)}
    layout = lay_out(shapes, "novel", **TEXT)
    assert layout.protected["encoder.block.0.self_attn.relative_attention_bias"] == "embedding"


@pytest.mark.parametrize(
    ("table", "norm", "kind"),
    [
        ("model.embed_tokens", "model.embedding_norm", "tail"),  # LFM2's last norm
        ("model.word_embeddings", "model.word_embeddings_layernorm", "embed"),  # BLOOM's first one
    ],
)
def test_norms_that_are_named_like_a_table_are_norms(table: str, norm: str, kind: str) -> None:
    names = {"model.embed_tokens.weight": f"{table}.weight", "model.norm.weight": f"{norm}.weight"}
    shapes = {names.get(name, name): shape for name, shape in layouts.llama().items()}
    check(shapes)
    layout = lay_out(shapes, "novel", **TEXT)
    assert layout.tensor_roles[f"{norm}.weight"] == "norm"
    assert {module for module, role in layout.protected.items() if role == "embedding"} == {table}
    assert [part.kind for part in layout.parts if f"{norm}.weight" in part.tensors] == [kind]


def test_a_linear_that_is_named_like_a_table_is_none() -> None:
    """RemBERT's, from the width of the embedding to that of the blocks: a table has no bias."""
    name = "model.embedding_hidden_mapping_in"
    layout = lay_out(layouts.llama() | {f"{name}.weight": (128, 128), f"{name}.bias": (128,)}, "novel", **TEXT)
    assert layout.matrices == (name,) and layout.weights["model.embed_tokens"].role == "embedding"


def test_a_table_that_lost_a_dimension_is_damaged() -> None:
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight is \[300\], not a matrix"):
        check(layouts.llama() | {"model.embed_tokens.weight": (300,)})


# ---- gates


def test_attention_may_have_a_gate_of_its_own() -> None:
    """AFMoE's: its output goes through it, and no up or down belongs to it; in an MLP they do."""
    gates = {f"model.layers.{index}.self_attn.gate_proj.weight": (128, 128) for index in range(3)}
    check(layouts.llama() | gates)
    shapes = {name: shape for name, shape in layouts.llama().items() if "up_proj" not in name}
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight is missing beside its gate"):
        check(shapes | gates)


def test_linear_attention_fills_no_cache() -> None:
    """It keeps a state behind its convolutions; blocks with attention proper are found beside it."""
    shapes = layouts.llama()
    linear = {n.replace("self_attn", "linear_attn"): s for n, s in shapes.items() if ".0.self_attn" in n}
    shapes = {name: shape for name, shape in shapes.items() if ".0.self_attn" not in name} | linear
    shapes |= {f"model.layers.0.linear_attn.{leaf}_conv1d.weight": (128, 1, 4) for leaf in "qkv"}
    found = lay_out(shapes, "novel", **TEXT).attention
    assert [module.name for module in found] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]


# ---- what no recipe can reach


@pytest.mark.parametrize("name", ["connector.proj", "model.layers.0.conv.in_proj", "position_norm"])
def test_matrices_that_loaders_may_take_for_linears_are_known(name: str) -> None:
    layout = lay_out(layouts.llama() | {f"{name}.weight": (128, 128), f"{name}.bias": (128,)}, "novel", **TEXT)
    assert layout.matrices == (name,) and name not in layout.weights
    assert lay_out(layouts.llama() | {f"{name}.weight": (128, 1, 4)}, "novel", **TEXT).matrices == ()


@pytest.mark.parametrize(("outer", "inner", "tied"), [(True, False, True), (False, True, True), (False, False, False)])
def test_a_head_is_the_embedding_where_either_part_of_the_config_says_so(outer: bool, inner: bool, tied: bool) -> None:
    """transformers saves InternVL with both; its class reads the outer part."""
    headless = {name: shape for name, shape in layouts.llama().items() if "lm_head" not in name}
    text = {**TEXT, "tie_word_embeddings": inner}
    for kind in ("novel", "llama"):
        layout = lay_out(headless, kind, text_config=text, tie_word_embeddings=outer)
        assert layout.tied_head == ("lm_head" if tied else None)


def test_what_is_below_a_head_is_left_out_with_it() -> None:
    """RoBERTa's: a list that names the head would leave out a linear with codes."""
    shapes = layouts.llama() | {"lm_head.dense.weight": (128, 128), "lm_head.dense.bias": (128,)}
    shapes["lm_head.layer_norm.weight"] = (128,)
    check(shapes)
    layout = lay_out(shapes, "novel", **TEXT)
    assert layout.protected["lm_head.dense"] == layout.protected["lm_head"] == "head"


def test_a_linear_below_a_head_needs_no_row_per_token() -> None:
    """ModernBERT's, which was called damaged: its head is another module, tied to the embedding."""
    shapes = {name: shape for name, shape in layouts.llama().items() if "lm_head" not in name}
    shapes |= {"lm_head.dense.weight": (128, 128), "lm_head.norm.weight": (128,)}
    check(shapes, vocab_size=shapes["model.embed_tokens.weight"][0])


# ---- routers


def test_a_gate_of_a_dense_model_is_no_router() -> None:
    shapes = {name.replace("mlp.gate_proj", "mlp.gate"): shape for name, shape in layouts.llama().items()}
    layout = lay_out(shapes, "novel", **TEXT)
    assert "model.layers.0.mlp.gate" not in layout.protected
    assert layout.weights["model.layers.0.mlp.gate"].role == "linear"


def test_dense_blocks_of_a_mixture_have_gates_that_are_no_routers() -> None:
    shapes = layouts.mixtral()
    shapes = {name.replace("block_sparse_moe", "mlp"): shape for name, shape in shapes.items()}
    dense = {"gate": (256, 128), "up": (256, 128), "down": (128, 256)}
    shapes |= {f"model.layers.2.mlp.{leaf}.weight": shape for leaf, shape in dense.items()}
    layout = lay_out(shapes | layouts.attention("model.layers.2", 128), "novel", **TEXT)
    roles = [layout.weights[f"model.layers.{index}.mlp.gate"].role for index in range(3)]
    assert roles == ["router", "router", "linear"]


# ---- fused experts


def experts(inner: int, transposed: bool, leaves: tuple[str, ...] = ("gate_up_proj", "down_proj")) -> Shapes:
    sizes = {"gate_up_proj": (2 * inner, 128), "down_proj": (128, inner), "up_proj": (inner, 128)}
    out = {f"model.layers.{index}.mlp.experts.{leaf}": (4, *sizes[leaf]) for index in range(3) for leaf in leaves}
    turned = {name: (shape[0], shape[2], shape[1]) for name, shape in out.items()}
    return layouts.llama() | (turned if transposed else out)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("inner", [64, 96, 128, 256])  # 64: gate and up together are square; 128: down is
@pytest.mark.parametrize("config", [TEXT, {"num_hidden_layers": 3}])
@pytest.mark.parametrize("kind", ["novel", "qwen3_vl_moe"])
def test_a_layer_tells_which_way_its_experts_lie(
    kind: str, config: dict[str, Any], inner: int, transposed: bool
) -> None:
    layout = lay_out(experts(inner, transposed), kind, **config)
    views = {weight.view.transpose for weight in layout.weights.values() if weight.expert}
    assert views == {transposed}
    assert layout.weights["model.layers.2.mlp.experts.3.up_proj"].shape == (inner, 128)
    assert layout.weights["model.layers.2.mlp.experts.3.down_proj"].shape == (128, inner)


def test_fused_experts_may_lie_in_a_module_of_another_name() -> None:
    """Step 3.5's; one by one they are below `experts`, where vLLM looks for them."""
    sizes = {"gate_proj": (4, 96, 128), "up_proj": (4, 96, 128), "down_proj": (4, 128, 96)}
    shapes = {name: shape for name, shape in layouts.llama().items() if ".mlp." not in name}
    for index in range(3):
        shapes |= {f"model.layers.{index}.moe.{leaf}.weight": shape for leaf, shape in sizes.items()}
        shapes[f"model.layers.{index}.moe.gate.weight"] = (4, 128)
    check(shapes)
    layout = lay_out(shapes, "novel", **TEXT)
    assert layout.weights["model.layers.1.moe.experts.3.down_proj"].view.tensor == "model.layers.1.moe.down_proj.weight"
    assert layout.weights["model.layers.1.moe.gate"].role == "router"


def test_another_layer_tells_where_one_is_square() -> None:
    leaves = ("up_proj", "down_proj")
    shapes = experts(96, True, leaves) | {
        name: (4, 128, 128) for name in experts(96, True, leaves) if ".1.mlp.experts." in name
    }
    layout = lay_out(shapes, "novel", **TEXT)
    assert {weight.view.transpose for weight in layout.weights.values() if weight.expert} == {True}


@pytest.mark.parametrize(
    ("shapes", "kind", "said"),
    [
        (experts(128, False, ("up_proj", "down_proj")), "novel", "the order of the axes of experts"),
        (
            experts(96, True),
            "qwen3_moe",
            "fused experts are not stored as the family file says, or do not have hidden size",
        ),
        (
            experts(64, True),
            "qwen3_moe",
            "fused experts are not stored as the family file says, or do not have hidden size",
        ),
        (experts(96, False) | {"model.layers.1.mlp.experts.down_proj": (4, 128, 95)}, "novel", "fit neither"),
        (
            experts(96, False) | {"model.layers.0.mlp.experts.gate_up_proj_bias": (4, 192)},
            "novel",
            "gate and up of all experts are one tensor",
        ),
    ],
)
def test_experts_that_nothing_tells_apart_are_refused(shapes: Shapes, kind: str, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        lay_out(shapes, kind, **TEXT)
    assert said in caught.value.what


# ---- names


@pytest.mark.parametrize("kind", ["llama", "opt", "gptj", "qwen3_moe", "gemma3"])
def test_a_base_model_is_read_under_its_own_names(kind: str) -> None:
    """Encoders and embedding models are published without the class's first step, and without a head."""
    full, base = lay_out(*spelled_for(kind, True)), lay_out(*spelled_for(kind, False))
    prefix = full.parts[1].name.removesuffix(base.parts[1].name)
    assert prefix and {prefix + name for name in base.weights} == set(full.weights) - {"lm_head"}
    assert {prefix + name: role for name, role in base.protected.items()} == {
        name: role for name, role in full.protected.items() if name != "lm_head"
    }
    assert {prefix + site for site in base.sites} == set(full.sites) - {"lm_head.input"}


def spelled_for(kind: str, full: bool) -> tuple[Shapes, str]:
    made = family.spelled(family.identify({"model_type": kind})[1], [])
    start = made.blocks.partition(".")[0] + "."
    names = {"model.embed_tokens": made.embed[0], "model.norm": made.tail[0]}
    shapes = {}
    for name, shape in layouts.llama().items():
        module, _, leaf = name.rpartition(".")
        module = names.get(module, module.replace("model.layers", made.blocks))
        if full or module != "lm_head":
            shapes[f"{module}.{leaf}" if full else f"{module}.{leaf}".removeprefix(start)] = shape
    return shapes, kind


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "_orig_mod."), ("", "module."), ("self_attn", "_orig_mod.self_attn"), ("model.", "model._orig_mod."),
        ("mlp", "_fsdp_wrapped_module.mlp"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "novel"])
def test_names_of_wrapped_models_are_refused_with_the_bare_name(kind: str, old: str, new: str) -> None:
    shapes = {name.replace(old, new, 1): shape for name, shape in layouts.llama().items()}
    with pytest.raises(ModelError) as caught:
        lay_out(shapes, kind)
    assert caught.value.hint is not None
    assert f"'{caught.value.where.replace(new, old, 1)}'" in caught.value.hint


def test_blocks_elsewhere_are_named() -> None:
    with pytest.raises(ModelError) as caught:
        lay_out(under("thing.text_model.", layouts.llama()), "llama")
    assert caught.value.hint is not None and "thing.text_model.layers (3 blocks)" in caught.value.hint


def test_models_with_images_are_renamed_as_those_of_known_families() -> None:
    headers = {f"language_model.{name}": Header("BF16", shape) for name, shape in layouts.llama().items()}
    images = headers | {"multi_modal_projector.linear_1.weight": Header("BF16", (8, 8))}
    known = family.load(catalog.find("models", "llama")).renamed
    for shapes, rules in ((images, known), (headers, {p: r for p, r in known.items() if "projector" not in p})):
        assert family.infer({"model_type": "novel", **TEXT}, shapes).renamed == rules != {}
    inner = "layers.0.mlp.up_proj"
    guessed = family.infer({"model_type": "novel", **TEXT}, headers)
    assert guessed.in_memory(f"language_model.model.{inner}") == f"model.language_model.{inner}"
