"""A family guessed from tensor names, by the leaf names that published models use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quarkcli.errors import ModelError
from quarkcli.family.schema import AttentionModel, ExpertsModel, FamilyModel, FusedModel, HeaderLike

# Projections of one attention module: (q, k, v) by their leaf names, most telling first; fused ones have one name.
ATTENTION = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_b_proj", "kv_b_proj", "kv_b_proj"),
    ("q_proj", "kv_b_proj", "kv_b_proj"),
    *((fused, fused, fused) for fused in ("qkv_proj", "query_key_value", "Wqkv", "wqkv", "c_attn")),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
)
# Linears below one module that read one activation and that servers fuse.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "q_proj", "kv_a_proj_with_mqa"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
# (gate, up, down) of experts.
EXPERTS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("linear", "linear_v", "linear_1"),
    (None, "up_proj", "down_proj"),
)
ROLES = {
    "q": ["*.q_proj", "*.wq"],
    "k": ["*.k_proj", "*.wk"],
    "v": ["*.v_proj", "*.wv"],
    "o": ["*.o_proj", "*.out_proj", "*.wo"],
    "gate": ["*.gate_proj"],
    "up": ["*.up_proj"],
    "down": ["*.down_proj"],
    "norm": ["*norm*", "*.ln_*"],
    "router": ["*.gate", "*.router", "*.router.*", "*.gate.wg"],
    "conv": ["*conv*"],
    "gates": ["*.shared_expert_gate"],
    "vision": ["*visual*", "*vision*"],
    "audio": ["*audio*"],
    "projector": ["*projector*"],
    "mtp": ["mtp.*", "*.mtp.*"],
}


def infer(headers: Mapping[str, HeaderLike]) -> FamilyModel:
    """The numbered path with the most matrices, and what its usual leaf names say. Raises ModelError without one."""
    blocks = _blocks(headers)
    stem = blocks.rpartition(".")[0]
    outside = [name.removesuffix(".weight") for name in headers if not name.startswith(blocks + ".")]
    embed = [
        name for name in outside if "embed" in name.rsplit(".", 1)[-1] or name.endswith(("wte", "word_embeddings"))
    ]
    tail = [
        name
        for name in outside
        if name.endswith(("lm_head", "norm", "ln_f", "output", "output_layer", "norm_f")) and name not in embed
    ]
    inside = list(dict.fromkeys(_below(headers, blocks)))
    linears = [leaf.removesuffix(".weight") for leaf in inside if leaf.endswith(".weight")]
    heads = [name for name in tail if name.endswith(("lm_head", "output", "output_layer"))]
    return FamilyModel(
        blocks=blocks,
        embed=embed or [f"{stem}.embed_tokens"],
        tail=tail,
        roles={"embedding": embed or ["*embed*"], "head": heads or ["*lm_head"], **ROLES},
        attention=_attention(linears),
        sites=_sites(linears),
        experts=_experts(inside),
    )


def guess(config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> tuple[FamilyModel, str]:
    """The inferred family with the config's names, for a user to keep; and a comment for the file."""
    found = infer(headers)
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    names = {"architectures": list(architectures), "model_types": [model_type] if model_type else []}
    text = (
        "Guessed from tensor names. Check the roles, what shares an input (sites) and how fused tensors are split,\n"
        "then keep it as models/<name>.yaml in the user folder."
    )
    return found.model_copy(update=names), text


def _blocks(headers: Mapping[str, HeaderLike]) -> str:
    counts: dict[str, int] = {}
    for name, header in headers.items():
        found = re.match(r"(.*?)\.\d+\.", name)
        if found and len(header.shape) == 2:
            counts[found[1]] = counts.get(found[1], 0) + 1
    if not counts:
        raise ModelError("no numbered decoder blocks among the tensor names", hint="describe the family in YAML")
    return max(counts, key=lambda path: counts[path])


def _below(headers: Iterable[str], blocks: str) -> Iterable[str]:
    """Names below the block, each block's number taken out."""
    start = re.compile(re.escape(blocks) + r"\.\d+\.")
    for name in headers:
        found = start.match(name)
        if found:
            yield name[found.end() :]


def _modules(linears: Iterable[str]) -> dict[str, set[str]]:
    """Module below the block -> leaf names of its linears."""
    found: dict[str, set[str]] = {}
    for linear in linears:
        module, _, leaf = linear.rpartition(".")
        found.setdefault(module, set()).add(leaf)
    return found


def _attention(linears: list[str]) -> AttentionModel | None:
    modules = _modules(linears)
    for q, k, v in ATTENTION:
        for module, leaves in modules.items():
            if module and {q, k, v} <= leaves:
                return AttentionModel(module=module, q=q, k=k, v=v, latent=k == v == "kv_b_proj")
    return None


def _sites(linears: list[str]) -> list[list[str]]:
    sites = []
    for module, leaves in _modules(linears).items():
        if re.search(r"\.\d+$", module):  # experts: their sites are the layer's
            continue
        for group in TOGETHER:
            present = [f"{module}.{leaf}" if module else leaf for leaf in group if leaf in leaves]
            if len(present) > 1:
                sites.append(present)
    return sites


def _experts(inside: list[str]) -> ExpertsModel | None:
    """Experts one by one (`<path>.<e>.<leaf>.weight`), or fused with gate above up, as most files store them."""
    leaves: dict[str, set[str]] = {}
    for name in inside:
        single = re.fullmatch(r"(.*experts)\.\d+\.(\w+)\.weight", name)
        if single:
            leaves.setdefault(single[1], set()).add(single[2])
    for path, found in leaves.items():
        for gate, up, down in EXPERTS:
            if {gate, up, down} - {None} <= found:
                return ExpertsModel(path=path, gate=gate, up=up, down=down)
    for name in inside:
        path, _, leaf = name.rpartition(".")
        if path.endswith("experts") and leaf == "gate_up_proj":
            both = FusedModel(targets=["gate_proj", "up_proj"], transpose="auto")
            return ExpertsModel(
                path=path,
                gate="gate_proj",
                up="up_proj",
                down="down_proj",
                fused={"gate_up_proj": both, "down_proj": FusedModel(targets=["down_proj"], transpose="auto")},
            )
    return None
