"""Slots beside weights and inputs: attention operands, outputs, biases, embeddings."""

from __future__ import annotations

from typing import Any

import pytest

from quarkcli.errors import ConfigError, ModelError, UsageError
from quarkcli.family import Layout
from quarkcli.plan.model import Plan
from quarkcli.plan.words import why_cached

from .layouts import GPT_OSS, LLAMA, MIXTRAL, decided, lay_out, llama, origin, plan
from .test_order import FP8, INT4, INT8, UP, recipe

ATTENTION = "model.layers.0.self_attn"
WEIGHTS = ("*.weight_quantizer", INT8, True)
TILE = {"element": "fp8_e4m3", "granularity": {"tile": [128, 128]}, "scale": {"when": "dynamic"}}
GROUP96 = {"element": "fp8_e4m3", "granularity": {"group": 96}, "scale": {"when": "dynamic"}}


def with_biases(leaf: str = "q_proj") -> Layout:
    shapes = llama()
    return lay_out(shapes | {f"{name[:-7]}.bias": rows[:1] for name, rows in shapes.items() if leaf in name}, "llama")


def with_heads(dim: int) -> Layout:
    return lay_out(llama(), "llama", hidden_size=128, num_attention_heads=128 // dim)


def elements(made: Plan, module: str = ATTENTION) -> dict[str, str | None]:
    return {kind: decided(made, f"{module}.{kind}_bmm_quantizer") for kind in "qkvp"}


class TestAttention:
    def test_all_four_operands(self) -> None:
        made = plan("mxfp4", attention="fp8")
        assert elements(made) == dict.fromkeys("qkvp", "fp8_e4m3")
        assert origin(made, f"{ATTENTION}.p_bmm_quantizer") == "--attention fp8"
        assert {a.key for a in made.activations(1)} >= {f"{ATTENTION}.{kind}" for kind in "qkvp"}

    def test_comes_after_the_cache_and_says_so(self) -> None:
        made = plan("mxfp4", kv_cache="nvfp4", attention="fp8")
        assert elements(made) == dict.fromkeys("qkvp", "fp8_e4m3")
        assert "--attention fp8 decides the KV cache, not --kv-cache nvfp4" in made.warnings
        assert not plan("mxfp4", kv_cache="fp8", attention="fp8").warnings

    def test_a_cache_that_is_switched_off_stays_on_under_an_attention_scheme(self) -> None:
        own = recipe(WEIGHTS, attention="fp8", kv_cache="fp8")
        made = plan(own, kv_cache="none")
        assert elements(made) == dict.fromkeys("qkvp", "fp8_e4m3")
        assert made.warnings == ["own: attention fp8 decides the KV cache, not --kv-cache none"]
        assert why_cached(made) == "own: attention fp8"
        flags = plan("mxfp4", kv_cache="none", attention="fp8")
        assert flags.warnings == ["--attention fp8 decides the KV cache, not --kv-cache none"]
        assert not plan(own, kv_cache="none", attention="none").warnings
        assert why_cached(plan(own, attention="none")) == "own: kv_cache fp8"

    def test_a_recipe_says_it_and_a_flag_wins(self) -> None:
        own = recipe(WEIGHTS, attention="fp8", kv_cache="fp8")
        assert elements(plan(own))["p"] == "fp8_e4m3"
        assert origin(plan(own), f"{ATTENTION}.q_bmm_quantizer") == "own: attention fp8"
        without = plan(own, attention="none")
        assert elements(without) == {"q": None, "k": "fp8_e4m3", "v": "fp8_e4m3", "p": None}

    def test_exclusions_do_not_touch_it(self) -> None:
        assert elements(plan("mxfp4", attention="fp8", exclude=["*self_attn*"]))["q"] == "fp8_e4m3"

    @pytest.mark.parametrize(("key", "noun"), [("kv_cache", "KV cache scheme"), ("attention", "attention scheme")])
    def test_unknown_names(self, key: str, noun: str) -> None:
        with pytest.raises(UsageError, match=f"unknown {noun} 'fp9'"):
            plan("mxfp4", **{key: "fp9"})

    def test_the_softmax_has_two_names(self) -> None:
        made = plan(recipe(WEIGHTS, ("*.softmax_quantizer", FP8, True)))
        assert elements(made) == {"q": None, "k": None, "v": None, "p": "fp8_e4m3"}
        assert "softmax_quantizer" not in "".join(name for name, _ in made.slots())
        late = plan(recipe(WEIGHTS, ("*.softmax_quantizer", INT8, True), ("*.p_bmm_quantizer", FP8, True)))
        assert elements(late)["p"] == "fp8_e4m3"  # overruled by another that enables: no error

    def test_groups_divide_a_head(self) -> None:
        assert elements(plan("mxfp4", with_heads(32), kv_cache="nvfp4"))["k"] == "fp4_e2m1"
        with pytest.raises(ModelError) as caught:
            plan("mxfp4", with_heads(8), kv_cache="nvfp4")
        assert caught.value.where == f"{ATTENTION}.k_bmm_quantizer"
        assert "8 features of a head are not a multiple of group size 16 (remainder 8)" in caught.value.what

    def test_the_heads_own_size_counts(self) -> None:
        layout = lay_out(llama(), "llama", hidden_size=128, num_attention_heads=16, head_dim=32)
        assert {module.head_dim for module in layout.attention} == {32}
        assert LLAMA.attention[0].head_dim is None

    def test_groups_divide_a_head_under_any_name_of_its_size(self) -> None:
        layout = lay_out(llama(), "llama", n_embd=128, n_head=16)
        with pytest.raises(ModelError, match="8 features of a head are not a multiple of group size 16"):
            plan("mxfp4", layout, kv_cache="nvfp4")

    def test_softmax_outputs_have_no_groups(self) -> None:
        group = {"element": "fp8_e4m3", "granularity": {"group": 16}, "scale": {"when": "dynamic"}}
        with pytest.raises(ConfigError, match="the softmax output has one column per token, which groups of"):
            plan(recipe(WEIGHTS, ("*.p_bmm_quantizer", group, True)))


class TestOutputs:
    def test_of_linears(self) -> None:
        made = plan(recipe(WEIGHTS, ("*up_proj.output_quantizer", FP8, True)))
        assert made.targets[UP].output == made.targets[UP].slots["output"].spec
        assert (f"{UP}.output", f"{UP}.output") in {(a.key, a.site) for a in made.activations(1)}
        assert not made.warnings

    def test_stay_off_where_the_weight_is_not_quantized(self) -> None:
        made = plan(recipe(("*down_proj.weight_quantizer", INT8, True), ("*up_proj.output_quantizer", FP8, True)))
        assert made.targets[UP].output is None
        assert any(text.startswith("3 output quantizers stay off because their weight") for text in made.warnings)
        assert list(made.activations()) == []

    def test_of_routed_experts_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="outputs of routed experts") as caught:
            plan(recipe(WEIGHTS, ("*w1.output_quantizer", FP8, True)), MIXTRAL)
        assert caught.value.where == "model.layers.0.block_sparse_moe.experts.0.w1.output_quantizer"

    @pytest.mark.parametrize("kind", ["input", "output"])
    def test_tiles_are_for_weights(self, kind: str) -> None:
        with pytest.raises(ConfigError, match="an activation cannot have scales per row of a weight"):
            plan(recipe(WEIGHTS, (f"*up_proj.{kind}_quantizer", TILE, True)))

    def test_groups_divide_what_is_returned(self) -> None:
        with pytest.raises(ModelError, match="256 output features are not a multiple of group size 96") as caught:
            plan(recipe(WEIGHTS, ("*up_proj.output_quantizer", GROUP96, True)))
        assert caught.value.where == f"{UP}.output_quantizer"

    def test_that_nothing_measures(self) -> None:
        shapes = llama() | {"model.layers.3.mlp.up_proj.weight": (256, 128)}  # a block that the model does not run
        layout = lay_out(shapes, "llama", num_hidden_layers=3)
        rows = (WEIGHTS, ("*layers.3*.output_quantizer", FP8, True))
        with pytest.raises(ConfigError, match="its output needs calibration, and text does not reach this module"):
            plan(recipe(*rows, exclusions=False), layout)


