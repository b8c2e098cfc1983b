"""Small plans for dialect tests, built by hand from names, shapes and specs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from quarkcli.family import WeightView
from quarkcli.plan.model import ATTENTION_KINDS, TARGET_KINDS, Attention, Decision, Part, Plan, Target
from quarkcli.spec import PerChannel, PerGroup, PerTensor, PerTile, PerToken, ScaleSpec, TensorSpec

Pair = tuple[TensorSpec, TensorSpec | None]
OFF = Decision(None, None)


def int4(group: int = 32, dtype: str = "model") -> TensorSpec:
    return TensorSpec("int4", PerGroup(group), ScaleSpec(dtype, "half_range"))


INT4_CHANNEL = TensorSpec("int4", PerChannel(0), ScaleSpec("model", "half_range"))
INT8_TENSOR = TensorSpec("int8", PerTensor(), ScaleSpec("f32", "half_range"))
INT8_CHANNEL = TensorSpec("int8", PerChannel(0), ScaleSpec("f32", "half_range"))
INT8_TOKEN = TensorSpec("int8", PerToken(), ScaleSpec("f32", "half_range", "dynamic"))
FP8 = TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32"))
FP8_CHANNEL = TensorSpec("fp8_e4m3", PerChannel(0), ScaleSpec("f32"))
FP8_TOKEN = TensorSpec("fp8_e4m3", PerToken(), ScaleSpec("f32", "absmax", "dynamic"))
FP8_ANY = TensorSpec("fp8_e4m3", PerTensor(), ScaleSpec("f32", "absmax", "dynamic"))
MXFP4 = TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even"))
MXFP4_INPUT = TensorSpec("fp4_e2m1", PerGroup(32), ScaleSpec("e8m0", "even", "dynamic"))
MXFP8 = TensorSpec("fp8_e4m3", PerGroup(32), ScaleSpec("e8m0", "rceil"))
MXFP8_INPUT = TensorSpec("fp8_e4m3", PerGroup(32), ScaleSpec("e8m0", "rceil", "dynamic"))
FP8_TILE = TensorSpec("fp8_e4m3", PerTile(128, 128), ScaleSpec("f32"))
FP8_GROUP = TensorSpec("fp8_e4m3", PerGroup(128), ScaleSpec("f32", "absmax", "dynamic"))
NVFP4 = TensorSpec("fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", global_scale=ScaleSpec("f32")))
NVFP4_INPUT = TensorSpec(
    "fp4_e2m1", PerGroup(16), ScaleSpec("e4m3", "absmax", "dynamic", global_scale=ScaleSpec("f32"))
)

# What both dialects hold, by name.
PAIRS: dict[str, Pair] = {
    "int4-32": (int4(32), None),
    "int4-64-f32": (int4(64, "f32"), None),
    "int8-channel": (INT8_CHANNEL, None),
    "int8-tensor": (INT8_TENSOR, None),
    "int8-static": (INT8_TENSOR, INT8_TENSOR),
    "int8-token": (INT8_CHANNEL, INT8_TOKEN),
    "fp8-weight-only": (FP8, None),
    "fp8": (FP8, FP8),
    "fp8-token": (FP8, FP8_TOKEN),
    "fp8-any": (FP8, FP8_ANY),
    "ptpc": (FP8_CHANNEL, FP8_TOKEN),
    "fp8-channel-static": (FP8_CHANNEL, FP8),
    "mxfp4-weight-only": (MXFP4, None),
    "mxfp4": (MXFP4, MXFP4_INPUT),
    "nvfp4-weight-only": (NVFP4, None),
    "nvfp4": (NVFP4, NVFP4_INPUT),
}


@dataclass(frozen=True)
class Module:
    """A module of a made-up model: `experts` are the prefix and index of a routed expert."""

    name: str
    shape: tuple[int, int]
    role: str
    expert: tuple[str, int] | None = None
    group: str | None = None
    view: WeightView | None = None


def target(module: Module, pair: Pair | None, dtype: str = "BF16") -> Target:
    weight, source = pair or (None, None)
    slots = dict.fromkeys(TARGET_KINDS, OFF)
    slots |= {"weight": Decision(weight, 0), "input": Decision(source, 0)}
    view = module.view or WeightView(f"{module.name}.weight")
    return Target(
        module.name, view, module.shape, dtype, module.role, 0, None, module.group or module.name, module.expert, None,
        parent_class="nn.Embedding" if module.role == "embedding" else "nn.Linear", slots=slots,
    )  # fmt: skip


def attention(name: str, kv: TensorSpec | None) -> Attention:
    slots = {kind: Decision(kv if kind in "kv" else None, None) for kind in ATTENTION_KINDS}
    return Attention(name, 0, f"{name}.k_proj", f"{name}.v_proj", slots)


def plan(
    modules: Iterable[Module],
    choose: Callable[[Module], Pair | None],
    *,
    kv: TensorSpec | None = None,
    tied_head: str | None = None,
) -> Plan:
    """A plan of one part; routers, embedding and head are quantized only when `choose` says so."""
    targets = {module.name: target(module, choose(module)) for module in modules}
    blocks = dict.fromkeys(m.group(1) for name in targets if (m := re.match(r"(.*\.self_attn)\.k_proj$", name)))
    return Plan(
        scheme="test",
        family="test",
        entries=[],
        parts=[Part(0, "all", "rest", None, tuple(f"{name}.weight" for name in targets))],
        targets=targets,
        attention={name: attention(name, kv) for name in blocks},
        sites={},
        kept={},
        algorithms=[],
        matches=[],
        tied_head=tied_head,
    )


def llama(layers: int = 2, hidden: int = 64, mlp: int = 96, kv: int = 32, vocab: int = 128) -> list[Module]:
    """Linears of a Llama with embedding and head. 96 gives an odd number of groups of 32."""
    found = [Module("model.embed_tokens", (vocab, hidden), "embedding")]
    for index in range(layers):
        block = f"model.layers.{index}"
        found += attention_modules(block, hidden, kv)
        found += [
            Module(f"{block}.mlp.gate_proj", (mlp, hidden), "gate", group=f"{block}.mlp.gate_up"),
            Module(f"{block}.mlp.up_proj", (mlp, hidden), "up", group=f"{block}.mlp.gate_up"),
            Module(f"{block}.mlp.down_proj", (hidden, mlp), "down"),
        ]
    return [*found, Module("lm_head", (vocab, hidden), "head")]


def attention_modules(block: str, hidden: int, kv: int) -> list[Module]:
    group = f"{block}.self_attn.qkv"
    return [
        Module(f"{block}.self_attn.q_proj", (hidden, hidden), "q", group=group),
        Module(f"{block}.self_attn.k_proj", (kv, hidden), "k", group=group),
        Module(f"{block}.self_attn.v_proj", (kv, hidden), "v", group=group),
        Module(f"{block}.self_attn.o_proj", (hidden, hidden), "o"),
    ]


def moe(
    layers: int = 2, experts: int = 4, hidden: int = 64, inner: int = 96, *, mixtral: bool = False, fused: bool = False
) -> list[Module]:
    """Linears of a Qwen3-MoE (or Mixtral, in its file's names); `fused`: the file stores experts as 3-D tensors."""
    path, router, names = ("mlp", "mlp.gate", ("gate_proj", "up_proj", "down_proj"))
    if mixtral:
        path, router, names = ("block_sparse_moe", "block_sparse_moe.gate", ("w1", "w3", "w2"))
    found = [Module("model.embed_tokens", (128, hidden), "embedding")]
    for layer in range(layers):
        block = f"model.layers.{layer}"
        prefix = f"{block}.{path}.experts"
        found += [*attention_modules(block, hidden, 32), Module(f"{block}.{router}", (experts, hidden), "router")]
        for index in range(experts):
            for name, role in zip(names, ("expert_gate", "expert_up", "expert_down"), strict=True):
                shape = (hidden, inner) if role == "expert_down" else (inner, hidden)
                group = f"{prefix}.{index}.{name if role == 'expert_down' else 'gate_up'}"
                view = WeightView(f"{prefix}.{name}", index) if fused else None
                found.append(Module(f"{prefix}.{index}.{name}", shape, role, (prefix, index), group, view))
    return [*found, Module("lm_head", (128, hidden), "head")]


def linears(pair: Pair) -> Callable[[Module], Pair | None]:
    """The usual choice: everything but embedding, head and routers."""
    return lambda module: None if module.role in ("embedding", "head", "router") else pair
