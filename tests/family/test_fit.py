"""Files are compared with config.json, the family and each other before any weight is read, without transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli import family
from quarkcli.disk import verify
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.outputs import MANIFEST
from quarkcli.errors import CheckError, ModelError
from quarkcli.family.facts import entries, explained, facts
from quarkcli.job import run as job
from quarkcli.job.options import Options
from tests import runs
from tests.families import models
from tests.plan import layouts
from tests.tiny import Header

Headers = dict[str, Header]
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_hidden_layers": 2,
}  # fmt: skip
Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2"


def shaped(shapes: Mapping[str, tuple[int, ...]]) -> Headers:
    return {name: Header("BF16", tuple(shape)) for name, shape in shapes.items()}


def check(config: Mapping[str, Any], headers: Headers) -> None:
    name, model, inferred = family.for_checkpoint(config, headers)
    layout = family.lay_out(name, model, inferred, config, headers)
    family.check_fit(model, layout, config, headers)


def said(config: Mapping[str, Any], headers: Headers) -> str:
    with pytest.raises(ModelError) as caught:
        check(config, headers)
    assert caught.value.code == 4
    return str(caught.value)


def llama(**other: tuple[int, ...] | None) -> Headers:
    return shaped(changed(layouts.llama(), other))


def mixtral(**other: tuple[int, ...] | None) -> Headers:
    return shaped(changed(layouts.mixtral(), other))


def changed(shapes: dict[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...] | None]) -> dict[str, Any]:
    """Other shapes; None takes a tensor away."""
    return {name: shape for name, shape in {**shapes, **other}.items() if shape is not None}


def test_whole_models_pass() -> None:
    check(LLAMA, llama())
    check(MIXTRAL, mixtral())


SHAPES = {
    "a hole": ({K: None}, f"{K} is missing"),
    "a missing norm": ({"model.layers.2.input_layernorm.weight": None}, "layers.2.input_layernorm.weight is missing"),
    "a whole MLP": (
        {f"model.layers.0.mlp.{leaf}_proj.weight": None for leaf in ("gate", "up", "down")},
        "3 tensors do not fit",
    ),
    "other rows": ({Q: (100, 128)}, f"{Q} is [100, 128]"),
    "a transposed up": ({"model.layers.0.mlp.up_proj.weight": (128, 256)}, "layers.0.mlp.up_proj.weight is [128, 256]"),
    "a convolution": ({Q: (128, 128, 1)}, f"{Q} is [128, 128, 1], not a matrix"),
    "a flat weight": ({Q: (128 * 128,)}, f"{Q} is [16384], not a matrix"),
    "a misshapen norm": ({"model.layers.2.input_layernorm.weight": (64,)}, "layers.2.input_layernorm.weight is [64]"),
    "the last norm": ({"model.norm.weight": (64,)}, "model.norm.weight is [64]"),
    "no last norm": ({"model.norm.weight": None}, "model.norm.weight is missing"),
    "no embedding": ({"model.embed_tokens.weight": None}, "model.embed_tokens.weight is missing"),
    "no head": ({"lm_head.weight": None}, "lm_head.weight is missing"),
    "rows of the embedding": ({"model.embed_tokens.weight": (290, 128)}, "but config.json has a vocabulary of"),
    "rows of the head": ({"lm_head.weight": (320, 128)}, "but config.json has a vocabulary of"),
    "a bias": ({Q.replace("weight", "bias"): (100,)}, f"{Q.replace('weight', 'bias')} is [100]"),
    "one block too many": (
        {name.replace("layers.2.", "layers.3."): shape for name, shape in layouts.llama().items() if ".2." in name},
        "model.layers.3 is one block too many: config.json has",
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_dense_model_with_a_fault(case: str) -> None:
    other, text = SHAPES[case]
    assert text in said(LLAMA, llama(**other))


EXPERTS = {
    "an expert": ({f"{EXPERT}.{leaf}.weight": None for leaf in ("w1", "w2", "w3")}, f"{EXPERT}.w1.weight is missing"),
    "the last expert": (
        {f"{EXPERT.replace('2', '3')}.{leaf}.weight": None for leaf in ("w1", "w2", "w3")},
        f"{EXPERT.replace('2', '3')}.w2.weight is missing",
    ),
    "a projection": ({f"{EXPERT}.w3.weight": None}, f"{EXPERT}.w3.weight is missing"),
    "transposed": ({f"{EXPERT}.w3.weight": (128, 256)}, f"{EXPERT}.w3.weight is [128, 256]"),
    "an expert too many": ({f"{EXPERT}9.w1.weight": (256, 128)}, "is one too many: config.json has 4 experts"),
    "rows of the router": ({"model.layers.1.block_sparse_moe.gate.weight": (3, 128)}, "gate.weight is [3, 128]"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_a_mixture_with_a_fault(case: str) -> None:
    other, text = EXPERTS[case]
    assert text in said(MIXTRAL, mixtral(**other))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 2), ("num_hidden_layers", 4), ("num_key_value_heads", 4), ("num_attention_heads", 8),
        ("head_dim", 64), ("hidden_size", 256), ("vocab_size", 299),
    ],
)  # fmt: skip
def test_a_config_of_another_model(key: str, value: int) -> None:
    said(LLAMA | {key: value}, llama())


def test_fused_experts_are_counted() -> None:
    config = MIXTRAL | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 5}
    assert "but config.json has 5 experts" in said(config, shaped(layouts.gpt_oss()))


def test_all_faults_are_one_message() -> None:
    many = {f"model.layers.{index}.self_attn.q_proj.weight": (100, 128) for index in (0, 2)}
    text = said(LLAMA, llama(**many, **{K: None}, **{"lm_head.weight": None}))
    assert text.startswith("4 tensors do not fit config.json or the other blocks: ")
    assert all(name in text for name in [*many, K, "lm_head.weight"])


# ---- what may differ


def test_extra_prediction_layers() -> None:
    extra = {name.replace("layers.2.", "layers.3."): shape for name, shape in layouts.llama().items() if ".2." in name}
    check(LLAMA, llama(**extra, **{"model.layers.3.eh_proj.weight": (128, 256)}))
    check(LLAMA | {"num_nextn_predict_layers": 1}, llama(**extra))


def test_a_tied_head_and_one_that_nobody_asked_for() -> None:
    headless = llama(**{"lm_head.weight": None})
    check(LLAMA | {"tie_word_embeddings": True}, headless)
    check({key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}, headless)
    check(LLAMA | {"architectures": ["LlamaModel"]}, headless)


def test_padded_vocabularies_that_config_says() -> None:
    wide = llama(**{"model.embed_tokens.weight": (576, 128), "lm_head.weight": (576, 128)})
    check(LLAMA | {"vocab_size": 576}, wide)
    check(LLAMA | {"padded_vocab_size": 576}, wide)
    said(LLAMA, wide)


def test_kinds_of_blocks_that_config_explains() -> None:
    without_v = {"model.layers.2.self_attn.v_proj.weight": None}
    said(LLAMA, llama(**without_v))
    check(LLAMA | {"block_kinds": ["a", "a", "b"]}, llama(**without_v))
    check(LLAMA | {"num_kv_shared_layers": 1}, llama(**without_v))
    kinds = ["full_attention", "full_attention", "sliding_attention"]  # these read the same weights
    said(LLAMA | {"layer_types": kinds}, llama(**without_v))
    said(LLAMA | {"first_k_dense_replace": 2}, llama(**without_v))  # says nothing of attention


def test_kinds_of_attention_with_weights_of_their_own() -> None:
    """MiMo V2, as transformers saves it: its sliding blocks have twice the keys and values, which only blocks tell."""
    wide = {f"model.layers.{index}.self_attn.{leaf}_proj.weight": (128, 128) for index in (1, 3) for leaf in "kv"}
    kinds = {"layer_types": ["full_attention", "sliding_attention"] * 2, "num_hidden_layers": 4}
    narrow = {name: (64, 128) for name in layouts.llama(4) if name.endswith(("k_proj.weight", "v_proj.weight"))}
    model = {"model_type": "novel", "architectures": ["NovelForCausalLM"], "num_key_value_heads": None}
    check(LLAMA | model | kinds, shaped(changed(layouts.llama(4), narrow | wide)))
    del wide["model.layers.3.self_attn.v_proj.weight"]
    assert "layers.1.self_attn.v_proj.weight is [128, 128]" in said(
        LLAMA | model | kinds, shaped(changed(layouts.llama(4), narrow | wide))
    )


def test_one_block_of_a_kind_of_attention_differs_in_keys_and_values_alike() -> None:
    """MiMo V2 of two blocks: damage to one tensor looks otherwise."""
    model = {"model_type": "novel", "architectures": ["NovelForCausalLM"], "num_key_value_heads": None}
    config = LLAMA | model | {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2}
    k, v = (f"model.layers.1.self_attn.{leaf}_proj.weight" for leaf in "kv")
    check(config, shaped(changed(layouts.llama(2), {k: (128, 128), v: (128, 128)})))
    assert "2 tensors do not fit" in said(config, shaped(changed(layouts.llama(2), {k: (128, 128), v: (32, 128)})))
    assert "1 tensor does not fit" in said(config, shaped(changed(layouts.llama(2), {k: (128, 128)})))
    same = config | {"layer_types": ["full_attention"] * 2}
    assert "2 tensors do not fit" in said(same, shaped(changed(layouts.llama(2), {k: (128, 128), v: (128, 128)})))


def test_experts_that_compute_nothing_are_not_too_many() -> None:
    """LongCat Flash, as transformers saves it: those behind the routed ones have a part of the weights."""
    headers = shaped(layouts.mixtral(2, 4))
    few = MIXTRAL | {"num_local_experts": 3, "zero_expert_num": 1}
    novel = {"model_type": "novel", "architectures": ["NovelForCausalLM"]}
    assert "experts.3.w1.weight is one too many: config.json has 3 experts" in said(
        MIXTRAL | novel | {"num_local_experts": 3}, headers
    )
    without = {name: header for name, header in headers.items() if not name.endswith("experts.3.w2.weight")}
    check(few | novel, without)
    name, model, inferred = family.for_checkpoint(few | novel, headers)
    layout = family.lay_out(name, model, inferred, few | novel, headers)
    assert layout.weights["model.layers.0.block_sparse_moe.gate"].role == "router"


def test_the_quantization_says_nothing_of_the_model() -> None:
    """A block of a transform config is called head_dim as well."""
    said = {"quantization_config": {"transform_config": {"config_groups": {"a": {"head_dim": 128}}}}}
    assert list(entries({"head_dim": 32, "inner": {"n_heads": 4}, **said})) == [("head_dim", 32), ("n_heads", 4)]


def test_facts_of_config() -> None:
    text = {
        "mlp_only_layers": [0], "moe_freq": 2, "pattern": "M*M*", "hybrid_override_pattern": "M*M*",
        "linear": {"full_layers": [2, 4]}, "rope_layers": [1, 0, 0, 0], "experts": 8,
    }  # fmt: skip
    found = facts(text, 4)
    assert explained(found, "mlp.up", [0], [1, 2, 3])
    assert explained(found, "mixer", [0, 2], [1, 3])
    assert explained(found, "other", [1, 3], [0, 2])
    assert not explained(found, "self_attn.k_proj", [0], [1, 2, 3])
    assert not explained(found, "mixer", [0, 1], [2, 3])


@pytest.mark.parametrize("name", models.RECIPES)
def test_every_family_passes_whole_and_fails_with_a_fault(name: str, built: dict[str, Path]) -> None:
    """Every family as transformers builds it passes; without an attention projection it does not."""
    config = json.loads((built[name] / "config.json").read_text())
    headers = models.headers(runs.read_all(built[name]))
    check(config, headers)
    _, layout = models.described(built[name])
    empty = {tensor: Header(header.dtype, (0,)) for tensor, header in headers.items()}
    first = layout.weights[layout.attention[0].k_proj].view.tensor
    assert "no values" in said(config, headers | {first: empty[first]})
    assert "not a matrix" in said(config, headers | {first: Header("BF16", (*headers[first].shape, 1))})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")

    class Sources(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = models.build(name, root / name)
            return self[name]

    return Sources()


# ---- what belongs to no model


LEFTOVERS = {
    "lora": (["self_attn.q_proj.lora_A.default.weight", "self_attn.q_proj.base_layer.weight"], "adapter", "merge"),
    "dora": (["self_attn.q_proj.lora_magnitude_vector.default.weight"], "adapter", "merge"),
    "ia3": (["self_attn.k_proj.ia3_l.default"], "adapter", "merge"),
    "saved modules": (["mlp.modules_to_save.default.weight"], "adapter", "merge"),
    "an original": (["mlp.original_module.weight"], "adapter", "merge"),
    "gptq": (
        [f"self_attn.q_proj.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")],
        "GPTQ",
        "original model",
    ),
    "bitsandbytes": (
        ["self_attn.q_proj.weight.absmax", "self_attn.q_proj.weight.quant_map"],
        "bitsandbytes",
        "original",
    ),
    "int8 of bitsandbytes": (["self_attn.q_proj.SCB"], "bitsandbytes", "original model"),
    "fp8": (["self_attn.q_proj.weight_scale_inv"], "fp8", "original model"),
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_leftovers_are_named(case: str) -> None:
    leaves, what, hint = LEFTOVERS[case]
    extra = {f"model.layers.0.{leaf}": (8, 128) for leaf in leaves}
    with pytest.raises(ModelError, match=what) as caught:
        check(LLAMA, llama(**extra))
    assert f"model.layers.0.{leaves[0]}" in caught.value.what and hint in caught.value.hint


def test_double_precision_says_what_to_do() -> None:
    double = {name: Header("F64", header.shape) for name, header in llama().items()}
    with pytest.raises(ModelError, match="double precision") as caught:
        check(LLAMA, double)
    assert "BF16" in caught.value.hint


# ---- the product


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build("llama", tmp_path_factory.mktemp("source") / "m")


def broken(source: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = runs.read_all(source)
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("scheme", ["int8_dynamic", "mxfp4", "nvfp4", "int4_wo_128"])
def test_every_scheme_refuses_before_any_weight_is_read(scheme: str, source: Path, tmp_path: Path) -> None:
    hole = "model.layers.1.self_attn.k_proj.weight"
    model = broken(source, tmp_path / "broken", lambda tensors: tensors.pop(hole))
    with pytest.raises(ModelError, match="missing"):
        runs.prepare(model, scheme=scheme, calib_data="builtin")
    with pytest.raises(ModelError, match="missing"):
        runs.run(model, tmp_path / "out", scheme=scheme, calib_data="builtin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_verify_finds_a_hole_in_a_written_checkpoint(source: Path, tmp_path: Path) -> None:
    made = runs.run(source, tmp_path / "out", scheme="int8_dynamic")
    index = made.folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    lost = [name for name in known["weight_map"] if ".layers.1.self_attn.k_proj." in name]
    file = made.folder / known["weight_map"][lost[0]]
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in lost}
    save_file(tensors, file, metadata={"format": "pt"})
    for name in lost:
        del known["weight_map"][name]
    index.write_text(json.dumps(known))
    (made.folder / MANIFEST).unlink()  # which would tell as well
    with pytest.raises(CheckError, match=r"layers\.1\.self_attn\.k_proj\.weight is missing"):
        verify.directory(str(made.folder))


def test_a_run_without_data_needs_no_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from quarkcli.job import run as job; "
        "from quarkcli.job.options import Options; "
        f"job.run(Options(model='demo', scheme='mxfp4', device='cpu', output=Path({str(tmp_path / 'out')!r})));"
        "print('transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    assert EMBEDDED.is_dir()


# ---- tensors that nobody expects


def stray(source: Path, folder: Path, name: str, shape: tuple[int, ...], *, listed: bool) -> Path:
    """The model in one file with an index, and one more tensor, which the index names or not."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    known = dict.fromkeys([*tensors, *([name] if listed else [])], "model-00001-of-00001.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors | {name: torch.zeros(shape)}, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": known}))
    return folder


