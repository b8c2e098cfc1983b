"""Damage to good checkpoints: `quark verify` finds each kind, names what is damaged, and ends with exit code 8.

The manifest is taken away, so that nothing is found by its hashes: a peer's checkpoint has none.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkcli.disk import verify
from quarkcli.disk.headers import INDEX
from quarkcli.disk.outputs import MANIFEST, REPORT
from quarkcli.disk.verify import Asked
from quarkcli.errors import CheckError, ExitCode
from tests import runs

# name -> (family, scheme, dialect, more options)
BASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "ct": ("llama", "nvfp4", "compressed-tensors", {"kv_cache": "fp8"}),
    "quark": ("llama", "nvfp4", "quark", {"kv_cache": "fp8"}),
    "ct-fp8": ("llama", "fp8", "compressed-tensors", {}),
    "quark-int4": ("llama", "int4_wo_128", "quark", {}),
    "ct-moe": ("qwen3_moe", "int4_wo_128", "compressed-tensors", {}),
    "quark-moe": ("qwen3_moe", "mxfp4", "quark", {}),
    "awq": ("llama", "uint4_wo_32", "awq", {"exclude": ["*self_attn*"]}),
    "gptq": ("llama", "int4_wo_32", "gptq", {"exclude": ["*self_attn*"]}),
}
DENSE, MOE = ("ct", "quark"), ("ct-moe", "quark-moe")
LAYER = "model.layers.0"
UP, Q, DOWN = f"{LAYER}.mlp.up_proj", f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj"
EXPERT = f"{LAYER}.mlp.experts.1.up_proj"


class Files:
    """A checkpoint in memory, to be changed and written back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
        self.config = json.loads((folder / "config.json").read_text())
        self.index = json.loads((folder / INDEX).read_text())

    @property
    def quantization(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    @property
    def left_out(self) -> list[str]:
        key = "ignore" if "ignore" in self.quantization else "exclude"
        found: list[str] = self.quantization[key]
        return found

    def names(self, pattern: str) -> list[str]:
        return [name for shard in self.shards.values() for name in shard if re.fullmatch(pattern, name)]

    def one(self, *patterns: str) -> str:
        """The first tensor that the first pattern with any matches."""
        return next(name for pattern in patterns for name in self.names(pattern))

    def shard(self, name: str) -> dict[str, torch.Tensor]:
        return next(shard for shard in self.shards.values() if name in shard)

    def change(self, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        shard = self.shard(name)
        shard[name] = function(shard[name]).contiguous()

    def drop(self, name: str) -> torch.Tensor:
        return self.shard(name).pop(name)

    def rename(self, name: str, new: str) -> None:
        shard = self.shard(name)
        shard[new] = shard.pop(name)

    def write(self, *, index: bool = True) -> None:
        for file, shard in self.shards.items():
            save_file(shard, self.folder / file, metadata={"format": "pt"})
        if index:
            self.index["weight_map"] = {name: file for file, shard in self.shards.items() for name in shard}
            size = sum(tensor.nbytes for shard in self.shards.values() for tensor in shard.values())
            self.index["metadata"]["total_size"] = size
        (self.folder / "config.json").write_text(json.dumps(self.config))
        (self.folder / INDEX).write_text(json.dumps(self.index))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The checkpoints, without their manifests; beside each its source."""
    folder = tmp_path_factory.mktemp("good")
    found = {}
    for name, (family, scheme, dialect, options) in BASES.items():
        source = folder / family
        if not source.exists():
            runs.build(family, source)
        data = {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 32, "device": "cpu"}
        data = data if scheme in runs.CALIBRATED or options else {"device": "cpu"}
        made = runs.run(source, folder / name, scheme=scheme, dialect=dialect, **data, **options)
        (made.folder / MANIFEST).unlink()
        found[name] = made.folder
        found[f"{name} source"] = source
    return found


@dataclass(frozen=True)
class Damage:
    """One kind of damage.

    apply   changes the files; returns what the error must name
    on      the checkpoints it is tried on
    source  it takes the source to see it
    asked   what else is asked of `quark verify`
    index   whether the index is written anew, as somebody who repairs files would
    """

    apply: Callable[[Files], str]
    on: tuple[str, ...] = (*DENSE, *MOE)
    source: bool = False
    asked: Mapping[str, Any] | None = None
    index: bool = True


def filled(value: float, *patterns: str) -> Callable[[Files], str]:
    """Sets the first value of a scale."""

    def apply(files: Files) -> str:
        name = files.one(*patterns)

        def first(tensor: torch.Tensor) -> torch.Tensor:
            flat = tensor.reshape(-1).clone()
            if flat.dtype == torch.uint8:
                flat[0] = 255
            else:
                flat[0] = torch.tensor(value).to(flat.dtype)
            return flat.reshape(tensor.shape)

        files.change(name, first)
        return name

    return apply


def scales_of(module: str) -> tuple[str, ...]:
    return (rf"{module}\.weight_scale", rf"{EXPERT}\.weight_scale")


def dropped(*patterns: str) -> Callable[[Files], str]:
    def apply(files: Files) -> str:
        name = files.one(*patterns)
        files.drop(name)
        return name.rpartition(".")[0]

    return apply


def renamed(files: Files) -> str:
    name = files.one(*scales_of(UP))
    files.rename(name, f"{name}s")
    return name.rpartition(".")[0]


def nan_code(files: Files) -> str:
    files.change(f"{UP}.weight", lambda tensor: (tensor.view(torch.uint8) | 0x7F).view(tensor.dtype))
    return f"{UP}.weight"


def without_scales(files: Files) -> str:
    """Codes of 8 bits have the shape of the weight they stand for."""
    files.drop(f"{UP}.weight_scale")
    return f"{UP}.weight"


def other_dtype(files: Files) -> str:
    name = files.one(rf"{UP}\.weight(_packed)?", rf"{EXPERT}\.weight(_packed)?")
    files.change(name, lambda tensor: tensor.to(torch.int16))
    return name


def other_shape(files: Files) -> str:
    name = files.one(rf"{UP}\.weight(_packed)?", rf"{EXPERT}\.weight(_packed)?")
    files.change(name, lambda tensor: tensor[:-8])
    return name.rpartition(".")[0]


def cut_scale(files: Files) -> str:
    name = files.one(*scales_of(UP))
    files.change(name, lambda tensor: tensor[:, :-1])
    return name.rpartition(".")[0]


def other_norm(files: Files) -> str:
    name = f"{LAYER}.input_layernorm.weight"
    files.change(name, lambda tensor: tensor[:-1])
    return name


def nan_norm(files: Files) -> str:
    name = f"{LAYER}.input_layernorm.weight"
    files.change(name, lambda tensor: torch.full_like(tensor, float("nan")))
    return name


def unequal(leaf: str) -> Callable[[Files], str]:
    def apply(files: Files) -> str:
        name = files.one(rf"{Q}\.{leaf}(_2|_global_scale|_scale_2)")
        files.change(name, lambda tensor: tensor * 2)
        return f"{LAYER}.self_attn.q_proj+k_proj+v_proj"

    return apply


def inverted(leaf: str) -> Callable[[Files], str]:
    def apply(files: Files) -> str:
        for name in files.names(rf".*\.{leaf}(_global_scale|_scale_2)"):
            files.change(name, lambda tensor: tensor.reciprocal())
        return f"{leaf}_"

    return apply


def swapped(files: Files) -> str:
    name = files.one(rf"{UP}\.weight(_packed)?", rf"{EXPERT}\.weight(_packed)?")

    def swap(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.view(torch.uint8)
        return ((flat >> 4) | (flat << 4)).view(tensor.dtype)

    files.change(name, swap)
    return name.rpartition(".")[0]


def flipped(files: Files) -> str:
    """One byte among all codes of a weight: its noise is that of rounding."""
    name = files.one(rf"{UP}\.weight(_packed)?", rf"{EXPERT}\.weight(_packed)?")

    def flip(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8).view(-1)[5] ^= 0x77
        return tensor

    files.change(name, flip)
    return f"{name.rpartition('.')[0]}.weight: "


def exchanged(files: Files) -> str:
    """Two projections under each other's names: every shape fits."""
    both = [rf"{LAYER}.mlp.gate_proj.", rf"{UP}."]
    if not files.names(re.escape(both[1]) + ".*"):
        both = [EXPERT.replace("up_proj", "gate_proj") + ".", EXPERT + "."]
    one, other = ({leaf: files.shard(f"{p}{leaf}")[f"{p}{leaf}"] for leaf in leaves(files, p)} for p in both)
    for prefix, tensors in zip(both, (other, one), strict=True):
        for leaf, tensor in tensors.items():
            files.change(f"{prefix}{leaf}", lambda _, tensor=tensor: tensor.clone())
    return both[1].rstrip(".")


def leaves(files: Files, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in files.names(re.escape(prefix) + ".*")]


def other_kept(files: Files) -> str:
    name = "model.embed_tokens.weight"
    files.change(name, lambda tensor: tensor + 1)
    return name


def other_key(files: Files) -> str:
    files.config["rms_norm_eps"] *= 10
    return "rms_norm_eps is "


def exchanged_norms(files: Files) -> str:
    first, second = (f"{LAYER}.{leaf}_layernorm.weight" for leaf in ("input", "post_attention"))
    shard = files.shard(first)
    shard[first], shard[second] = shard[second].clone(), shard[first].clone()
    (files.folder / REPORT).unlink()
    return f"{first} (those of {second})"


def norm_alone(files: Files) -> str:
    name = f"{LAYER}.input_layernorm.weight"
    files.change(name, lambda tensor: tensor * torch.linspace(0.7, 1.4, tensor.numel()).to(tensor.dtype))
    (files.folder / REPORT).unlink()
    return "1 norms have other values"


def outside_alone(name: str, said: str) -> Callable[[Files], str]:
    """One of the tensors outside the blocks, of which an algorithm changes more than one."""

    def apply(files: Files) -> str:
        files.change(name, lambda tensor: tensor * 1.5)
        (files.folder / REPORT).unlink()
        return f"{said}{name.removesuffix('.weight') if 'norm' in said else name}"

    return apply


NORM_ALONE = "1 norms have other values, and the weights that read them are not scaled to match: "
OUTSIDE = "1 tensors outside the blocks have other values, and those beside them do not match: "


def not_left_out(files: Files) -> str:
    files.left_out.remove(next(entry for entry in files.left_out if "lm_head" in entry))
    return "lm_head"


def router_not_left_out(files: Files) -> str:
    files.left_out[:] = [entry for entry in files.left_out if "lm_head" in entry]
    return f"{LAYER}.mlp.gate"


def left_out_too(files: Files) -> str:
    module = UP if files.names(rf"{UP}\..*") else EXPERT
    files.left_out.append(module)
    return module


def without_attention(files: Files) -> str:
    """What is left out lacks the attention of every block."""
    for key in {"dynamic", "modules_to_not_convert"} & files.quantization.keys():
        listed = files.quantization[key]
        for entry in [text for text in listed if "q_proj" in text]:
            listed.remove(entry) if isinstance(listed, list) else listed.pop(entry)
    return f"{LAYER}.self_attn.q_proj"


def gptq_left_out_too(files: Files) -> str:
    files.quantization["dynamic"][r"-:.*\.up_proj$"] = {}
    return UP


def awq_left_out_too(files: Files) -> str:
    files.quantization["modules_to_not_convert"].append("up_pro")
    return UP


def other_head(files: Files) -> str:
    files.quantization["lm_head"] = True
    return "lm_head is true"


def pattern_too_wide(files: Files) -> str:
    files.left_out.append("re:.*up_proj$")
    return "up_proj"


def hole(files: Files) -> str:
    files.drop(f"{LAYER}.post_attention_layernorm.weight")
    return f"{LAYER}.post_attention_layernorm.weight"


def lost_module(files: Files) -> str:
    for leaf in leaves(files, f"{Q}."):
        files.drop(f"{Q}.{leaf}")
    return Q


def lost_experts(files: Files) -> str:
    for name in files.names(rf"{re.escape(LAYER)}\.mlp\.experts\.[23]\..*"):
        files.drop(name)
    return f"{LAYER}.mlp.experts"


def lost_projection(files: Files) -> str:
    for name in files.names(rf"{re.escape(EXPERT)}\..*"):
        files.drop(name)
    return EXPERT


def lost_layer(files: Files) -> str:
    for name in files.names(r"model\.layers\.1\..*"):
        files.drop(name)
    files.shards = {file: shard for file, shard in files.shards.items() if shard}
    for file in set(files.index["weight_map"].values()) - set(files.shards):
        (files.folder / file).unlink()
    return "1"


def two_schemes(files: Files) -> str:
    """One member of a fused group kept beside quantized ones."""
    module = f"{LAYER}.self_attn.k_proj"
    shard = files.shard(f"{module}.{leaves(files, module + '.')[0]}")
    for leaf in leaves(files, f"{module}."):
        if "output_scale" not in leaf:
            files.drop(f"{module}.{leaf}")
    rows = files.config["num_key_value_heads"] * files.config["head_dim"]
    shard[f"{module}.weight"] = torch.randn(rows, files.config["hidden_size"]).bfloat16()
    files.left_out.append(module)
    return "more than one scheme"


def two_files(files: Files) -> str:
    first, second = list(files.shards)[:2]
    name = next(iter(files.shards[first]))
    files.shards[second][name] = files.shards[first][name].clone()
    return name


def stray(files: Files) -> str:
    files.shard(f"{LAYER}.input_layernorm.weight")[f"{LAYER}.self_attn.adapter.weight"] = torch.zeros(4)
    return f"{LAYER}.self_attn.adapter.weight"


def stray_inside(files: Files) -> str:
    module = UP if files.names(rf"{UP}\..*") else EXPERT
    files.shard(f"{LAYER}.input_layernorm.weight")[f"{module}.smooth"] = torch.zeros(4)
    return f"{module}.smooth"


def stray_outside(files: Files) -> str:
    files.shard("model.norm.weight")["extra.weight"] = torch.zeros(4)
    return "extra.weight"


def absent_file(files: Files) -> str:
    name = next(iter(files.index["weight_map"]))
    files.index["weight_map"][name] = "model-00009-of-00009.safetensors"
    return "model-00009-of-00009.safetensors"


def absent_name(files: Files) -> str:
    files.index["weight_map"]["model.ghost.weight"] = next(iter(files.shards))
    return "model.ghost.weight"


def unnamed(files: Files) -> str:
    del files.index["weight_map"]["model.norm.weight"]
    return "model.norm.weight"


def wrong_total(files: Files) -> str:
    files.index["metadata"]["total_size"] += 2
    return "index"


def no_method(files: Files) -> str:
    del files.quantization["quant_method"]
    return "quant_method"


def other_method(files: Files) -> str:
    files.quantization["quant_method"] = "novel"
    return "novel"


def no_quantization(files: Files) -> str:
    del files.config["quantization_config"]
    return "quantization_config"


def no_scheme(files: Files) -> str:
    key = "config_groups" if "config_groups" in files.quantization else "global_quant_config"
    files.quantization[key] = {}
    return "quantiz"


def other_group(files: Files) -> str:
    """A group of half the size in the config: codes or scales do not fit it."""
    text = json.dumps(files.quantization)
    files.config["quantization_config"] = json.loads(re.sub(r'"group_size": (\d+)', halved, text))
    return "model.layers"


def halved(found: re.Match[str]) -> str:
    return f'"group_size": {int(found[1]) // 2}'


def lost_cache(leaf: str) -> Callable[[Files], str]:
    def apply(files: Files) -> str:
        name = files.one(rf"{LAYER}\.self_attn\.{leaf}_scale", rf"{LAYER}\.self_attn\.{leaf}_proj\.output_scale")
        files.drop(name)
        return f"{LAYER}.self_attn"

    return apply


def lost_caches(files: Files) -> str:
    for name in files.names(r".*\.(self_attn\.[kv]_scale|[kv]_proj\.output_scale)"):
        files.drop(name)
    return "scale"


def other_width(files: Files) -> str:
    files.config["intermediate_size"] *= 2
    files.config["moe_intermediate_size"] = files.config.get("moe_intermediate_size", 0) * 2
    return "proj"


DAMAGES = {
    "scale missing": Damage(dropped(*scales_of(UP))),
    "scale missing of 8 bits": Damage(without_scales, ("ct-fp8",)),
    "scale renamed": Damage(renamed),
    "scale zero": Damage(filled(0.0, *scales_of(UP)), (*DENSE, "ct-moe", "quark-int4")),
    "scale NaN": Damage(filled(float("nan"), *scales_of(UP))),
    "scale infinite": Damage(filled(float("inf"), *scales_of(UP)), ("ct-moe", "quark-int4", "ct-fp8")),
    "scale negative": Damage(filled(-1.0, *scales_of(UP)), (*DENSE, "ct-fp8")),
    "input scale zero": Damage(filled(0.0, rf"{UP}\.input.*"), (*DENSE, "ct-fp8")),
    "input scale missing": Damage(dropped(rf"{UP}\.input.*"), (*DENSE, "ct-fp8")),
    "global scale missing": Damage(dropped(rf"{UP}\.weight(_global_scale|_scale_2)"), DENSE),
    "global scale inverted": Damage(inverted("weight"), DENSE),
    "input global scale inverted": Damage(inverted("input"), DENSE),
    "global scales of a group unequal": Damage(unequal("weight"), DENSE),
    "codes missing": Damage(dropped(rf"{UP}\.weight(_packed)?", rf"{EXPERT}\.weight(_packed)?")),
    "codes that are NaN": Damage(nan_code, ("ct-fp8",)),
    "codes of another dtype": Damage(other_dtype),
    "codes of another shape": Damage(other_shape),
    "scale of another shape": Damage(cut_scale, (*DENSE, "ct-moe", "quark-int4", "quark-moe")),
    "norm of another shape": Damage(other_norm),
    "NaN in a norm": Damage(nan_norm),
    "nibbles swapped": Damage(swapped, source=True),
    "one byte of codes flipped": Damage(flipped, ("ct", "quark-int4", "ct-moe"), source=True),
    "projections exchanged": Damage(exchanged, source=True),
    "kept tensor of other values": Damage(other_kept, source=True),
    "norms exchanged, without a report": Damage(exchanged_norms, ("ct", "quark-moe"), source=True),
    "norm changed alone, without a report": Damage(norm_alone, ("ct", "ct-moe"), source=True),
    "last norm changed alone, without a report": Damage(
        outside_alone("model.norm.weight", NORM_ALONE), ("ct", "ct-moe"), source=True
    ),
    "embedding changed alone, without a report": Damage(
        outside_alone("model.embed_tokens.weight", OUTSIDE), ("quark",), source=True
    ),
    "head changed alone, without a report": Damage(outside_alone("lm_head.weight", OUTSIDE), ("ct",), source=True),
    "key of the config of another value": Damage(other_key, ("ct", "quark-moe"), source=True),
    "exclude entry dropped": Damage(not_left_out, (*DENSE, *MOE, "ct-fp8", "quark-int4")),
    "exclude entry of routers dropped": Damage(router_not_left_out, MOE),
    "exclude entry added": Damage(left_out_too),
    "exclude pattern too wide": Damage(pattern_too_wide),
    "attention not among the modules left out": Damage(without_attention, ("awq", "gptq")),
    "expression for a quantized module": Damage(gptq_left_out_too, ("gptq",)),
    "part of a quantized module's name": Damage(awq_left_out_too, ("awq",)),
    "head that is said to be quantized": Damage(other_head, ("awq", "gptq")),
    "norm missing": Damage(hole),
    "module missing": Damage(lost_module),
    "experts missing": Damage(lost_experts, MOE),
    "projection of an expert missing": Damage(lost_projection, MOE),
    "last layer missing": Damage(lost_layer),
    "two schemes in a fused group": Damage(two_schemes, ("ct-fp8", "quark-int4", "ct-moe")),
    "tensor in two files": Damage(two_files, ("ct", "quark-moe")),
    "unknown tensor in a block": Damage(stray),
    "unknown tensor of a module": Damage(stray_inside),
    "unknown tensor outside": Damage(stray_outside, ("ct", "quark-moe")),
    "index names an absent file": Damage(absent_file, ("ct", "quark-moe"), index=False),
    "index names an absent tensor": Damage(absent_name, ("ct", "quark-moe"), index=False),
    "index lacks a tensor": Damage(unnamed, ("ct", "quark-moe"), index=False),
    "index with a wrong total": Damage(wrong_total, ("ct", "quark-moe"), index=False),
    "config without quant_method": Damage(no_method, DENSE),
    "config of an unknown method": Damage(other_method, DENSE),
    "config without quantization": Damage(no_quantization, DENSE),
    "config without a scheme": Damage(no_scheme, DENSE),
    "config of another group size": Damage(other_group, ("ct-moe", "quark-int4", "quark-moe", *DENSE)),
    "config of another width": Damage(other_width),
    "key scale of the cache missing": Damage(lost_cache("k"), DENSE),
    "value scale of the cache missing": Damage(lost_cache("v"), DENSE),
    "scales of the cache missing": Damage(lost_caches, DENSE),
    "cut by tensor parallel": Damage(lambda files: "tensor parallel over", asked={"tensor_parallel": (1, 16)}),
    "below a limit of noise": Damage(lambda files: "400 dB", source=True, asked={"min_sqnr": 400.0}),
    "an unknown server": Damage(lambda files: "does not load", ("quark",), asked={"target": "transformers"}),
}
CASES = [pytest.param(kind, base, id=f"{kind}-{base}") for kind, damage in DAMAGES.items() for base in damage.on]


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_damage_is_found_and_named(kind: str, base: str, good: Mapping[str, Path], tmp_path: Path) -> None:
    damage, folder = DAMAGES[kind], tmp_path / "damaged"
    shutil.copytree(good[base], folder)
    files = Files(folder)
    named = damage.apply(files)
    files.write(index=damage.index)
    source = str(good[f"{base} source"]) if damage.source else None
    with pytest.raises(CheckError) as caught:
        verify.check(str(folder), Asked(source, **(damage.asked or {})))
    assert caught.value.code == ExitCode.CHECK
    assert named in str(caught.value)


@pytest.mark.parametrize("base", BASES)
def test_nothing_is_wrong_with_good_ones(base: str, good: Mapping[str, Path]) -> None:
    found = verify.check(str(good[base]), Asked(str(good[f"{base} source"]), tensor_parallel=(1,)))
    assert found[-1].startswith("all ")
    assert any(line.startswith("vLLM") and line.endswith("loads it") for line in found)


def test_without_an_index_transformers_finds_no_weights(good: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(good["ct"], tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    found = verify.check(str(tmp_path / "out"), Asked())
    assert any(line.startswith("vLLM") and line.endswith("loads it") for line in found)
    assert any("does not load it: it finds no weights" in line for line in found if line.startswith("transformers"))
    with pytest.raises(CheckError, match="neither an index nor one file"):
        verify.check(str(tmp_path / "out"), Asked(target="transformers"))


def test_a_cut_off_shard_is_named(good: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(good["ct"], tmp_path / "out")
    file = next((tmp_path / "out").glob("*block-00001*"))
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckError, match=re.escape(file.name)):
        verify.check(str(tmp_path / "out"), Asked())


def test_settings_that_people_change_are_told(good: Mapping[str, Path], tmp_path: Path) -> None:
    """What the model computes with must be the original's; names, lengths and the choice of tokens may differ."""
    shutil.copytree(good["ct"], tmp_path / "out")
    files = Files(tmp_path / "out")
    files.config |= {"transformers_version": "1", "max_position_embeddings": 512, "rope_scaling": None, "added": 1}
    files.write()
    source, told = good["ct source"], []
    verify.check(str(files.folder), Asked(str(source)), told.append)
    warned = [event.text for event in told if getattr(event, "level", "") == "warning"]
    assert len(warned) == 1 and warned[0].startswith("1 settings are not")
    assert "max_position_embeddings is 512 and was 256" in warned[0]


@pytest.mark.parametrize("algorithm", ["smoothquant", "rotation", "permutation"])
def test_without_a_report_rewritten_norms_are_no_damage(
    algorithm: str, good: Mapping[str, Path], tmp_path: Path
) -> None:
    """Norms that quark scaled, sorted, or left at ones, also small ones, beside weights that were changed with them."""
    source, data = tmp_path / "m", {"calib_data": "builtin", "calib_samples": 4, "calib_seqlen": 32}
    shutil.copytree(good["ct source"], source)
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        gains = {name: torch.logspace(-2, 0, len(t)).to(t.dtype) for name, t in tensors.items() if "norm" in name}
        save_file(tensors | gains, file, metadata={"format": "pt"})
    made = runs.run(source, tmp_path / "out", scheme="nvfp4", algorithm=algorithm, device="cpu", **data)
    for file in (MANIFEST, REPORT):
        (made.folder / file).unlink()
    found = verify.check(str(made.folder), Asked(str(source)))
    assert any(
        "there is no quark/report.json that tells the work of an algorithm from damage" in line for line in found
    )
    assert not any("because an algorithm rewrote them" in line for line in found)
