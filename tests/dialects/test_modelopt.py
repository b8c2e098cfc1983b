"""The modelopt dialect against checkpoints of nvidia-modelopt and formulas in float64."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli import dialects
from quarkcli.dialects import _kinds as kinds
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.errors import ConfigError, ModelError
from quarkcli.job import convert
from quarkcli.numerics.quantize import dequantize
from tests import runs
from tests.dialects.jobs import opened, whole_job
from tests.dialects.plans import FP8, INT8_CHANNEL, PAIRS, Module, attention_modules, linears, llama, moe, plan
from tests.dialects.test_roundtrip import HELD, headers, write, written

PEERS = Path(__file__).parents[1] / "data" / "modelopt"
MODELOPT = dialects.writer("modelopt")
KINDS = {
    "fp8": ("fp8 tensor", "fp8 static"),
    "ptpc": ("fp8 channel", "fp8 token"),
    "pb_wo": ("fp8 tile", "fp8 group"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "w4a16": ("nvfp4", "none"),
    "mxfp8": ("mxfp8", "mxfp8"),
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def changed(name: str, folder: Path, config: dict | None = None, **tensors: torch.Tensor | None) -> Path:
    """A copy of a peer's checkpoint with another `quantization_config`, and tensors replaced, added or taken away."""
    shutil.copytree(PEERS / name, folder)
    if config is not None:
        whole = json.loads((folder / "config.json").read_text())
        whole["quantization_config"] |= config
        (folder / "config.json").write_text(json.dumps(whole))
    if tensors:
        found = load_file(folder / "model.safetensors") | tensors
        save_file({key: value for key, value in found.items() if value is not None}, folder / "model.safetensors")
    return folder


# --- ModelOpt's own checkpoints


@pytest.mark.parametrize("name", [*KINDS, "mixed"])
def test_weights_are_those_of_modelopts_own_decoder(name: str) -> None:
    checkpoint = opened(PEERS / name)
    wanted = json.loads((PEERS / name / "decoded.json").read_text())
    found = {module: (checkpoint.weight(module) + 0.0).contiguous().numpy().tobytes() for module in wanted}
    assert {module: hashlib.sha256(data).hexdigest() for module, data in found.items()} == wanted
    assert set(checkpoint.view.targets) == set(wanted) and len(wanted) == 7
    assert not [tensor for tensor in checkpoint.copied() if "_scale" in tensor]


@pytest.mark.parametrize(("name", "wanted"), KINDS.items())
def test_schemes_of_modelopts_checkpoints(name: str, wanted: tuple[str, str]) -> None:
    stored = opened(PEERS / name).view.targets.values()
    assert {(kinds.weight_kind(each.weight), kinds.input_kind(each.input)) for each in stored} == {wanted}


def test_mixed_precision_goes_by_module() -> None:
    targets = opened(PEERS / "mixed").view.targets
    found = {module: kinds.weight_kind(stored.weight) for module, stored in targets.items()}
    assert found == {module: "fp8 tensor" if ".mlp." in module else "nvfp4" for module in targets}
    assert set(found.values()) == {"fp8 tensor", "nvfp4"}


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_static_scales_are_those_of_the_files(name: str) -> None:
    checkpoint, tensors = opened(PEERS / name), load_file(PEERS / name / "model.safetensors")
    for module, stored in checkpoint.view.targets.items():
        assert checkpoint.decode(stored).input == tensors[f"{module}.input_scale"]
    ((module, cache),) = checkpoint.view.attention.items()
    scales = checkpoint.reader.decode_attention(cache, tensors)  # type: ignore[union-attr]
    assert module == "model.layers.0.self_attn"
    assert scales == {kind: tensors[f"{module}.{kind}_proj.{kind}_scale"] for kind in "kv"}


