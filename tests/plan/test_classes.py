"""Matching by classes of names gives what matching name by name gives; entries on stages of a chain."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, assume, given, settings

from quarkcli.errors import ConfigError, ModelError
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.entries import Entry, Origin
from quarkcli.recipe.match import Patterns, fold, ignores_numbers

from . import naive
from .layouts import GPT_OSS, LLAMA, MIXTRAL, lay_out, llama, plan
from .test_order import FP8, INT4, INT8, UP, recipe

BIG = lay_out(llama(layers=12), "llama")  # numbers of two digits
LAYOUTS = {"llama": LLAMA, "mixtral": MIXTRAL, "gpt_oss": GPT_OSS, "big": BIG}
CHAIN = [{"num_bits": 4, "block_sizes": {-1: 32}}, {"num_bits": [4, 3]}]
PIECES = [
    "*", "**", "?", "model", ".layers", ".1", ".0", "1", "11", "[01]", "[!0]", ".mlp", ".self_attn", ".experts",
    ".block_sparse_moe", "*proj", ".up_proj", ".gate_proj", "w1", ".w2", "lm_head", "q_proj", ".weight_quantizer",
    "_quantizer", "weight", "*input_quantizer", ".bias_quantizer", ".k_bmm_quantizer", "*softmax_quantizer", "[",
]  # fmt: skip
REGEXES = [
    r"re:.*\.weight_quantizer", r"re:(?:.*layers\.1\..*)\.weight_quantizer", r"re:.*(up|down)_proj\.\w+_quantizer",
    r"re:(?:.*\d\.mlp.*|lm_head)\.input_quantizer", r"re:(?:.*proj$)\.weight_quantizer", r"re:.*experts\.[01]\..*",
    r"re:(?:model\.layers\.\d+\.mlp\.[a-z]+_proj)\.weight_quantizer", r"re:.*_bmm_quantizer",
]  # fmt: skip
CHAIN_PATTERNS = ["*weight_quantizer.1", "*weight_quantizer.0", "*up_proj.weight_quantizer.1", "*.0", "*mlp*.1"]

globs = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
names = st.sampled_from([slot for layout in (LLAMA, MIXTRAL) for slot, *_ in naive.slots(layout)])
patterns = st.one_of(globs, st.sampled_from(REGEXES), names, st.sampled_from(CHAIN_PATTERNS))


@st.composite
def entry(draw: st.DrawFn) -> Entry:
    pattern = draw(patterns)
    whole = pattern not in CHAIN_PATTERNS
    cfg = draw(st.sampled_from([None, INT8, FP8, INT4, *([CHAIN] if whole else [])]))
    parent = draw(st.sampled_from([None, None, None, "nn.Linear", "nn.Embedding", "nn.BatchNorm2d"]))
    return Entry(pattern, cfg, draw(st.booleans()), parent, False, Origin("row"), "", False)


ROWS = {"rows": st.lists(entry(), min_size=1, max_size=8), "name": st.sampled_from(list(LAYOUTS))}
LONG = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=80, **LONG)
@given(**ROWS)
def test_the_same_as_slot_by_slot(rows: list[Entry], name: str) -> None:
    check_slot_by_slot(rows, name)


@pytest.mark.slow
@settings(max_examples=1000, **LONG)
@given(**ROWS)
def test_the_same_as_slot_by_slot_at_length(rows: list[Entry], name: str) -> None:
    check_slot_by_slot(rows, name)


def check_slot_by_slot(rows: list[Entry], name: str) -> None:
    layout = LAYOUTS[name]
    listed = recipe(("*up_proj.weight_quantizer", INT8, True), *rows, exclusions=False)
    wanted, counts = naive.resolve(listed.entries, layout)
    try:
        made = plan(listed, layout)
    except (ConfigError, ModelError):  # specs that make no sense for their slot, asked after all is decided
        assume(False)
        return
    assert {slot: (decision.spec, decision.entry) for slot, decision in made.slots()} == wanted
    assert made.matches == counts


@settings(max_examples=500, deadline=None)
@given(globs, st.sampled_from(["model.layers.12.mlp.w1", "0.w10.x.3", "a.7.b7.77", "layers.1.experts.11.w2.weight"]))
def test_a_folded_name_stands_for_its_class(pattern: str, name: str) -> None:
    if ignores_numbers(pattern):
        match = Patterns().matcher(pattern)
        assert bool(match(name)) == bool(match(fold(name)))


def test_folding() -> None:
    assert fold("model.layers.12.w10.3\n4.x") == "model.layers.0.w10.0\n0.x"
    assert [ignores_numbers(p) for p in ("*.w1.*", "*", "*.1.*", "a?", "[ab]*", "re:a", "*1*", "*mlp.10x*")] == [
        True, True, False, False, False, False, False, True,
    ]  # fmt: skip


class TestChains:
    """The slots of a list cfg; the weights of the demo layouts take int4 first and fp8 after."""

    def made(self, *rows: tuple[str, Any, bool]) -> Any:
        return plan(recipe(("*.weight_quantizer", CHAIN, True), *rows)).targets[UP].weight

    def test_both_stages(self) -> None:
        spec = self.made()
        assert [stage.element for stage in spec.stages] == ["int4", "fp8_e4m3"]
        assert spec.stored == "first"

    def test_one_is_replaced(self) -> None:
        spec = self.made(("*weight_quantizer.1", INT8, True))
        assert [stage.element for stage in spec.stages] == ["int4", "int8"]
        other = self.made(("*weight_quantizer.0", INT8, True))
        assert [stage.element for stage in other.stages] == ["int8", "fp8_e4m3"]
        assert other.stages[0].group_size is None  # replaced, not merged

    def test_one_is_switched_off_and_on_again(self) -> None:
        assert self.made(("*weight_quantizer.1", None, False)).describe() == "int4 group 32, model, absmax"
        assert self.made(("*weight_quantizer.0", None, False)).element == "fp8_e4m3"
        both = (("*weight_quantizer.1", None, False), ("*weight_quantizer.1", None, True))
        assert self.made(*both) == self.made()
        assert self.made(("*weight_quantizer.1", None, False), ("*weight_quantizer", None, True)) == self.made()

    def test_a_list_replaces_a_chain_and_never_nests(self) -> None:
        assert self.made(("*.weight_quantizer", CHAIN, True)) == self.made()
        assert self.made(("*.weight_quantizer", INT8, True)).element == "int8"
        assert self.made(("*weight_quantizer.1", INT8, True), ("*.weight_quantizer", CHAIN, True)) == self.made()

    def test_no_chain_has_no_stages(self) -> None:
        rows = [Entry("*weight_quantizer.1", None, False, None, True, Origin("own.yaml", 3, 1), "a", True)]
        with pytest.raises(ConfigError, match="matches none of") as caught:
            plan(recipe(("*.weight_quantizer", INT8, True), *rows))
        assert caught.value.where == "own.yaml:3:1"
        made = plan(recipe(("*.weight_quantizer", INT8, True), ("*weight_quantizer.1", None, False)))
        assert made.targets[UP].weight.element == "int8"

    def test_a_stage_is_no_chain(self) -> None:
        with pytest.raises(ConfigError, match="a stage of a chain cannot be a chain") as caught:
            self.made(("*weight_quantizer.1", CHAIN, True))
        assert caught.value.where == "row 1"

    def test_what_does_not_go_together_names_the_entry(self) -> None:
        with pytest.raises(ConfigError) as caught:
            self.made(("*weight_quantizer.1", {"element": "bf16"}, True))
        assert caught.value.where == "row 1"

    def test_the_attributes_of_a_slot_that_is_off_are_kept(self) -> None:
        made = plan(recipe(("*.weight_quantizer", CHAIN, True), ("*up_proj*", None, False)))
        assert made.targets[UP].slots["weight"].cfg == CHAIN
        changed = plan(recipe(("*.weight_quantizer", CHAIN, True), ("*weight_quantizer.1", INT8, True)))
        decision = changed.targets[UP].slots["weight"]
        assert decision.cfg == spec_to_yaml(decision.spec)


def test_attributes_mean_what_their_slot_makes_of_them() -> None:
    """ModelOpt's fields on weights are static, on activations as they say; errors have the entry's place."""
    dynamic = {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}}
    made = plan(recipe(("*_quantizer", dynamic, True), ("*output_quantizer", None, False),
                       ("*bmm_quantizer", None, False)))  # fmt: skip
    target = made.targets[UP]
    assert target.weight is not None and target.weight.scale.when == "static"
    assert target.input is not None and target.input.scale.when == "dynamic"
    bad = Entry("*.weight_quantizer", {"num_bits": [9, 9]}, True, None, False, Origin("own.yaml", 4, 7), "", True)
    with pytest.raises(ConfigError) as caught:
        plan(recipe(bad))
    assert caught.value.where == "own.yaml:4:7"


@pytest.mark.parametrize("word", ["nn.BatchNorm2d", "nn.Conv2d", "nn.LeakyReLU", "hf.Whatever"])
def test_classes_that_no_family_has_match_nothing(word: str) -> None:
    row = Entry("*", None, False, word, False, Origin("list.yaml", 9, 3), "", False)
    made = plan(recipe(("*.weight_quantizer", INT8, True), row))
    assert made.matches[-1] == 0 or made.entries[-1] is not row
    assert not made.warnings  # NVIDIA's lists end with them


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*lm_haed*", True),
        ("*dwn_proj*", True),
        ("modle.layers.0.*", True),
        ("model.layer.1.mlp.up_proj", True),
        *((p, False) for p in ("*mlp.gate.*", "*router*", "*proj_out.*", "mtp.*", "model.layers.61.*")),
    ],
)
def test_optional_entries_are_news_only_when_misspelled(pattern: str, said: bool) -> None:
    row = Entry(pattern, None, False, None, False, Origin("list.yaml", 9, 3), "", False)
    made = plan(recipe(("*.weight_quantizer", INT8, True), row))
    assert any("list.yaml:9:3" in warning for warning in made.warnings) == said
