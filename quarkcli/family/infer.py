"""Guesses a family from tensor names, by the leaf names that published models use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from quarkcli.family.config import TIED, expert_count, text_config, zero_experts
from quarkcli.family.lists import TOWER_WORDS, block_lists, language_blocks, tower
from quarkcli.family.schema import (
    AttentionModel,
    ExpertsModel,
    FamilyModel,
    FusedModel,
    HeaderLike,
)

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
EXPERTS: tuple[tuple[str | None, str, str], ...] = (
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
    "conv": ["*conv*"],
    "gates": ["*.shared_expert_gate"],
    "vision": ["*visual*", "*vision*"],
    "audio": ["*audio*"],
    "projector": ["*projector*"],
    "mtp": ["mtp.*", "*.mtp.*"],
}
# How transformers renames models with images while it loads.
RENAMED = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
}

# Ends of the names behind the blocks.
HEAD = "lm_head"
_TAIL = (HEAD, "norm", "ln_f", "output", "output_layer", "norm_f")
# Names that routers have, among other things.
_ROUTERS = ("*.gate", "*.router", "*.router.*", "*.gate.wg")


def infer(config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> FamilyModel:
    """Returns the language model's list of blocks, and what its usual leaf names say. Raises ModelError without one."""
    blocks = language_blocks(config, headers)
    stem = blocks.rpartition(".")[0]
    outside = [
        name.removesuffix(".weight") for name in headers if not name.startswith(blocks + ".") and tower(name) is None
    ]
    embed = [name for name in outside if _is_table(name, headers)]
    # The norm of a table runs with it; other norms may have `embed` in their names too (LFM2's last one).
    around = [name for name in outside if name.endswith("norm") and name.startswith(tuple(f"{one}_" for one in embed))]
    tail = [name for name in outside if name.endswith(_TAIL) and name not in {*embed, *around}]
    shapes = {leaf: header.shape for name, header in headers.items() for leaf in _below([name], blocks)}
    inside = {leaf: len(shape) for leaf, shape in shapes.items()}
    linears = [leaf.removesuffix(".weight") for leaf in inside if leaf.endswith(".weight")]
    heads = [name for name in tail if name.endswith((HEAD, "output", "output_layer"))]
    said = (config.get(TIED), text_config(config).get(TIED))
    tied = not heads and (True in said or False not in said)
    if tied:  # transformers makes the embedding of it, under this name in nearly all of its classes
        tail.append(HEAD)
        heads = [HEAD]
    experts = _experts(inside)
    tables = [*(embed or [f"{stem}.*embed*" if stem else "*embed*"]), "*.relative_attention_bias"]
    roles = {"embedding": tables, "head": [*heads, *_below_heads(heads, headers)] or [f"*{HEAD}"], **ROLES}
    roles |= _tower_roles(headers)
    roles["router"] = _routers(config, headers, blocks, experts)
    return FamilyModel(
        blocks=blocks,
        embed=[*embed, *around] or [f"{stem}.embed_tokens"],
        tail=tail,
        roles=roles,
        attention=_attention(linears),
        sites=_sites([leaf for leaf in linears if inside[f"{leaf}.weight"] < 3], shapes),
        experts=experts,
        renamed={rule: name for rule, name in RENAMED.items() if any(re.match(rule, tensor) for tensor in headers)},
        tied=tied,
    )


def guess(config: Mapping[str, Any], headers: Mapping[str, HeaderLike]) -> tuple[FamilyModel, str]:
    """Returns the inferred family with the config's names, for a user to keep; and a comment for the file."""
    found = infer(config, headers)
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    names = {"architectures": list(architectures), "model_types": [model_type] if model_type else []}
    text = (
        "Guessed from tensor names. Check the roles, what shares an input (sites) and how fused tensors are split,\n"
        "then keep it as models/<name>.yaml in the user folder."
    )
    return found.model_copy(update=names), text


def _below_heads(heads: Iterable[str], headers: Mapping[str, HeaderLike]) -> list[str]:
    """Returns the linears below a head (RoBERTa's dense): loaders that leave out the head leave them out as well."""
    inside = tuple(f"{head}." for head in heads)
    matrices = (name for name, header in headers.items() if len(header.shape) == 2 and name.endswith(".weight"))
    return [name.removesuffix(".weight") for name in matrices if inside and name.startswith(inside)]


def _is_table(name: str, headers: Mapping[str, HeaderLike]) -> bool:
    """True for a matrix that is named like an embedding; norms and linears beside one may have its name too."""
    leaf = name.rsplit(".", 1)[-1]
    header = headers.get(f"{name}.weight", headers.get(name))
    named = ("embed" in leaf and "norm" not in leaf) or leaf.endswith("wte")
    return named and header is not None and len(header.shape) == 2 and f"{name}.bias" not in headers


def _tower_roles(headers: Mapping[str, HeaderLike]) -> dict[str, list[str]]:
    """Returns the roles of towers, with the roots of those that have lists of blocks here."""
    roles = {role: list(ROLES[role]) for role in TOWER_WORDS}
    for own in block_lists(headers):
        role, root = tower(own.path), own.path.split(".")
        if role is not None:
            end = next(i for i in range(1, len(root) + 1) if tower(".".join(root[:i])) == role)
            roles[role] = list(dict.fromkeys([*roles[role], ".".join(root[:end]) + ".*"]))
    return roles