@pytest.mark.parametrize("name", [*KINDS, "mixed"])
def test_the_file_beside_a_silent_config_says_the_same(name: str, tmp_path: Path) -> None:
    """Exports of older releases have `hf_quant_config.json` alone."""
    folder = changed(name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    found, wanted = opened(folder), opened(PEERS / name)
    assert found.view == wanted.view and found.reader is wanted.reader is MODELOPT.reader


def test_a_file_beside_a_model_that_is_not_quantized_says_nothing(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED, tmp_path / "model")
    (tmp_path / "model" / "hf_quant_config.json").write_text("of another checkpoint")
    assert not opened(tmp_path / "model").quantized
    made = runs.run(tmp_path / "model", tmp_path / "out", scheme="mxfp4")
    assert not (made.folder / "hf_quant_config.json").exists()


def test_a_cache_without_scales_is_cast(tmp_path: Path) -> None:
    prefix = "model.layers.0.self_attn"
    gone: dict[str, torch.Tensor | None] = {f"{prefix}.{kind}_proj.{kind}_scale": None for kind in "kv"}
    (stored,) = opened(changed("fp8", tmp_path / "model", **gone)).view.attention.values()
    assert stored.scales == {}
    assert {spec.scale.constant_amax for spec in stored.specs.values() if spec.scale} == {448.0}
    with pytest.raises(ModelError, match=r"v_proj\.v_scale"):
        opened(changed("fp8", tmp_path / "half", **{f"{prefix}.v_proj.v_scale": None}))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("fp8", {"quant_algo": "NVFP4_SVD"}, "this version cannot read quant_algo 'NVFP4_SVD'"),
        ("fp8", {"quant_algo": "W4A16_AWQ"}, r"found F8_E4M3 .* asks for U8"),
        ("fp8", {"quant_algo": "W8A8_SQ_PER_CHANNEL"}, r"found F8_E4M3 .* asks for I8"),
        ("fp8", {"quant_algo": None}, "this version cannot read quant_algo None"),
        ("nvfp4", {"group_size": 32}, "this version cannot read"),
        ("fp8", {"kv_cache_scheme": "NVFP4"}, "this version cannot read a KV cache of NVFP4"),
        ("fp8", {"ignore": ["*q_proj*"]}, "it has a weight_scale, but the quantization config ignores it"),
        ("mixed", {"quantized_layers": {"lm_head": {"quant_algo": "FP8"}}}, "quantized_layers does not name it"),
        ("mixed", {"quantized_layers": {}}, "needs quantized_layers, which is missing"),
        ("mxfp8", {"quant_algo": "NVFP4"}, r"found F8_E4M3 .* asks for U8"),
    ],
)
def test_what_is_refused_of_a_config(name: str, config: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        opened(changed(name, tmp_path / "model", config))


def test_what_is_refused_of_the_tensors(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.o_proj"
    with pytest.raises(ModelError, match=r"o_proj\.input_scale"):
        opened(changed("nvfp4", tmp_path / "a", **{f"{module}.input_scale": None}))
    with pytest.raises(ModelError, match="multiplied or added while the model runs"):
        opened(changed("nvfp4", tmp_path / "b", **{f"{module}.svdquant_lora_a": torch.ones(64)}))


def test_what_inputs_are_multiplied_by_is_multiplied_into_the_weight(tmp_path: Path) -> None:
    """A weight that is left alone does not keep its codes, no other dialect holds it, and it is not run as it is."""
    module = "model.layers.0.self_attn.o_proj"
    columns = torch.linspace(0.5, 2, 64, dtype=torch.bfloat16)
    folder = changed("w4a16", tmp_path / "model", **{f"{module}.pre_quant_scale": columns})
    plain, scaled = opened(PEERS / "w4a16"), opened(folder)
    assert torch.equal(scaled.weight(module), plain.weight(module) * columns.float())
    assert f"{module}.pre_quant_scale" not in scaled.copied()
    others = ["q_proj", "k_proj", "v_proj"]
    made = runs.prepare(folder, scheme="mxfp4", exclude=["*self_attn*"], dialect="compressed-tensors", target="none")
    assert set(made.plan.carried) == {f"model.layers.0.self_attn.{name}" for name in others}
    with pytest.raises(ModelError, match="inputs are multiplied by it, and format"):
        convert.prepare(scaled.source, "compressed-tensors")
    both = changed("nvfp4", tmp_path / "both", **{f"{module}.pre_quant_scale": columns})
    with pytest.raises(ModelError, match="multiplied before they are quantized"):
        list(opened(both).activation_quantizers([f"{module}.weight"]))


def test_an_input_scale_that_weights_alone_do_not_need_is_passed_over(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.o_proj"
    checkpoint = opened(changed("w4a16", tmp_path / "model", **{f"{module}.input_scale": torch.tensor(0.5)}))
    assert checkpoint.view.targets[module].input is None
    assert f"{module}.input_scale" not in checkpoint.copied()


# --- what is written


@pytest.mark.parametrize("scheme", HELD["modelopt"])
def test_values_by_formula(scheme: str) -> None:
    """code * scale in float64, with nothing of ours."""
    made = plan(llama(layers=1, hidden=128, mlp=384), linears(HELD["modelopt"][scheme]))
    for seed, item in enumerate(made.quantized()):
        quantized, _, tensors = written(MODELOPT, item, seed)
        local = {name.removeprefix(f"{item.name}."): tensor for name, tensor in tensors.items()}
        rows, cols = item.shape
        scale = local["weight_scale"]
        if scale.dtype == torch.uint8:
            scale = (scale.double() - 127).exp2()
        if local["weight"].dtype == torch.uint8:
            nibbles = torch.stack([local["weight"] & 15, local["weight"] >> 4], -1).reshape(rows, cols).long()
            codes = E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
        else:
            codes = local["weight"].double()
        if scale.dim() == 4:
            scale = scale.reshape(scale.shape[0], scale.shape[2]).double()
            scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
        elif scale.dim() == 2:
            scale = scale.double().repeat_interleave(cols // scale.shape[1], 1)
        elif scale.dim() == 1:
            scale = scale.double()[:, None]
        values = codes * scale.double() * local.get("weight_scale_2", torch.ones(())).double()
        assert torch.allclose(dequantize(quantized, item.weight).double(), values, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_config_and_names_are_those_of_modelopt(name: str) -> None:
    """Key by key and tensor by tensor, for a model of the same shape."""
    config = json.loads((PEERS / name / "config.json").read_text())["quantization_config"]
    beside = json.loads((PEERS / name / "hf_quant_config.json").read_text())
    checkpoint = opened(PEERS / name)
    pair = next((stored.weight, stored.input) for stored in checkpoint.view.targets.values())
    size = 128 if name == "pb_wo" else 64
    mlp = 128 if name == "pb_wo" else 96
    made = plan(llama(1, size, mlp, size // 2, 32), linears(pair), kv=FP8 if checkpoint.view.attention else None)
    files = MODELOPT.files(made)
    ours, nested = files["config.json"]["quantization_config"], files["hf_quant_config.json"]
    ours.pop("group_size", None)
    assert ours.pop("ignore") == ["lm_head"] and config.pop("ignore") == ["lm_head", "model.embed_tokens"]
    config["quant_algo"] = config["quant_algo"].upper()
    assert ours == config
    assert nested["producer"] == beside["producer"]
    beside["quantization"].pop("exclude_modules")
    beside["quantization"]["quant_algo"] = config["quant_algo"]
    theirs = {key: value for key, value in beside["quantization"].items() if value is not None}
    assert theirs.items() <= nested["quantization"].items()
    tensors = write(MODELOPT, made)[1]
    peers = headers({k: t for k, t in load_file(PEERS / name / "model.safetensors").items() if k in tensors})
    own = {key: header for key, header in headers(tensors).items() if (len(header.shape), name) != (4, "pb_wo")}
    assert own == {key: peers[key] for key in own}
    assert set(peers) == set(tensors)


def test_two_schemes_name_every_module() -> None:
    made = plan(moe(), lambda m: PAIRS["nvfp4"] if m.expert else PAIRS["fp8"] if m.role == "o" else None, kv=FP8)
    config = MODELOPT.config(made)
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert set(config["quantized_layers"]) == {target.name for target in made.quantized()}
    assert config["quantized_layers"]["model.layers.0.self_attn.o_proj"] == {"quant_algo": "FP8"}
    nested = MODELOPT.files(made)["hf_quant_config.json"]["quantization"]
    assert nested["quantized_layers"] == config["quantized_layers"] and nested["kv_cache_quant_algo"] == "FP8"
    assert MODELOPT.loaders(made) == {"vllm"}


def excluded(config: dict, module: str) -> bool:
    """As vLLM 0.32 does it: an entry that is the name, part of it, or a glob that matches it."""
    return any(entry in module or fnmatch.fnmatch(module, entry) for entry in config["ignore"])


@pytest.mark.parametrize("quantized", ["q", "o", "gate", "up", "down", "expert"])
def test_the_list_of_what_is_left_out_hits_no_quantized_module(quantized: str) -> None:
    """A router `mlp.gate` is part of the name of a `mlp.gate_proj` beside it."""
    block = "model.layers.0"
    mlp = [Module(f"{block}.mlp.{name}_proj", (64, 64), name) for name in ("gate", "up", "down")]
    modules = [*moe(layers=1), *mlp]
    made = plan(modules, lambda m: PAIRS["fp8"] if m.role.split("_")[0] == quantized else None)
    config = MODELOPT.config(made)
    names = {target.name for target in made.quantized()}
    assert not [name for name in names if excluded(config, name)]
    left = {target.name for target in made.targets.values()} - names - {"model.embed_tokens"}
    layers = config.get("quantized_layers")
    assert [name for name in left if not excluded(config, name)] == [] or set(layers) == names
    assert (layers is not None) == (quantized == "gate")


def test_experts_that_are_left_out_are_one_entry_a_layer() -> None:
    config = MODELOPT.config(plan(moe(), lambda m: PAIRS["fp8"] if m.role in "qkvo" else None))
    assert [entry for entry in config["ignore"] if "experts" in entry] == [
        f"model.layers.{layer}.mlp.experts*" for layer in range(2)
    ]


def test_refusals_say_the_slot_the_reason_and_who_can() -> None:
    made = plan(llama(layers=1), linears((INT8_CHANNEL, None)))
    with pytest.raises(ConfigError) as caught:
        dialects.choose("modelopt", made)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value) and "cannot hold weight int8" in str(caught.value)
    assert "compressed-tensors" in caught.value.hint and "modelopt" not in caught.value.hint
    fused = [module for module in attention_modules("m.0", 64, 32) if not module.name.endswith("v_proj")]
    assert MODELOPT.refusals(plan(fused, lambda m: None)) == [
        "modelopt has no algorithm for a model without quantized weights"
    ]


@pytest.mark.parametrize(
    ("modules", "scheme", "loads"),
    [
        (llama(1, 128, 384, 128), "fp8-block", True),
        (llama(1, 128, 384, 64), "fp8-block", False),  # k ends within a tile, and v follows
        (moe(hidden=128, inner=128), "nvfp4", True),
        (moe(hidden=128, inner=128), "ptpc", False),  # no class of experts
    ],
)
def test_who_loads_it(modules: list[Module], scheme: str, loads: bool) -> None:
    made = plan(modules, linears(HELD["modelopt"][scheme]))
    assert MODELOPT.loaders(made) == ({"vllm"} if loads else set())


# --- the whole job


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4", "ptpc_fp8"])
def test_quantize_verify_and_evaluate(scheme: str, tmp_path: Path) -> None:
    assert whole_job("modelopt", scheme, tmp_path, {"vllm"}) < 1e-3
