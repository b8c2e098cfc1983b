"""Puts a family in the spelling of one checkpoint's names: text prefixes, base models, names that a tool changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from quarkcli.errors import ModelError
from quarkcli.family.schema import FamilyModel

# Steps that tools put into names when they save a wrapped model; no class loads them.
_ANYWHERE = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "a training wrapper",
}
_IN_FRONT = {"module": "DistributedDataParallel or DeepSpeed", "_forward_module": "a training wrapper"}


def check_wrappers(names: Iterable[str]) -> None:
    """Raises ModelError for names that a wrapper changed: no class would load them."""
    found = list(names)
    everything = "\n".join(found)
    inside = next((step for step in _ANYWHERE if f"{step}." in everything), None)
    if inside is not None:
        first = next(name for name in found if f"{inside}." in name)
        raise _wrapped(inside, _ANYWHERE[inside], first)
    step = found[0].partition(".")[0] if found else ""
    if step in _IN_FRONT and all(name.startswith(f"{step}.") for name in found):
        raise _wrapped(step, _IN_FRONT[step], found[0])


def _wrapped(step: str, tool: str, name: str) -> ModelError:
    bare = name.replace(f"{step}.", "", 1)
    return ModelError(
        f"the tensor names contain '{step}', as {tool} saves them, and no class loads them",
        where=name,
        hint=f"unwrap the model and save it again, or rename the tensors: '{name}' must be '{bare}'",
        kind="E-MODEL-FAMILY",
    )


def spelled(family: FamilyModel, headers: Iterable[str]) -> FamilyModel:
    """Returns the family with `{text}` replaced by the first prefix whose blocks are among the tensor names.

    A base model's names lack the first steps (`layers.0` for `model.layers.0`): the family's full names then lack
    them too.
    """
    names = list(headers)
    texts = [_with_text(family, text) for text in family.text] or [family]
    found = next((one for one in texts if _has_blocks(one.blocks, names)), None)
    if found is not None:
        return found
    steps = max(one.blocks.count(".") for one in texts)
    for count in range(1, steps + 1):
        for one in texts:
            dropped, rest = _split(one.blocks, count)
            if rest and _has_blocks(rest, names):
                return _without(one, dropped)
    return texts[0]


def published_experts(family: FamilyModel, names: Iterable[str]) -> dict[str, str]:
    """Returns published names of tensors of routed experts, by names in which a tool has put those in memory.

    llm-compressor writes Mixtral's `experts.0.w1` as `experts.0.gate_proj`.
    """
    experts = family.experts
    if experts is None:
        return {}
    leaves = {family.aliases[leaf]: leaf for leaf in (experts.gate, experts.up, experts.down) if leaf in family.aliases}
    found = {}
    for name in names if leaves else ():
        head, inside, rest = name.partition(f".{experts.path}.")
        index, _, leaf = rest.partition(".")
        module, _, last = leaf.partition(".")
        if inside and index.isdecimal() and module in leaves:
            found[name] = f"{head}{inside}{index}.{leaves[module]}.{last}"
    return found


def _has_blocks(blocks: str, names: list[str]) -> bool:
    start = f"{blocks}."
    return any(name.startswith(start) and name[len(start) : len(start) + 1].isdecimal() for name in names)


def _split(path: str, count: int) -> tuple[str, str]:
    steps = path.split(".")
    return ".".join(steps[:count]), ".".join(steps[count:])


def _with_text(family: FamilyModel, text: str) -> FamilyModel:
    made = _renamed(family, lambda name: name.replace("{text}", text))
    return made.model_copy(update={"text": [text]})


def _without(family: FamilyModel, prefix: str) -> FamilyModel:
    return _renamed(family, lambda name: name.removeprefix(f"{prefix}."))


def _renamed(family: FamilyModel, rename: Callable[[str], str]) -> FamilyModel:
    """Returns the family with its full names, and the patterns on them, renamed."""
    residual = family.residual
    if residual is not None:
        outside = {place: [rename(pattern) for pattern in own] for place, own in residual.outside.items()}
        residual = residual.model_copy(update={"outside": outside})
    return family.model_copy(
        update={
            "residual": residual,
            "blocks": rename(family.blocks),
            "embed": [rename(name) for name in family.embed],
            "tail": [rename(name) for name in family.tail],
            "roles": {role: [rename(pattern) for pattern in own] for role, own in family.roles.items()},
            "exclude": {role: [rename(pattern) for pattern in own] for role, own in family.exclude.items()},
        }
    )
