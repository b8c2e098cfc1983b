"""Every format of the compressed-tensors dialect against the library: its presets, its compressors, our reader."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme

from quarkcli import dialects
from quarkcli.dialects import _kinds as kinds
from quarkcli.dialects._ct_kinds import INPUTS, OUTPUTS, WEIGHTS
from quarkcli.errors import ModelError
from quarkcli.numerics.quantize import Quantized, dequantize, quantize
from quarkcli.numerics.scales import decode_scale
from quarkcli.plan.model import Decision, Plan, Target
from quarkcli.spec import PerChannel, PerGroup, PerTensor, ScaleSpec, TensorSpec

from .plans import FP8, PAIRS, Module, Pair, linears, llama, moe, plan
from .test_roundtrip import TEXTS, bits, headers, same_within_one_ulp, weight_of

CT = dialects.writer("compressed-tensors")
BOTH = {"vllm", "transformers"}
# The library's presets by name, as kinds of weights (in groups of 128) and inputs.
PRESETS = {
    "FP8": ("fp8 tensor", "fp8 static"), "FP8_DYNAMIC": ("fp8 channel", "fp8 token"),
    "FP8_BLOCK": ("fp8 tile", "fp8 group"), "INT8": ("int8 channel", "int8 token"),
    "W2A16": ("int2 group", "none"), "W3A16": ("int3 group", "none"), "W4A16": ("int4 group", "none"),
    "W8A16": ("int8 group", "none"), "W4A16_ASYM": ("uint4 group", "none"),
    "W3A8": ("int3 group", "int8 token"), "W4A8": ("int4 group", "int8 token"), "W4A4": ("int4 group", "int4 token"),
    "W4AFP8": ("int4 group", "fp8 token"), "NVFP4": ("nvfp4", "nvfp4"), "NVFP4A16": ("nvfp4", "none"),
    "MXFP4": ("mxfp4", "mxfp4"), "MXFP4A16": ("mxfp4", "none"), "MXFP4XFP8": ("mxfp4", "fp8 group"),
    "MXFP6A16": ("mxfp6_e2m3", "none"), "MXFP6A8": ("mxfp6_e2m3", "mxfp8"), "MXFP8": ("mxfp8", "mxfp8"),
    "MXFP8A16": ("mxfp8", "none"),
}  # fmt: skip
# Packed here, because vLLM has no class for them unpacked; the library would leave these in 8 bits.
LEFT_UNPACKED = ("W3A8", "W4A8", "W4A4", "W4AFP8")


def pair(weight: str, source: str = "none", group: int = 128) -> Pair:
    dtype = "model" if "int" in weight else "f32"
    input_dtype = "model" if source.endswith("group") and "int" in source else "f32"
    return kinds.weight_spec(weight, dtype, group), kinds.input_spec(source, group=group, scale_dtype=input_dtype)


def one(specs: Pair, shape: tuple[int, int] = (40, 256), output: TensorSpec | None = None) -> tuple[Plan, Target]:
    made = plan([Module("m", shape, "up")], lambda module: specs)
    item = made.targets["m"]
    item.slots["output"] = Decision(output, 0)
    return made, item


def write(item: Target) -> tuple[Quantized, dict[str, torch.Tensor]]:
    assert item.weight is not None
    quantized = quantize(weight_of(item) + 0.25, item.weight)
    static = {"input": torch.tensor(0.0625), "output": torch.tensor(0.03)}
    return quantized, CT.tensors(item, quantized, static)


def scheme_of(made: Plan) -> QuantizationScheme:
    config = QuantizationConfig.model_validate(json.loads(json.dumps(CT.config(made))))
    scheme = config.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    return scheme


def local(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("m."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_the_arguments_are_those_of_the_preset(name: str) -> None:
    found, wanted = scheme_of(one(pair(*PRESETS[name]))[0]), preset_name_to_scheme(name, ["Linear"])
    fields = (
        "num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "block_structure", "scale_dtype",
    )  # fmt: skip
    for ours, theirs in ((found.weights, wanted.weights), (found.input_activations, wanted.input_activations)):
        assert (ours is None) == (theirs is None)
        for field in fields if theirs is not None else ():
            assert getattr(ours, field) == getattr(theirs, field), field
    inferred = infer_module_format(torch.nn.Linear, wanted).value
    if name in LEFT_UNPACKED:
        assert (found.format, inferred) in (("pack-quantized", "int-quantized"), ("pack-quantized", "naive-quantized"))
    else:  # without inputs the library calls the same layout naive
        assert found.format == inferred.replace("naive", "float")


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("shape", [(40, 256), (136, 384)])
def test_the_library_decompresses_to_our_values(weight: str, shape: tuple[int, int]) -> None:
    made, item = one(pair(weight), shape)
    quantized, tensors = write(item)
    scheme, state = scheme_of(made), local(tensors)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    assert set(compressor.compression_param_names(scheme)) == set(state)
    if state["weight_scale"].dtype == torch.bfloat16:
        state["weight_scale"] = state["weight_scale"].float()  # the library's result has the dtype of the scale
    found = compressor.decompress(state, scheme)["weight"].float()
    # The library expands blocks in bfloat16: exact for power-of-two scales, rounded under a global scale.
    tolerance = 2**-7 if item.weight.scale.global_scale else 0
    torch.testing.assert_close(found, dequantize(quantized, item.weight), rtol=tolerance, atol=0)


@pytest.mark.parametrize("weight", [kind for kind in WEIGHTS if kind not in kinds.TWO_LEVEL])
def test_the_library_compresses_to_our_tensors(weight: str) -> None:
    """From the values that the codes stand for, with our scales and zero points."""
    made, item = one(pair(weight))
    quantized, _ = write(item)
    if item.weight.element == "fp4_e2m1":  # the library rounds to 0.0 what we round to -0.0
        quantized.codes.masked_fill_(quantized.codes == 8, 0)
    tensors = CT.tensors(item, quantized, {})
    scheme, params = scheme_of(made), quantized.params
    values = dequantize(quantized, item.weight)
    state = {"weight": values, "weight_scale": decode_scale(params.scale, item.weight.scale.dtype)}
    if params.zero_point is not None:  # the library counts from the lowest signed code
        state["weight_zero_point"] = (params.zero_point.int() - 2 ** (item.weight.format.bits - 1)).to(torch.int8)
    found = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
    for name, tensor in local(tensors).items():
        if name == "weight_scale" and tensor.is_floating_point():
            continue
        assert found[name].shape == tensor.shape and torch.equal(bits(found[name]), bits(tensor)), name


CASES = [(weight, "none", None) for weight in WEIGHTS]
CASES += [(weight, source, None) for weight in ("int4 group", "int8 channel", "fp8 tile") for source in INPUTS]
CASES += [("int4 channel", "int8 static", output) for output in OUTPUTS] + [("fp8 channel", "none", "fp8 static")]


@pytest.mark.parametrize(("weight", "source", "output"), CASES)
def test_what_is_written_is_read_back(weight: str, source: str, output: str | None) -> None:
    made, item = one(pair(weight, source), output=kinds.input_spec(output) if output else None)
    assert CT.refusals(made) == []
    quantized, tensors = write(item)
    assert [(info.name, info.dtype, info.shape) for info in CT.infos(item)] == [
        (name, TEXTS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    stored = CT.reader.view(json.loads(json.dumps(CT.config(made))), headers(tensors)).targets["m"]
    assert (stored.weight, stored.input, stored.output, stored.shape) == (
        item.weight, item.input, item.output, item.shape,
    )  # fmt: skip
    decoded = CT.reader.decode(stored, tensors)
    assert decoded.weight.codes.dtype == quantized.codes.dtype
    assert torch.equal(bits(decoded.weight.codes), bits(quantized.codes))
    for name in ("scale", "zero_point"):
        found, wanted = getattr(decoded.weight.params, name), getattr(quantized.params, name)
        assert (found is None) == (wanted is None)
        assert found is None or (found.shape == wanted.shape and torch.equal(bits(found), bits(wanted)))
    same_within_one_ulp(decoded.weight.params.global_scale, quantized.params.global_scale)
    same_within_one_ulp(decoded.input, torch.tensor(0.0625) if item.input and item.input.is_static else None)
    same_within_one_ulp(decoded.output, torch.tensor(0.03) if item.output and item.output.is_static else None)


@pytest.mark.parametrize(
    ("weight", "names"),
    [
        ("int4 group", {"pack-quantized"}),
        ("nvfp4", {"nvfp4-pack-quantized"}),
        ("fp8 channel", {"float-quantized", "naive-quantized", "int-quantized", "mxfp8-quantized"}),
    ],
)
def test_a_format_by_which_servers_do_not_find_the_codes_is_refused(weight: str, names: set[str]) -> None:
    made, item = one(pair(weight))
    found, config = headers(write(item)[1]), json.loads(json.dumps(CT.config(made)))
    for name in [None, *(entry.value for entry in CompressionFormat)]:
        config["config_groups"]["group_0"]["format"], config["format"] = None, name
        if name in {None, "mixed-precision", *names}:
            assert CT.reader.view(config, found).targets
            continue
        with pytest.raises(ModelError, match=f"says format '{name}'"):
            CT.reader.view(config, found)
    config["format"] = None
    assert CT.config_faults(config, "transformers") == []
    del config["quantization_status"]
    assert "it looks for no codes" in CT.config_faults(config, "transformers")[0]
    assert CT.config_faults(config, "vllm") == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (kinds.weight_spec("mxfp6_e3m2"), "fp6_e3m2 group 32"),
        (kinds.weight_spec("fp8_e5m2 tensor"), "fp8_e5m2 tensor"),
        (kinds.weight_spec("mx6", group=16), "mx6 group 16"),
        (kinds.weight_spec("amdfp4", group=16), "fp4_e2m1 group 16, e5m3"),
        (kinds.weight_spec("fp8 tensor then int4 channel"), "then int4 channel 0"),
        (kinds.weight_spec("int4 tensor"), "int4 tensor"),
        (kinds.weight_spec("uint8 tensor"), "uint8 tensor"),
        (kinds.weight_spec("bf16"), "bf16"),
        (TensorSpec("int4", PerGroup(32), ScaleSpec("f32"), zero_point="float"), "float zero point"),
        (TensorSpec("fp8_e4m3", PerChannel(1), ScaleSpec("f32")), "channel 1"),
    ],
)
def test_what_the_library_cannot_say_is_refused(spec: TensorSpec, words: str) -> None:
    (sentence,) = CT.refusals(one((spec, None))[0])
    assert sentence.startswith("m: compressed-tensors cannot hold weight ") and words in sentence


def test_slots_without_a_place_are_refused() -> None:
    made, _ = one(PAIRS["fp8"], output=kinds.input_spec("mxfp4"))
    assert "no place for a quantized output" in CT.refusals(made)[0]
    cached = plan(llama(), linears(PAIRS["fp8"]), kv=FP8)
    for module in cached.attention.values():
        module.slots["p"] = Decision(FP8, 0)
    assert "attention p" in CT.refusals(cached)[0]


def test_a_scale_of_q_is_for_vllm_alone() -> None:
    made = plan(llama(layers=1), linears(PAIRS["fp8"]), kv=FP8)
    (module,) = made.attention.values()
    module.slots["q"] = Decision(FP8, 0)
    assert CT.loaders(made) == {"vllm"}
    tensors = CT.attention_tensors(module, {kind: torch.tensor(0.5 + n) for n, kind in enumerate("kqv")})
    assert list(tensors) == [info.name for info in CT.attention_infos(module)]
    view = CT.reader.view(CT.config(made), headers(tensors))
    (stored,) = view.attention.values()
    assert stored.specs == dict.fromkeys("kqv", FP8)
    assert {kind: float(scale) for kind, scale in CT.reader.decode_attention(stored, tensors).items()} == {
        "k": 0.5, "q": 1.5, "v": 2.5,
    }  # fmt: skip
    module.slots.update(k=Decision(None, None), v=Decision(None, None))
    assert "both must be quantized" in CT.refusals(made)[0]


def test_an_embedding_is_a_group_of_its_own_and_loads_where_it_keeps_its_shape() -> None:
    inside = linears(PAIRS["fp8"])
    for weight, loaders in (("fp8 channel", {"transformers"}), ("int4 group", set())):
        specs = pair(weight, group=32)
        made = plan(llama(), lambda m, specs=specs: specs if m.role == "embedding" else inside(m))
        groups = CT.config(made)["config_groups"].values()
        (own,) = [group for group in groups if group["targets"] == ["model.embed_tokens"]]
        assert own["input_activations"] is None
        assert CT.loaders(made) == loaders
    alone = plan(llama(), lambda m: pair("int8 channel") if m.role != "head" else None)
    assert CT.config(alone)["config_groups"]["group_0"]["targets"] == ["Linear", "model.embed_tokens"]


WIDE = {"hidden": 256, "mlp": 256, "kv": 128}


@pytest.mark.parametrize(
    ("weight", "source", "loaders"),
    [
        ("uint4 group", "none", {"vllm"}),  # transformers: another shape of zero points, unless told to dequantize
        ("uint4 channel", "none", {"vllm"}),
        ("int3 group", "none", BOTH),
        ("int4 group", "fp8 token", BOTH),
        ("int4 channel", "fp8 token", {"transformers"}),
        ("int4 group", "int8 token", BOTH),
        ("int4 group", "int4 group", BOTH),
        ("int4 group", "int8 static", {"transformers"}),
        ("int8 channel", "uint8 token", BOTH),
        ("int8 channel", "int4 token", {"transformers"}),
        ("fp8 tile", "fp8 group", BOTH),
        ("fp8 tile", "fp8 token", {"transformers"}),
        ("fp8 channel", "int8 token", {"transformers"}),
        ("mxfp4", "fp8 group", BOTH),
        ("mxfp4", "fp8 static", {"transformers"}),
        ("mxfp4", "mxfp6_e2m3", {"transformers"}),
        ("mxfp6_e2m3", "mxfp6_e2m3", {"transformers"}),
        ("mxfp8", "mxfp8", BOTH),
        ("nvfp4", "fp8 static", {"transformers"}),
    ],
)
def test_loaders_of_dense_models(weight: str, source: str, loaders: set[str]) -> None:
    assert CT.loaders(plan(llama(**WIDE), linears(pair(weight, source)))) == loaders


def test_shapes_and_groups_that_vllm_does_not_fuse() -> None:
    def loads(weight: str, source: str = "none", kv: int = 128, group: int = 128) -> bool:
        return "vllm" in CT.loaders(plan(llama(**{**WIDE, "kv": kv}), linears(pair(weight, source, group))))

    assert loads("fp8 tile", "fp8 group") and not loads("fp8 tile", "fp8 group", kv=64)
    assert loads("uint4 group") and not loads("uint4 group", kv=12)
    assert loads("int4 group", "fp8 token") and not loads("int4 group", "fp8 token", group=64)


def test_vllm_quantizes_outputs_of_single_modules_only() -> None:
    def loaders(roles: str, output: str) -> set[str]:
        made = plan(llama(**WIDE), linears(pair("int4 group", "int8 static")))
        for item in made.targets.values():
            if item.role in roles.split():
                item.slots["output"] = Decision(kinds.input_spec(output), 0)
            else:
                item.slots["weight"] = Decision(None, 0)
        assert CT.refusals(made) == []
        return CT.loaders(made)

    assert loaders("o down", "int8 static") == BOTH
    assert loaders("o down", "fp8 static") == {"transformers"}
    assert loaders("q k v", "int8 static") == {"transformers"}


@pytest.mark.parametrize(
    ("weight", "source", "loaders"),
    [
        ("uint4 group", "none", {"vllm"}),
        ("int2 group", "none", {"transformers"}),
        ("int4 group", "fp8 token", BOTH),
        ("int4 group", "int8 token", {"transformers"}),
        ("int8 group", "none", BOTH),
        ("fp8 tile", "fp8 group", {"vllm"}),  # transformers multiplies by the tiles' scales as they are
        ("mxfp6_e2m3", "mxfp6_e2m3", {"transformers"}),
        ("mxfp8", "mxfp8", {"vllm"}),
        ("fp8 channel", "nvfp4", set()),
        ("int8 tensor", "none", set()),
    ],
)
def test_loaders_of_expert_models(weight: str, source: str, loaders: set[str]) -> None:
    modules = [m for m in moe(hidden=256, inner=256) if m.role not in ("k", "v", "q")]
    made = plan(modules, linears(pair(weight, source)))
    assert CT.loaders(made) == loaders
    warnings = dialects.warnings(CT, made)
    assert len(warnings) == ("vllm" not in loaders)
    assert all(("only transformers can" if loaders else "for measurements only") in warning for warning in warnings)
    assert dialects.choose("compressed-tensors", made) == [CT]
    reason = dialects.reason(CT, made, auto=False)
    assert ("no server loads it; for measurements only" in reason) == (not loaders)


def test_short_names_are_told_from_specs_and_back() -> None:
    shorts = ("int2", "int3", "int4", "int8", "uint2", "uint4", "uint8", "fp8", "fp8_e5m2")
    plain = [f"{short} {where}" for short in shorts for where in ("tensor", "channel", "group", "tile")]
    for kind in [*plain, *kinds.BLOCKS, "fp16", "fp8 tensor then int4 channel"]:
        assert kinds.weight_kind(kinds.weight_spec(kind, group=16)) == kind
    for kind in [*(f"{s} {how}" for s in shorts for how in ("static", "tensor", "token")), *kinds.BLOCKS, "none"]:
        assert kinds.input_kind(kinds.input_spec(kind, group=16)) == kind
    assert kinds.input_kind(kinds.input_spec("fp8 group")) == "fp8 group"
    assert kinds.input_kind(TensorSpec("fp8_e4m3", PerGroup(64), ScaleSpec("f32", when="dynamic"))) is None
    assert kinds.weight_kind(TensorSpec("uint4", PerTensor(), ScaleSpec("f32"))) is None  # no zero point