def test_a_known_tensor_that_the_index_does_not_name(source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = stray(source, tmp_path / "model", "mask", (8, 8), listed=True)
    index = folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())["weight_map"]
    del known[name]
    index.write_text(json.dumps({"weight_map": known}))
    with pytest.raises(ModelError, match=f"but not in the index: {name}") as caught:
        job.prepare(Options(model=str(folder), scheme="mxfp4"))
    assert caught.value.code == 4


def test_unknown_tensors_that_the_index_does_not_name_are_listed(source: Path, tmp_path: Path) -> None:
    folder = stray(source, tmp_path / "model", "optimizer.step", (1,), listed=False)
    found = job.prepare(Options(model=str(folder), scheme="mxfp4")).warnings
    assert any("not in the index, and are copied as they are: optimizer.step" in line for line in found)
    made = runs.run(folder, tmp_path / "out", scheme="mxfp4")
    assert "optimizer.step" in runs.read_all(made.folder)  # ours names it
    assert verify.directory(str(made.folder), str(folder))


@pytest.mark.parametrize("name", ["memory.weight", "model.layers.0.mixer.weight"])
def test_weights_of_more_axes_and_no_known_role_are_listed(source: Path, tmp_path: Path, name: str) -> None:
    folder = stray(source, tmp_path / "model", name, (4, 3, 2), listed=True)
    text = f"these tensors are no matrices and of no known role, and are kept as they are: {name} [4, 3, 2]"
    if ".layers." in name:  # in every block, as it would be
        tensors = load_file(folder / "model-00001-of-00001.safetensors")
        more = {name.replace(".0.", f".{number}."): torch.zeros(4, 3, 2) for number in range(2)}
        save_file(tensors | more, folder / "model-00001-of-00001.safetensors")
        known = dict.fromkeys(tensors | more, "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": known}))
    assert any(warning.startswith(text) for warning in job.prepare(Options(model=str(folder), scheme="mxfp4")).warnings)


