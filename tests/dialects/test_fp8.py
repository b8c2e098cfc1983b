"""The fp8 dialect: DeepSeek's tiles, transformers' own decoder, scales per tensor and per row, fused experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from quarkcli import dialects
from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects.base import StoredView
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.errors import ModelError
from quarkcli.job import run as job
from quarkcli.numerics.quantize import dequantize
from quarkcli.spec import PerTile
from tests import runs
from tests.dialects.jobs import opened, whole_job
from tests.dialects.plans import FP8, PAIRS, Module, linears, llama, moe, plan
from tests.dialects.test_roundtrip import HELD, headers, written

FP8_DIALECT = dialects.writer("fp8")
READER = FP8_DIALECT.reader
BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 60).to(torch.float8_e4m3fn)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 1e-3 + 1e-4).to(dtype)


def viewed(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> StoredView:
    assert READER is not None
    return READER.view(config, headers(tensors))


def value(stored: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    assert READER is not None
    return dequantize(READER.decode(stored, tensors).weight, stored.weight)


def by_formula(weight: torch.Tensor, scale: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    rows, cols = weight.shape
    spread = scale.double().repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    return weight.double() * spread[:rows, :cols]


# --- what is read


@pytest.mark.parametrize("shape", [(256, 384), (576, 256), (200, 130), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(128, 128), (64, 32)])
def test_tiles_with_ragged_edges(shape: tuple[int, int], dtype: torch.dtype, tile: tuple[int, int]) -> None:
    """DeepSeek-V3 has `kv_a_proj_with_mqa` of 576 rows; some publish scales in bf16, others smaller tiles."""
    scale = scales(-(-shape[0] // tile[0]), -(-shape[1] // tile[1]), dtype=dtype)
    tensors = {"m.weight": codes(*shape), "m.weight_scale_inv": scale}
    view = viewed({**BLOCK, "weight_block_size": list(tile)}, tensors)
    stored = view.targets["m"]
    assert (stored.shape, stored.weight.granularity) == (shape, PerTile(*tile))
    wanted = by_formula(tensors["m.weight"], scale, tile)
    assert torch.allclose(value(stored, tensors).double(), wanted, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_transformers_own_decoder(dtype: torch.dtype) -> None:
    tensors = {"m.weight": codes(256, 384), "m.weight_scale_inv": scales(2, 3, dtype=dtype)}
    wanted = Fp8Dequantize(None)._dequantize_one(*tensors.values(), output_dtype=torch.float32)
    assert torch.equal(value(viewed(BLOCK, tensors).targets["m"], tensors), wanted)


def test_scales_that_are_powers_of_two() -> None:
    """DeepSeek-V3.1 and later: `scale_fmt` ue8m0, stored as bytes by some."""
    scale = torch.tensor([[2.0**-9, 2.0**-12]])
    tensors = {"m.weight": codes(128, 256), "m.weight_scale_inv": scale}
    stored = {**tensors, "m.weight_scale_inv": scale.to(torch.float8_e8m0fnu)}
    assert READER is not None
    sizes = {**headers(tensors), "m.weight_scale_inv": type(headers(tensors)["m.weight"])("F8_E8M0", (1, 2))}
    found = READER.view(BLOCK, sizes).targets["m"]
    assert torch.equal(value(found, stored), value(viewed(BLOCK, tensors).targets["m"], tensors))


@pytest.mark.parametrize(
    ("shape", "weight", "source"),
    [((), "fp8 tensor", "fp8 static"), ((1,), "fp8 tensor", "fp8 static"), ((64,), "fp8 channel", "fp8 static")],
)
@pytest.mark.parametrize(
    ("scale", "given"), [("weight_scale", "input_scale"), ("weight_scale_inv", "activation_scale")]
)
def test_scales_per_tensor_and_per_row(
    shape: tuple[int, ...], weight: str, source: str, scale: str, given: str
) -> None:
    """Names as vLLM has them, and as transformers has them (Ministral 3)."""
    tensors = {"m.weight": codes(64, 32), f"m.{scale}": scales(*shape), f"m.{given}": torch.tensor(0.25)}
    stored = viewed(TENSOR, tensors).targets["m"]
    assert (kinds.weight_kind(stored.weight), kinds.input_kind(stored.input)) == (weight, source)
    spread = tensors[f"m.{scale}"].double().reshape(-1, 1)
    assert torch.allclose(value(stored, tensors).double(), tensors["m.weight"].double() * spread, rtol=1e-7, atol=0)
    assert READER is not None and READER.decode(stored, tensors).input == 0.25
    dynamic = viewed({**TENSOR, "activation_scheme": "dynamic"}, {k: t for k, t in tensors.items() if given not in k})
    assert kinds.input_kind(dynamic.targets["m"].input) == "fp8 token"


@pytest.mark.parametrize("end", [".k_scale", ".k_proj.k_scale", ".k_proj.output_scale"])
def test_scales_of_a_cache(end: str) -> None:
    pair = {f"a.self_attn{end}": torch.tensor(0.5), f"a.self_attn{end}".replace("k_", "v_"): torch.tensor(2.0)}
    found = viewed(TENSOR, pair).attention
    assert READER is not None and list(found) == ["a.self_attn"]
    assert READER.decode_attention(found["a.self_attn"], pair) == {"k": torch.tensor(0.5), "v": torch.tensor(2.0)}
    with pytest.raises(ModelError, match="v_"):
        viewed(TENSOR, dict([*pair.items()][:1]))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"fmt": "e5m2"}, {}, "cannot read fmt 'e5m2'"),
        ({"activation_scheme": "sometimes"}, {}, "activation_scheme 'sometimes' is unknown"),
        ({"weight_block_size": [128]}, {}, "must be two sizes"),
        ({"weight_block_size": [0, 128]}, {}, "must be two sizes"),
        ({"weight_block_size": [64, 64]}, {}, r"found F32 \[2, 3\], but .* asks for F32 \[4, 6\]"),
        ({"modules_to_not_convert": ["m"]}, {}, "excludes it"),
        ({"ignored_layers": ["m"]}, {}, "excludes it"),
        ({}, {"m.weight": torch.zeros(256, 384, dtype=torch.int8)}, "found I8"),
        ({}, {"m.weight": None}, r"m\.weight"),
        ({"activation_scheme": "static", "weight_block_size": None}, {"m.weight_scale_inv": scales(1)}, "input_scale"),
    ],
)
def test_what_is_refused(config: dict, change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {"m.weight": codes(256, 384), "m.weight_scale_inv": scales(2, 3), **change}
    with pytest.raises(ModelError, match=message):
        viewed({**BLOCK, **config}, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_a_config_without_a_method_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"m.weight": codes(256, 384), "m.weight_scale_inv": scales(2, 3)}
    with pytest.raises(ModelError, match="its quantization_config has no quant_method"):
        dialects.reader({key: value for key, value in BLOCK.items() if key != "quant_method"}, headers(tensors))
    runs.build("qwen3", tmp_path / "model", hidden_size=128, intermediate_size=128)
    found = load_file(tmp_path / "model" / "model.safetensors")
    save_file(
        {**found, "model.layers.0.mlp.up_proj.weight_scale_inv": scales(1, 1)}, tmp_path / "model" / "model.safetensors"
    )
    with pytest.raises(ModelError, match="holds codes of fp8"):
        job.prepare(job.Options(model=str(tmp_path / "model"), scheme="mxfp4", device="cpu"))


def test_experts_in_one_tensor() -> None:
    """As transformers keeps them: gate above up, tiles that end with each."""
    prefix = "model.layers.0.mlp.experts"
    tensors = {
        f"{prefix}.gate_up_proj": codes(3, 256, 128),
        f"{prefix}.gate_up_proj_scale_inv": scales(3, 2, 1),
        f"{prefix}.down_proj": codes(3, 128, 128, seed=1),
        f"{prefix}.down_proj_scale_inv": scales(3, 1, 1),
    }
    view = viewed(BLOCK, tensors)
    assert len(view.targets) == 9
    for name, stored in view.targets.items():
        expert, leaf = int(name.split(".")[-2]), name.split(".")[-1]
        fused = "down_proj" if leaf == "down_proj" else "gate_up_proj"
        index = int(leaf == "up_proj")
        weight = tensors[f"{prefix}.{fused}"][expert][128 * index : 128 * (index + 1)]
        scale = tensors[f"{prefix}.{fused}_scale_inv"][expert][index : index + 1]
        wanted = by_formula(weight, scale, (128, 128))
        assert torch.allclose(value(stored, tensors).double(), wanted, rtol=1e-7, atol=0)
    ragged = {f"{prefix}.gate_up_proj": codes(2, 192, 128), f"{prefix}.gate_up_proj_scale_inv": scales(2, 2, 1)}
    with pytest.raises(ModelError, match="do not end with tiles"):
        viewed(BLOCK, ragged)


# --- what is written


@pytest.mark.parametrize("scheme", HELD["fp8"])
def test_values_by_formula(scheme: str) -> None:
    made = plan(llama(layers=1, hidden=128, mlp=384), linears(HELD["fp8"][scheme]))
    for seed, item in enumerate(made.quantized()):
        quantized, _, tensors = written(FP8_DIALECT, item, seed)
        scale = next(tensor for name, tensor in tensors.items() if ".weight_scale" in name)
        tile = (128, 128) if scale.dim() == 2 else item.shape
        wanted = by_formula(tensors[f"{item.name}.weight"], scale.reshape(1, 1) if scale.dim() < 2 else scale, tile)
        assert torch.allclose(dequantize(quantized, item.weight).double(), wanted, rtol=1e-7, atol=0)


def test_config_says_what_servers_look_for() -> None:
    block = FP8_DIALECT.config(plan(moe(hidden=128, inner=128), linears(HELD["fp8"]["fp8-block"])))
    assert block == {
        **BLOCK,
        "modules_to_not_convert": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"],
    }
    static = FP8_DIALECT.config(plan(llama(), linears(PAIRS["fp8"]), kv=FP8))
    assert (static["activation_scheme"], static["weight_block_size"]) == ("static", None)
    part = FP8_DIALECT.config(plan(moe(), lambda m: PAIRS["fp8"] if m.role in "qkvo" else None))
    assert [name for name in part["modules_to_not_convert"] if "experts" in name] == [
        f"model.layers.{layer}.mlp.experts" for layer in range(2)
    ]


@pytest.mark.parametrize(
    ("modules", "scheme", "loads"),
    [
        (llama(1, 128, 384, 128), "fp8-block", {"vllm", "transformers"}),
        (llama(1, 128, 384, 64), "fp8-block", set()),
        (llama(), "fp8", {"vllm"}),
        (moe(hidden=128, inner=128, layers=1), "fp8", {"vllm"}),
        (moe(hidden=128, inner=128, layers=1), "fp8-token", set()),
    ],
)
def test_who_loads_it(modules: list[Module], scheme: str, loads: set[str]) -> None:
    assert FP8_DIALECT.loaders(plan(modules, linears(HELD["fp8"][scheme]))) == loads


def test_a_model_of_two_schemes_is_refused() -> None:
    made = plan(
        llama(), lambda m: PAIRS["fp8"] if m.role in "qkv" else HELD["fp8"]["fp8-token"] if m.role == "o" else None
    )
    assert FP8_DIALECT.refusals(made) == [
        "model.layers.0.self_attn.o_proj (and 1 more): fp8 has one scheme for all weights, and "
        "model.layers.0.self_attn.q_proj has another one"
    ]


# --- the whole job


@pytest.fixture(scope="module")
def whole_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    return runs.build("qwen3", tmp_path_factory.mktemp("model") / "model", head_dim=64, **sizes)


def test_quantize_verify_and_evaluate(tmp_path: Path) -> None:
    assert whole_job("fp8", "fp8", tmp_path, {"vllm"}) < 1e-3


def test_quantize_verify_and_evaluate_tiles(tmp_path: Path, whole_tiles: Path) -> None:
    assert whole_job("fp8", "fp8_block128", tmp_path, {"vllm", "transformers"}, whole_tiles) < 1e-3


def test_transformers_loads_tiles(tmp_path: Path, whole_tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No missing or unexpected keys, and weights that are ours. It asks for accelerate, and uses none of it here."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import quantizer_finegrained_fp8

    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    made = runs.run(whole_tiles, tmp_path / "out", scheme="fp8_block128", dialect="fp8")
    model, info = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    checkpoint = opened(made.folder)
    loaded = model.state_dict()
    for name in checkpoint.view.targets:
        assert torch.equal(loaded[f"{name}.weight"].float(), checkpoint.weight(name)), name


def test_extra_layers_are_stored_like_the_others(tmp_path: Path, whole_tiles: Path) -> None:
    """The prediction layer of DeepSeek-V3 has scales as well, behind the last block."""
    made = runs.run(whole_tiles, tmp_path / "out", scheme="fp8_block128", dialect="fp8")
    folder = tmp_path / "more"
    shutil.copytree(made.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    extra = f"model.layers.{config['num_hidden_layers']}.eh_proj"
    tensors = {f"{extra}.weight": codes(128, 256), f"{extra}.weight_scale_inv": scales(1, 2)}
    save_file(tensors, folder / "model-extra.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-extra.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(Source.open(str(folder)))
    wanted = by_formula(*tensors.values(), (128, 128))
    assert torch.allclose(checkpoint.weight(extra).double(), wanted, rtol=1e-7, atol=0)
