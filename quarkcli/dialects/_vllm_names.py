"""Says by which names vLLM knows the modules of a plan, where it has others than the files (`FamilyModel.in_vllm`).

It looks for modules in a config by its own names, and maps names of the files to them for some of its classes only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from quarkcli.dialects._patterns import WrittenNames
from quarkcli.errors import some
from quarkcli.plan.model import Plan

_MODEL = "model."
_BESIDE = {"vision", "audio", "projector"}  # roles


def own_names(plan: Plan) -> dict[str, str]:
    """Returns module -> vLLM's name of it, but for routed experts and where that is the name of another module."""
    return plan.once("names in vLLM", lambda: _own_names(plan))


def _own_names(plan: Plan) -> dict[str, str]:
    family = plan.rewrites.family
    if family is None or not isinstance(family.in_vllm, dict):
        return {}
    block = re.compile(re.escape(family.blocks) + r"\.(\d+)\.")
    count = len({found[1] for name in plan.targets if (found := block.match(name))})
    names = {t.name: family.name_in_vllm(t.name, count) for t in plan.targets.values() if t.expert is None}
    return {module: own for module, own in names.items() if own not in plan.targets}


def left_out(plan: Plan) -> list[str]:
    """Returns vLLM's names of the modules that keep their weight, where the files have others."""
    return list(dict.fromkeys(own for module, own in own_names(plan).items() if plan.targets[module].weight is None))


def quantized(plan: Plan) -> bool:
    """True when a module is quantized for which vLLM has another name."""
    return any(plan.targets[module].weight is not None for module in own_names(plan))


def with_parts(plan: Plan) -> list[str]:
    """Returns the quantized modules and the parts by which vLLM knows some of them; nothing where it knows no parts."""
    names = [target.name for target in plan.quantized()]
    parts = [part for name in names for part in parts_of(plan, name)]
    return names + parts if parts else []


def parts_of(plan: Plan, module: str) -> list[str]:
    """Returns the parts by which vLLM knows a module that the files have whole; nothing where it knows none."""
    known = plan.rewrites.family.parts_in_vllm if plan.rewrites.family is not None else {}
    parent, _, leaf = module.rpartition(".")
    return [f"{parent}.{part}" for part in known.get(leaf, ())]


def unlisted(plan: Plan, entries: Iterable[str | list[str]]) -> list[str]:
    """Returns the quantized linears, or their parts, of which no entry is a part. Without entries, files have names."""
    modules = [target.name for target in plan.quantized() if target.role != "head" and target.expert is None]
    listed = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])] or modules
    asked = [name for module in modules for name in parts_of(plan, module) or [module]]
    return [name for name in asked if not _is_part(name, listed)]


def beside_model(plan: Plan) -> dict[str, str]:
    """Returns the modules that it has beside `model`, where the files have them below: module -> the name there.

    They are those of towers and projectors that keep their weight.
    """
    family = plan.rewrites.family
    if family is None or plan.guessed or family.below_model:
        return {}
    kept = (t.name for t in plan.targets.values() if t.weight is None and t.role in _BESIDE)
    return {name: name.removeprefix(_MODEL) for name in kept if name.startswith(_MODEL)}


def loads(plan: Plan) -> bool:
    """True when a config can say to vLLM which modules are quantized: one scheme, where it has other names for them.

    Configs name modules that are left out by both names, and those of a scheme only by the files'. A quantized head
    is always named.
    """
    family = plan.rewrites.family
    if plan.rewrites.unserved or plan.rewrites.unread("vllm") or (family is not None and family.in_vllm == "never"):
        return False
    if any(plan.targets[name].role == "head" and plan.targets[name].weight is not None for name in own_names(plan)):
        return False
    schemes = {(run[0].weight, run[0].input, run[0].output) for run in plan.quantized_alike()}
    return len(schemes) < 2 or not quantized(plan)


def unsaid(plan: Plan, entries: Iterable[str], parts: bool) -> list[str]:
    """Returns what is wrong with the entries of a config's lists: vLLM's names that they lack, in one sentence.

    parts   entries stand for every name that they are a part of
    """
    own, listed = left_out(plan), list(entries)
    names = WrittenNames(listed, own)
    missing = [name for name in own if not names.named(name, listed) and not _is_part(name, listed if parts else ())]
    what = "modules that are not quantized have other names there, which the config does not list"
    return [f"{what}: {some(missing)}"] if missing else []


def _is_part(name: str, entries: Iterable[str]) -> bool:
    return any(entry in name for entry in entries)