def test_convolutions_of_towers_are_no_surprise() -> None:
    headers = shaped({"visual.patch_embed.proj.weight": (8, 3, 2, 2), "model.layers.0.conv1d.weight": (8, 1, 4)})
    roles = {"visual.patch_embed.proj.weight": "other", "model.layers.0.conv1d.weight": "conv"}
    assert list(family.surprises(roles, headers, ())) == []


def test_verify_finds_a_tensor_that_the_index_does_not_name(source: Path, tmp_path: Path) -> None:
    made = runs.run(source, tmp_path / "out", scheme="mxfp4")
    index = made.folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    del known["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(known))
    with pytest.raises(CheckError, match=r"1 tensors are in the files but not in the index: model\.norm\.weight"):
        verify.directory(str(made.folder))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_none(key: str) -> None:
    for good in ("bfloat16", "torch.float16", "float8_e4m3fn", "auto", None):
        check(LLAMA | {key: good}, llama())
    assert f"{key} in config.json is 'float7', which is no dtype" in said(LLAMA | {key: "float7"}, llama())


@pytest.mark.parametrize("value", ["128", 2.5])
@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "max_position_embeddings"])
def test_a_size_that_is_no_whole_number(key: str, value: object) -> None:
    assert f"{key} in config.json is '{value}', not a whole number" in said(LLAMA | {key: value}, llama())
