"""What is read of config.json, under any of its names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quarkcli.errors import DataError
from quarkcli.family import block_count, head_size, heads, kv_heads, position_limit, text_config, vocabulary
from tests import runs

INNER = {"num_hidden_layers": 3, "n_positions": 64}


@pytest.mark.parametrize(
    "path", [(), ("text_config",), ("language_config",), ("llm_config",), ("thinker_config", "text_config")]
)
def test_the_text_models_part(path: tuple[str, ...]) -> None:
    config: dict[str, object] = dict(INNER)
    for key in reversed(path):
        config = {key: config, "vision_config": {"num_hidden_layers": 9, "max_position_embeddings": 7}}
    assert text_config(config) == INNER
    assert (block_count(config), position_limit(config)) == (3, 64)


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"])
def test_limits_of_positions(key: str) -> None:
    assert position_limit({key: 128}) == 128
    for odd in ("128", None, True, 0, -1, [1]):
        assert position_limit({key: odd}) is None


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 99}, (8, 2, 8, 99)),
        ({"n_embd": 64, "n_head": 4, "vocab_size": 99}, (4, None, 16, 99)),
        (
            {"hidden_size": 64, "num_attention_heads": 4, "multi_query_group_num": 2, "padded_vocab_size": 9},
            (4, 2, 16, 9),
        ),
        ({"d_model": 64, "n_heads": 4, "attn_config": {"kv_n_heads": 2}, "vocab_size": 9}, (4, 2, 16, 9)),
        ({"hidden_size": 64, "num_attention_heads": 4, "n_head_kv": 2, "vocab_size": 9}, (4, 2, 16, 9)),
    ],
)
def test_heads_and_the_vocabulary_under_other_names(own: dict[str, object], found: tuple[int | None, ...]) -> None:
    config = {"text_config": own, "num_attention_heads": 5}
    assert (heads(config), kv_heads(config), head_size(config), vocabulary(config)) == found


def test_odd_parts_are_left_out() -> None:
    for odd in (None, "x", 5, []):
        config = {"text_config": odd, "n_layer": 2}
        assert text_config(config) is config
        assert block_count(config) == 2


@pytest.mark.parametrize("key", ["n_positions", "max_position_embeddings"])
def test_rows_are_cut_to_the_positions(key: str, tmp_path: Path) -> None:
    source = runs.build("llama", tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    config.pop("max_position_embeddings")
    (source / "config.json").write_text(json.dumps(config | {key: 128}))
    cut = runs.prepare(source, scheme="fp8", calib_data="builtin").calibration
    assert cut is not None and (cut.seqlen, cut.warnings) == (128, [])
    with pytest.raises(DataError, match="--calib-seqlen 129 is more than the model's 128 positions"):
        runs.prepare(source, scheme="fp8", calib_data="builtin", calib_seqlen=129)
    (tmp_path / "r.yaml").write_text("schema: quark/recipe/1\nquantize: {scheme: fp8}\ncalibration: {seqlen: 256}\n")
    said = runs.prepare(source, recipe=str(tmp_path / "r.yaml"), calib_data="builtin").calibration
    assert said is not None and said.warnings == [
        "calibration uses rows of 128 tokens, the most that the model takes; the recipe asks for 256"
    ]