def _routers(
    config: Mapping[str, Any], headers: Mapping[str, HeaderLike], blocks: str, experts: ExpertsModel | None
) -> list[str]:
    """Returns patterns of what is named like a router and has a row per expert.

    In a dense model a `gate` is a linear.
    """
    count = expert_count(config) or _stored_experts(headers, blocks, experts)
    if count is None:
        return []
    leaves: dict[str, set[bool]] = {}
    found = []
    for name, header in headers.items():
        module = name.removesuffix(".weight")
        if name.startswith(blocks + ".") and len(header.shape) == 2 and any(fnmatchcase(module, p) for p in _ROUTERS):
            own = header.shape[0] in (count, count + zero_experts(config))
            leaves.setdefault(next(iter(_below([module], blocks))), set()).add(own)
            found += [module] if own else []
    if all(len(kinds) == 1 for kinds in leaves.values()):
        return [f"{blocks}.*.{leaf}" for leaf, kinds in leaves.items() if True in kinds]
    return found


def _stored_experts(headers: Mapping[str, HeaderLike], blocks: str, experts: ExpertsModel | None) -> int | None:
    """Returns the number of experts that the files have in a block, None without any."""
    if experts is None:
        return None
    single = re.compile(rf"{re.escape(blocks)}\.\d+\.{re.escape(experts.path)}\.(\d+)\.")
    numbers = {int(found[1]) for name in headers if (found := single.match(name))}
    there = re.escape(experts.fused_in or experts.path)
    fused = re.compile(rf"{re.escape(blocks)}\.\d+\.{there}\.{re.escape(experts.down)}(\.weight)?")
    stacks = {header.shape[0] for name, header in headers.items() if len(header.shape) == 3 and fused.fullmatch(name)}
    return len(numbers) or (stacks.pop() if len(stacks) == 1 else None)


def _below(headers: Iterable[str], blocks: str) -> Iterable[str]:
    """Yields names below the block, each block's number taken out."""
    start = re.compile(re.escape(blocks) + r"\.\d+\.")
    for name in headers:
        found = start.match(name)
        if found:
            yield name[found.end() :]


def _modules(linears: Iterable[str]) -> dict[str, set[str]]:
    """Returns a mapping from modules below the block to the leaf names of their linears."""
    found: dict[str, set[str]] = {}
    for linear in linears:
        module, _, leaf = linear.rpartition(".")
        found.setdefault(module, set()).add(leaf)
    return found


def _attention(linears: list[str]) -> AttentionModel | None:
    """Returns the attention that fills a cache: linear attention, which has convolutions, keeps a state instead."""
    found = _modules(linears).items()
    modules = {module: leaves for module, leaves in found if not any("conv" in leaf for leaf in leaves)}
    for q, k, v in ATTENTION:
        for module, leaves in modules.items():
            if module and {q, k, v} <= leaves:
                return AttentionModel(module=module, q=q, k=k, v=v, latent=k == v == "kv_b_proj")
    return None


def _sites(linears: list[str], shapes: Mapping[str, Sequence[int]]) -> list[list[str]]:
    """Returns linears that read one activation, by their names and widths; a walk checks that they do."""
    sites = []
    for module, leaves in _modules(linears).items():
        if re.search(r"\.\d+$", module):  # experts: their sites are the layer's
            continue
        for group in TOGETHER:
            present = [f"{module}.{leaf}" if module else leaf for leaf in group if leaf in leaves]
            if len(present) > 1 and len({tuple(shapes[f"{leaf}.weight"][-1:]) for leaf in present}) == 1:
                sites.append(present)
    return sites


def _experts(inside: Mapping[str, int]) -> ExpertsModel | None:
    """Returns experts one by one (`<path>.<e>.<leaf>.weight`), or fused with gate above up, as most files store them.

    Fused ones may lie in a module of another name (Step 3.5's `moe`), which has them below `experts` one by one.

    inside   name below the block -> dimensions
    """
    leaves: dict[str, set[str]] = {}
    stacks: dict[str, dict[str, str]] = {}  # path -> leaf -> the fused tensor's name below it
    for name, dimensions in inside.items():
        single = re.fullmatch(r"(.*experts)\.\d+\.(\w+)\.weight", name)
        fused = re.fullmatch(r"(.*?)\.((\w+?)(\.weight)?)", name)
        if single:
            leaves.setdefault(single[1], set()).add(single[2])
        elif fused and dimensions == 3:
            stacks.setdefault(fused[1], {})[fused[3]] = fused[2]
    for path, found in leaves.items():
        for gate, up, down in EXPERTS:
            if {gate, up, down} - {None} <= found:
                return ExpertsModel(path=path, gate=gate, up=up, down=down)
    for path, tensors in stacks.items():
        rules = _fused_rules(tensors, f"{path}.gate_up_proj_bias" in inside)
        if rules is not None:
            gate, up, down = rules[0]
            own = path.endswith("experts")
            below, there = (path, None) if own else (f"{path}.experts", path)
            return ExpertsModel(path=below, gate=gate, up=up, down=down, fused=rules[1], fused_in=there)
    return None


def _fused_rules(
    tensors: Mapping[str, str], bias: bool
) -> tuple[tuple[str | None, str, str], dict[str, FusedModel]] | None:
    """Returns (gate, up, down) and split rules of fused tensors, given by leaf; None for leaves that nobody uses."""
    if {"gate_up_proj", "down_proj"} <= set(tensors):
        # A bias beside them is gpt-oss's way, whose rows of gate and up alternate.
        split: Literal["halves", "interleaved"] = "interleaved" if bias else "halves"
        both = FusedModel(targets=["gate_proj", "up_proj"], split=split, transpose="auto")
        single = FusedModel(targets=["down_proj"], transpose="auto")
        return EXPERTS[0], {tensors["gate_up_proj"]: both, tensors["down_proj"]: single}
    for names in EXPERTS:
        present = [leaf for leaf in names if leaf is not None]
        if set(present) <= set(tensors):
            return names, {tensors[leaf]: FusedModel(targets=[leaf], transpose="auto") for leaf in present}
    return None
