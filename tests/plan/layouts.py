"""Layouts of small made-up checkpoints, from names and shapes alone."""

from __future__ import annotations

from typing import Any

from quarkcli import family
from quarkcli.family import Layout
from quarkcli.plan.compose import Overrides
from quarkcli.plan.model import Plan
from quarkcli.plan.resolve import resolve
from quarkcli.recipe.recipe import Recipe, from_scheme
from tests.tiny import Header

Shapes = dict[str, tuple[int, ...]]


def attention(block: str, hidden: int) -> Shapes:
    narrow = {"q_proj": hidden, "k_proj": 64, "v_proj": 64}
    out: Shapes = {f"{block}.self_attn.{leaf}.weight": (rows, hidden) for leaf, rows in narrow.items()}
    return out | {f"{block}.self_attn.o_proj.weight": (hidden, hidden), f"{block}.input_layernorm.weight": (hidden,)}


def outside(hidden: int) -> Shapes:
    return {
        "model.embed_tokens.weight": (300, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (300, hidden),
    }  # fmt: skip


def llama(layers: int = 3, hidden: int = 128, inner: int = 256) -> Shapes:
    out = outside(hidden)
    for index in range(layers):
        block = f"model.layers.{index}"
        out |= attention(block, hidden)
        out |= {f"{block}.mlp.{leaf}_proj.weight": (inner, hidden) for leaf in ("gate", "up")}
        out[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
    return out


def mixtral(layers: int = 2, experts: int = 4, hidden: int = 128, inner: int = 256) -> Shapes:
    out = outside(hidden)
    for index in range(layers):
        block = f"model.layers.{index}"
        out |= attention(block, hidden)
        out[f"{block}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            prefix = f"{block}.block_sparse_moe.experts.{expert}"
            out |= {f"{prefix}.{leaf}.weight": (inner, hidden) for leaf in ("w1", "w3")}
            out[f"{prefix}.w2.weight"] = (hidden, inner)
    return out


def gpt_oss(layers: int = 2, experts: int = 4, hidden: int = 128, inner: int = 256) -> Shapes:
    out = outside(hidden)
    for index in range(layers):
        block = f"model.layers.{index}"
        out |= attention(block, hidden)
        out |= {f"{block}.mlp.router.weight": (experts, hidden), f"{block}.mlp.router.bias": (experts,)}
        out |= {f"{block}.self_attn.sinks": (4,)}
        prefix = f"{block}.mlp.experts"
        out |= {f"{prefix}.gate_up_proj": (experts, hidden, 2 * inner), f"{prefix}.down_proj": (experts, inner, hidden)}
        out |= {f"{prefix}.gate_up_proj_bias": (experts, 2 * inner), f"{prefix}.down_proj_bias": (experts, hidden)}
    return out


def lay_out(shapes: Shapes, model_type: str, **config: Any) -> Layout:
    headers = {name: Header("BF16", shape) for name, shape in shapes.items()}
    config = {"model_type": model_type, **config}
    return family.lay_out(*family.for_checkpoint(config, headers), config, headers)


LLAMA = lay_out(llama(), "llama")
MIXTRAL = lay_out(mixtral(), "mixtral")
GPT_OSS = lay_out(gpt_oss(), "gpt_oss")


def plan(recipe: Recipe | str, layout: Layout = LLAMA, **overrides: Any) -> Plan:
    made = from_scheme(recipe) if isinstance(recipe, str) else recipe
    return resolve(made, Overrides(**overrides), layout)


def decided(made: Plan, slot: str) -> str | None:
    """The element a slot ended with, None when it is off."""
    spec = dict(made.slots())[slot].spec
    return spec.element if spec else None


def origin(made: Plan, slot: str) -> str:
    entry = dict(made.slots())[slot].entry
    return str(made.entries[entry].origin) if entry is not None else ""


def weights(made: Plan) -> dict[str, str]:
    """Element by module of everything quantized."""
    return {target.name: target.weight.element for target in made.quantized() if target.weight}
