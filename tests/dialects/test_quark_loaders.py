"""Who loads what the quark dialect writes: vLLM 0.32's classes and transformers 5.23 with amd-quark, as tried."""

from __future__ import annotations

import pytest

from quarkcli import dialects

from .plans import FP8, INT8_TENSOR, NVFP4_INPUT, PAIRS, linears, llama, moe, plan
from .test_quark import with_attention
from .test_quark_roundtrip import SCHEMES, slotted

QUARK = dialects.writer("quark")
BOTH = {"vllm", "transformers"}

# (dense, routed experts). transformers: one scale per tensor; it keeps experts fused.
LOADS: dict[str, tuple[set[str], set[str]]] = {
    "fp8": (BOTH, {"vllm"}),
    "ptpc_fp8": (BOTH, {"vllm"}),
    "fp8_block128": (BOTH, {"vllm"}),
    "int8": (BOTH, {"vllm"}),
    "int8_dynamic": (BOTH, {"vllm"}),
    "int4_wo_32": (BOTH, {"vllm"}),
    "uint4_wo_64": (BOTH, {"vllm"}),
    "int4_wo_per_channel": ({"transformers"}, set()),
    "uint4_wo_per_channel": ({"transformers"}, set()),
    "int4_wa_64": ({"transformers"}, set()),
    "mxfp4": (BOTH, {"vllm"}),
    "mxfp4_weight_only": (BOTH, {"vllm"}),
    "mxfp4_fp8": (BOTH, {"vllm"}),
    "mxfp4_mxfp6_e2m3": (BOTH, {"vllm"}),
    "mxfp6_e3m2": (BOTH, {"vllm"}),
    "mxfp6_e2m3": (BOTH, {"vllm"}),
    "mxfp8": ({"vllm"}, set()),
    "nvfp4": ({"vllm"}, {"vllm"}),
    "nvfp4_weight_only": (set(), set()),
    "nvfp4_fp8": (set(), set()),
    "int4_fp8": (set(), set()),
    "amdfp4": ({"transformers"}, set()),
    "amdfp4_global16": (set(), set()),
    "mx6": (set(), set()),
    "mx9": (set(), set()),
    "bfp16": (set(), set()),
    "mxint8": (set(), set()),
    "int2_wo_128": (set(), set()),
    "int3_wo_128": (set(), set()),
}


@pytest.mark.parametrize("scheme", LOADS)
def test_loaders(scheme: str) -> None:
    dense, experts = LOADS[scheme]
    assert QUARK.loaders(plan(llama(hidden=128, mlp=256, kv=128), linears(SCHEMES[scheme]))) == dense
    # A router beside them is not quantized; the attention of the model is dense.
    routed = plan(moe(hidden=128, inner=256), lambda m: SCHEMES[scheme] if m.expert else None)
    assert QUARK.loaders(routed) == experts


@pytest.mark.parametrize(
    ("scheme", "loaders"),
    [("fp8-weight-only", {"transformers"}), ("int8-channel", {"transformers"}), ("fp8-token", BOTH)],
)
def test_other_loaders(scheme: str, loaders: set[str]) -> None:
    assert QUARK.loaders(plan(llama(), linears(PAIRS[scheme]))) == loaders


def test_a_fused_linear_needs_whole_tiles() -> None:
    made = plan(llama(hidden=128, mlp=192, kv=128), linears(SCHEMES["fp8_block128"]))
    assert QUARK.refusals(made) != []  # 192 input features are not groups of 128
    ragged = plan(llama(hidden=128, mlp=256, kv=64), linears(SCHEMES["fp8_block128"]))
    assert (QUARK.refusals(ragged), QUARK.loaders(ragged)) == ([], set())


def test_a_quantized_head_does_not_load_in_vllm() -> None:
    made = plan(llama(), lambda m: None if m.role == "embedding" else PAIRS["fp8"])
    assert QUARK.loaders(made) == {"transformers"}


def test_no_server_reads_quantized_outputs_and_biases() -> None:
    made = plan(llama(), linears(PAIRS["fp8"]))
    assert QUARK.loaders(slotted(made, output=FP8)) == QUARK.loaders(slotted(made, bias=INT8_TENSOR)) == set()


@pytest.mark.parametrize(
    ("kinds", "loaders"),
    [("kv", BOTH), ("qkv", {"vllm"}), ("qkvp", {"vllm"}), ("q", set()), ("p", set()), ("k", {"transformers"})],
)
def test_loaders_of_attention(kinds: str, loaders: set[str]) -> None:
    assert QUARK.loaders(with_attention(dict.fromkeys(kinds, FP8))) == loaders
    assert QUARK.loaders(with_attention(dict.fromkeys(kinds, NVFP4_INPUT))) == set()