class TestBiases:
    def test_belong_to_their_weight(self) -> None:
        made = plan(recipe(WEIGHTS, ("*q_proj.bias_quantizer", INT8, True)), with_biases())
        target = made.targets[f"{ATTENTION}.q_proj"]
        assert target.bias_spec is not None and target.bias_spec.element == "int8"
        assert target.bias == f"{ATTENTION}.q_proj.bias"
        assert target.bias not in made.kept
        assert not made.warnings

    def test_are_copied_otherwise(self) -> None:
        made = plan(recipe(WEIGHTS), with_biases())
        assert f"{ATTENTION}.q_proj.bias" in made.kept

    def test_stay_off_without_a_bias_or_a_quantized_weight(self) -> None:
        rows = (("*k_proj.weight_quantizer", INT8, True), ("*[qk]_proj.bias_quantizer", INT8, True))
        made = plan(recipe(*rows), with_biases())
        assert all(target.bias_spec is None for target in made.targets.values())
        [warning] = made.warnings
        assert warning.startswith("6 bias quantizers stay off")
        assert f"{ATTENTION}.q_proj.bias" in made.kept

    def test_groups_divide_them(self) -> None:
        with pytest.raises(ModelError, match="256 output features are not a multiple of group size 96"):
            plan(
                recipe(WEIGHTS, ("*up_proj.bias_quantizer", INT4 | {"granularity": {"group": 96}}, True)),
                with_biases("up_proj"),
            )


