"""Every recipe that is shipped: it loads, resolves, and needs the data it speaks of.

The counterparts of ModelOpt's general recipes are held to what its own rules make of the lists that its documents and
runs of release 0.47 show: the lists stand here once more, and the resolver is written here once more (fnmatch on the
whole name, later wins, attributes replaced as a whole).
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from quarkcli import algorithms
from quarkcli.errors import ConfigError
from quarkcli.job.preflight import data_needs
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog
from quarkcli.recipe import recipe as recipes
from quarkcli.spec import PerGroup, PerTensor, TensorSpec
from tests.plan import layouts

UNITS = catalog.built_in_folder() / "units"
NAMES = sorted(catalog.files("ptq"))

Attributes = dict[str, Any]
Rule = tuple[str, Attributes | None, str | None]  # pattern, attributes or None for off, class


def qwen2_moe(layers: int = 2, experts: int = 4, hidden: int = 128, inner: int = 256) -> layouts.Shapes:
    out = layouts.outside(hidden)
    for index in range(layers):
        block = f"model.layers.{index}"
        out |= layouts.attention(block, hidden)
        out |= {f"{block}.mlp.gate.weight": (experts, hidden), f"{block}.mlp.shared_expert_gate.weight": (1, hidden)}
        for name in ("shared_expert", *(f"experts.{expert}" for expert in range(experts))):
            out |= {f"{block}.mlp.{name}.{leaf}_proj.weight": (inner, hidden) for leaf in ("gate", "up")}
            out[f"{block}.mlp.{name}.down_proj.weight"] = (hidden, inner)
    return out


LAYOUTS = {
    "llama": layouts.LLAMA,
    "mixtral": layouts.MIXTRAL,
    "qwen2_moe": layouts.lay_out(qwen2_moe(), "qwen2_moe"),
}


def planned(file: Path) -> dict[str, Plan]:
    """Layout -> plan, of the layouts that have what the recipe must find."""
    made = recipes.from_file(file)
    plans = {}
    for name, layout in LAYOUTS.items():
        try:
            plans[name] = layouts.plan(made, layout)
        except ConfigError as error:
            assert "experts_only" in file.stem and name == "llama", str(error)
    return plans


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_resolves_and_needs_the_data_it_says(name: str) -> None:
    file = catalog.find_recipe(name)
    made = recipes.from_file(file)
    assert made.name == name
    assert 20 < len(made.description) <= 100 and "\n" not in made.description
    assert made.notes == []  # nothing in it is left out
    plans = planned(file)
    # A recipe for experts refuses a model without, also where the cache would be quantized: ModelOpt's guard.
    assert set(plans) == set(LAYOUTS) - ({"llama"} if "experts_only" in name else set())
    for plan in plans.values():
        assert any(plan.quantized())
        assert bool(data_needs(plan, algorithms.pipeline(plan))) == ("no data" not in made.description)


def test_general_recipes_are_all_there() -> None:
    assert len(GENERAL) == 24
    assert set(GENERAL) <= set(NAMES)


@pytest.mark.parametrize(
    ("native", "general"),
    [
        ("nvfp4_experts_only-kv_fp8", "nvfp4_experts_only-kv_fp8_layerwise"),
        ("nvfp4_weight_only", "nvfp4_weight_only-kv_fp16"),
        ("fp8-kv_fp8", "fp8_default-kv_fp8"),
        ("nvfp4-kv_fp8", "nvfp4_default-kv_fp8"),
    ],
)
def test_native_twins_say_the_same(native: str, general: str) -> None:
    own, other = (planned(catalog.find_recipe(name)) for name in (native, general))
    for layout in ("mixtral", "qwen2_moe"):
        kept = dict(other[layout].slots())
        for slot, decision in own[layout].slots():
            assert decision.spec == kept[slot].spec, (layout, slot)


# --- presets ----------------------------------------------------------------------------------------------------------

PRESETS: dict[str, str] = yaml.safe_load((UNITS / "presets.yaml").read_text())
REFUSED = {
    "FP8_AFFINE_KV_CFG": "'bias' is not supported",
    "NVFP4_AFFINE_KV_CFG": "'bias' is not supported",
    "NVFP4_KV_ROTATE_CFG": "'rotate' is not supported",
    "NVFP4_SVDQUANT_DEFAULT_CFG": "'svdquant' is not supported",
}


def test_every_preset_has_its_constant() -> None:
    assert len(PRESETS) == 39
    files = {str(path.relative_to(UNITS).with_suffix("")) for path in UNITS.glob("configs/ptq/presets/*/*.yaml")}
    without = {"configs/ptq/presets/kv/fp8_cast", "configs/ptq/presets/kv/nvfp4_cast"}  # words of a script alone
    assert set(PRESETS.values()) == files - without


@pytest.mark.parametrize("constant", sorted(PRESETS))
def test_a_constant_is_a_recipe(constant: str) -> None:
    file = catalog.find_recipe(constant)
    assert file == UNITS / f"{PRESETS[constant]}.yaml"
    if constant in REFUSED:
        with pytest.raises(ConfigError) as caught:
            recipes.from_file(file)
        assert REFUSED[constant] in str(caught.value)
        return
    assert recipes.from_file(file).entries


# --- ModelOpt's lists and rules ---------------------------------------------------------------------------------------

FP8 = {"num_bits": "e4m3"}
NVFP4 = {"num_bits": "e2m1", "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": "e4m3"}}
STATIC = {"num_bits": "e2m1", "block_sizes": {-1: 16, "type": "static", "scale_bits": "e4m3"}}
WIDE = {"num_bits": "e2m1", "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": "e4m3"}}
MXFP4 = {"num_bits": "e2m1", "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": "e8m0"}}
INT4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
CAST = {"use_constant_amax": True}


def on(pattern: str, attributes: Attributes) -> list[Rule]:
    return [(pattern, attributes, None)]


def off(*patterns: str, of: str | None = None) -> list[Rule]:
    return [(pattern, None, of) for pattern in patterns]


def both(head: str, weight: Attributes, inputs: Attributes) -> list[Rule]:
    return on(f"{head}weight_quantizer", weight) + on(f"{head}input_quantizer", inputs)


def mlp(weight: Attributes) -> list[Rule]:
    heads = ("*mlp*", "*.mixer.up_proj.", "*.mixer.down_proj.", "*block_sparse_moe*")
    return [rule for head in heads for rule in both(head, weight, NVFP4)]


def experts(weight: Attributes, inputs: Attributes) -> list[Rule]:
    return both("*.experts.*", weight, inputs) + both("*block_sparse_moe*", weight, inputs)


def weights(attributes: Attributes, *heads: str) -> list[Rule]:
    return [rule for head in heads for rule in on(f"{head}weight_quantizer", attributes)]


def cache(attributes: Attributes) -> list[Rule]:
    return on("*[kv]_bmm_quantizer", attributes)


KV, KV_CAST = cache(FP8), cache(FP8 | CAST)
SWEEP = {"method": "mse", "fp8_scale_sweep": True}
HEADROOM = {"method": "nvfp4_act_headroom", "rho": 16384, "weight_scale_algorithm": {"method": "max"}}
ONE = NVFP4 | {"constant_amax": 2688}
# Name -> what stands between deny-all and the default list, the algorithm, and what comes last.
GENERAL: dict[str, tuple[list[Rule], Any, list[Rule]]] = {
    "fp8_default-kv_fp8": (both("*", FP8, FP8) + KV, "max", []),
    "fp8_default-kv_fp8_cast": (both("*", FP8, FP8) + KV_CAST, "max", []),
    "int4_blockwise_weight_only": (weights(INT4, "*") + off("*input_quantizer"), "max", []),
    "mxfp4_mlp_weight_only": (weights(MXFP4, "*mlp*", "*block_sparse_moe*"), None, []),
    "nvfp4_default-kv_fp8": (both("*", NVFP4, NVFP4) + KV, "max", []),
    "nvfp4_default-kv_fp8_cast": (both("*", NVFP4, NVFP4) + KV_CAST, "max", []),
    "nvfp4_act_headroom-kv_fp8_cast": (both("*", NVFP4, NVFP4) + KV_CAST, HEADROOM, []),
    "nvfp4_default-kv_nvfp4_cast": (both("*", NVFP4, NVFP4) + cache(NVFP4 | CAST), "max", []),
    "nvfp4_default-kv_none-gptq": (both("*", STATIC, NVFP4) + off("*[kv]_bmm_quantizer"), "gptq", []),
    "nvfp4_weight_only-kv_fp16": (weights(NVFP4, "*"), "max", []),
    "nvfp4_weight_only-kv_fp8_cast": (weights(NVFP4, "*") + KV_CAST, "max", []),
    "nvfp4_mlp_only-kv_fp8": (mlp(NVFP4) + both("*.experts.*", NVFP4, NVFP4) + KV, "max", []),
    "nvfp4_mlp_only-kv_fp8_cast": (mlp(NVFP4) + both("*.experts.*", NVFP4, NVFP4) + KV_CAST, "max", []),
    "nvfp4_mlp_only-novit-kv_fp8": (
        mlp(NVFP4) + both("*.experts.*", NVFP4, NVFP4) + KV, "max", off("*visual*", "*vision_tower*")
    ),
    "nvfp4_mlp_only_mse-kv_fp8_cast": (mlp(STATIC) + both("*.experts.*", STATIC, NVFP4) + KV_CAST, SWEEP, []),
    "nvfp4_mlp_weight_only": (weights(WIDE, "*mlp*", "*block_sparse_moe*"), "max", []),
    "nvfp4_omlp_only-kv_fp8": (mlp(NVFP4) + both("*o_proj*", NVFP4, NVFP4) + KV, "max", []),
    "nvfp4_omlp_only-kv_fp8_cast": (mlp(NVFP4) + both("*o_proj*", NVFP4, NVFP4) + KV_CAST, "max", []),
    "nvfp4_experts_only-kv_fp8": (experts(NVFP4, NVFP4) + KV, "max", []),
    "nvfp4_experts_only-kv_fp8_cast": (experts(NVFP4, NVFP4) + KV_CAST, "max", []),
    "nvfp4_experts_only-kv_fp8_layerwise": (experts(NVFP4, NVFP4) + KV, "max", []),
    "nvfp4_experts_only-kv_fp8_layerwise_offload": (experts(NVFP4, NVFP4) + KV, "max", []),
    "nvfp4_experts_only_input_scale1-kv_fp8_cast": (experts(NVFP4, ONE) + KV_CAST, "max", []),
    "nvfp4_experts_only_mse-kv_fp8_cast": (experts(STATIC, NVFP4) + KV_CAST, SWEEP, []),
}  # fmt: skip
DEFAULT_DISABLED = off(
    "*block_sparse_moe.gate*", "*linear_attn.conv1d*", "*self_attention.conv1d*", "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*", "*lm_head*", "*mixer.conv1d*", "*mlp.gate.*", "*mlp.shared_expert_gate.*",
    "*output_layer*", "*proj_out.*", "*router*", "mtp.*", "output.*", "*embed_vision*", "*vision_tower*", "*visual*",
    "*vision_model*", "*multi_modal_projector*",
) + [
    rule
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LeakyReLU", "Embedding")
    for rule in off("*", of=f"nn.{name}")
]  # fmt: skip
ELEMENTS = {"e4m3": "fp8_e4m3", "e2m1": "fp4_e2m1", 4: "int4"}


def rules(name: str) -> list[Rule]:
    between, _, last = GENERAL[name]
    return [*off("*"), *between, *DEFAULT_DISABLED, *last]


def decide(slot: str, listed: list[Rule]) -> Attributes | None:
    """What ModelOpt leaves a quantizer with; None when it is off."""
    parent = "nn.Embedding" if slot.startswith("model.embed_tokens.") else "nn.Linear"
    state: Attributes | None = None
    for pattern, attributes, of in listed:
        if fnmatchcase(slot, pattern) and of in (None, parent):
            state = attributes
    return state


def facts(spec: TensorSpec) -> dict[str, Any]:
    assert spec.scale is not None
    return {
        "element": spec.element,
        "granularity": spec.granularity,
        "scale": (spec.scale.dtype, spec.scale.rule, spec.scale.when),
        "global_scale": None
        if spec.scale.global_scale is None
        else (spec.scale.global_scale.dtype, spec.scale.global_scale.when),
        "amax": spec.scale.outermost.constant_amax,
        "observer": spec.observer.name,
    }


def expected(attributes: Attributes, slot: str, algorithm: Any) -> dict[str, Any]:
    """The numbers that attributes mean, as measured on release 0.47."""
    blocks = attributes.get("block_sizes", {})
    weight = slot.endswith("weight_quantizer")
    rule = "absmax"
    if blocks.get("scale_bits") == "e8m0":
        dtype, rule = "e8m0", "rceil"
    elif blocks.get("scale_bits") == "e4m3":
        dtype = "e4m3"
        rule = "sweep" if weight and algorithm == SWEEP else "absmax"
    else:
        dtype = "model" if attributes["num_bits"] == 4 else "f32"
    dynamic = blocks.get("type") == "dynamic" and not weight
    return {
        "element": ELEMENTS[attributes["num_bits"]],
        "granularity": PerGroup(blocks[-1]) if blocks else PerTensor(),
        "scale": (dtype, rule, "dynamic" if dynamic else "static"),
        "global_scale": ("f32", "static") if dtype == "e4m3" else None,
        "observer": "headroom" if slot.endswith("input_quantizer") and algorithm == HEADROOM else "min_max",
        "amax": 448.0 if attributes.get("use_constant_amax") else attributes.get("constant_amax"),
    }


def entries(listed: list[Rule]) -> Iterator[dict[str, Any]]:
    for pattern, attributes, of in listed:
        parent = {"parent_class": of} if of else {}
        yield {"quantizer_name": pattern, **parent, **({"cfg": attributes} if attributes else {"enable": False})}


def as_nvidia_writes_it(name: str, folder: Path) -> Path:
    """The recipe with every entry written out, in their words."""
    quantize = {"algorithm": GENERAL[name][1], "quant_cfg": list(entries(rules(name)))}
    text = yaml.safe_dump({"metadata": {"recipe_type": "ptq"}, "quantize": quantize}, sort_keys=False)
    path = folder / f"{name}.yml"
    path.write_text(f"# modelopt-schema: modelopt.recipe.config.ModelOptPTQRecipe\n{text}")
    return path


@pytest.mark.parametrize("name", sorted(GENERAL))
@pytest.mark.parametrize("written", [False, True], ids=["built-in", "written out"])
def test_the_plan_is_what_modelopt_makes(name: str, written: bool, tmp_path: Path) -> None:
    file = as_nvidia_writes_it(name, tmp_path) if written else catalog.find_recipe(name)
    listed, algorithm = rules(name), GENERAL[name][1]
    seen = 0
    for layout, plan in planned(file).items():
        for slot, decision in plan.slots():
            attributes = decide(slot, listed)
            seen += attributes is not None
            wanted = expected(attributes, slot, algorithm) if attributes else None
            assert (facts(decision.spec) if decision.spec else None) == wanted, (layout, slot)
    assert seen > 10
    assert [step for step, _ in recipes.from_file(file).algorithms] == (["gptq"] if algorithm == "gptq" else [])


def test_the_default_list_is_the_unit() -> None:
    unit = yaml.safe_load((UNITS / "configs/ptq/units/default_disabled_quantizers.yaml").read_text())
    assert [(e["quantizer_path"], e.get("parent_class")) for e in unit] == [(p, of) for p, _, of in DEFAULT_DISABLED]
    assert not any(entry["enable"] for entry in unit)