class TestEmbeddings:
    @pytest.mark.parametrize(
        "ways", [{"unprotect": ["embedding"]}, {"include": ["model.embed_tokens"]}, {"layers": ["*=fp8"]}]
    )
    def test_are_quantized_when_asked(self, ways: dict[str, Any]) -> None:
        made = plan("fp8", **ways)
        embedding = made.targets["model.embed_tokens"]
        assert (embedding.weight is not None) == ("layers" not in ways)  # exclusions come after --layer
        assert embedding.input is None  # it reads token numbers
        assert not any("stay off" in text for text in made.warnings)

    def test_without_exclusions(self) -> None:
        made = plan(recipe(WEIGHTS, exclusions=False))
        assert made.targets["model.embed_tokens"].weight and made.targets["lm_head"].weight

    def test_have_no_output(self) -> None:
        made = plan(recipe(WEIGHTS, ("*embed_tokens.output_quantizer", FP8, True), exclusions=False))
        assert made.targets["model.embed_tokens"].output is None
        assert (
            "1 output quantizers stay off because embeddings have no input or output to quantize: model.embed_tokens"
            in made.warnings
        )

    def test_a_tied_head_shares_it(self) -> None:
        shapes = llama()
        del shapes["lm_head.weight"]
        tied = lay_out(shapes, "llama", tie_word_embeddings=True)
        assert any("lm_head with it" in text for text in plan("fp8", tied, unprotect=["embedding"]).warnings)
        assert not plan("fp8", tied).warnings
        assert not plan("fp8", unprotect=["embedding"]).warnings


def test_fused_experts_have_no_bias_of_their_own() -> None:
    made = plan(recipe(WEIGHTS, ("*experts*.bias_quantizer", INT8, True)), GPT_OSS)
    assert any("bias quantizers stay off" in text for text in made.warnings)
    assert "model.layers.0.mlp.experts.down_proj_bias" in made.kept
