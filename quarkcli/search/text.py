"""Writes a choice as an ordinary recipe, with the predicted losses of each group as comments.

The specs of every candidate stand once, under a name (a YAML anchor). To give a group another scheme, put other names
into its entries. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from quarkcli.plan.model import TARGET_KINDS, QuantizedTarget, Target
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.convert import flow
from quarkcli.recipe.schema import NATIVE
from quarkcli.search.candidates import Group, Space
from quarkcli.search.choice import Choice
from quarkcli.spec import TensorSpec

_WORD = re.compile(r"[^A-Za-z0-9_]+")


def recipe_text(
    space: Space,
    groups: Sequence[Group],
    choice: Choice,
    losses: Mapping[tuple[str, str], float],
    *,
    name: str,
    calibration: Mapping[str, Any],
    dialect: str | None = None,
) -> str:
    """Returns the text of the recipe. `dialect`: the one that was asked for."""
    shares = ", ".join(f"{choice.count(c.name)} groups {c.name}" for c in space.candidates if choice.count(c.name))
    names = _palette(space, groups)
    loses = f"predicted KL {choice.loss:.3g} nats per token"
    head = {
        "schema": NATIVE,
        "metadata": {
            "name": name,
            "description": f"{shares}: {choice.bits:.3f} bits per weight, {loses}",
        },
    }
    protected = space.base.layout.protected
    exclusions = "none" if any(target.name in protected for group in groups for target in group.targets) else "default"
    return "\n".join(
        [
            "# Made by `quark search`. Weights that servers fuse have one scheme; behind the name of each group is the",
            "# predicted KL divergence, in nats per token, of each scheme that it could have. To give a group another",
            "# scheme, put other names behind its stars.",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=116).rstrip(),
            f"exclusions: {exclusions}",
            *([f"calibration: {flow(calibration)}"] if calibration else []),
            *([f"export: {flow({'dialect': dialect})}"] if dialect else []),
            *(["expert_inputs: own"] if any(run.plan.own_expert_inputs for run in space.runs) else []),
            "quantize:",
            *_algorithms(space, groups, choice),
            "  quant_cfg:",
            '    - {quantizer_path: "*", enable: false}',
            *_defined(names),
            *_entries(space, groups, choice, losses, names),
            "",
        ]
    )


def _algorithms(space: Space, groups: Sequence[Group], choice: Choice) -> list[str]:
    """Returns the steps: one list where all candidates have the same, else each with the weights of its candidates."""
    used = [c for c in space.candidates if c.prepared is not None and choice.count(c.name)]
    given = [candidate.prepared.recipe.algorithms for candidate in used if candidate.prepared is not None]
    if not any(given):
        return []
    if all(steps == given[0] for steps in given):
        rows = [{"method": name, **parameters} for name, parameters in given[0]]
        return ["  algorithm:", *(f"    - {flow(row)}" for row in rows)]
    rows = []
    for candidate, steps in zip(used, given, strict=True):
        mine = [group for group in groups if choice.chosen[group.name] == candidate.name]
        slots = [f"{pattern}.weight_quantizer" for group in mine for pattern in _patterns(space, group.targets)]
        rows += [{"method": name, "slots": slots, **parameters} for name, parameters in steps]
    return ["  algorithm:", *(f"    - {flow(row)}" for row in rows)]


def _palette(space: Space, groups: Sequence[Group]) -> dict[tuple[str, str, TensorSpec], str]:
    """Returns a name for every spec that a candidate has for a kind of slot: `nvfp4_weight`."""
    names: dict[tuple[str, str, TensorSpec], str] = {}
    for group in groups:
        for candidate in map(space.named, group.allowed):
            for own in filter(None, map(candidate.quantized, sorted(group.names))):
                for kind, spec in _specs(own):
                    name = _WORD.sub("_", f"{candidate.name}_{kind}")
                    taken = [known for known in names.values() if known.rstrip("0123456789") == name]
                    names.setdefault((candidate.name, kind, spec), f"{name}{len(taken) + 1}" if taken else name)
    return names


def _specs(target: QuantizedTarget) -> list[tuple[str, TensorSpec]]:
    """Returns the specs of the slots that are on, by kind."""
    specs = target.weight, target.input, target.output, target.bias_spec
    return [(kind, spec) for kind, spec in zip(TARGET_KINDS, specs, strict=True) if spec is not None]


def _defined(names: Mapping[tuple[str, str, TensorSpec], str]) -> Iterator[str]:
    """Yields entries that switch nothing on and give every spec its name."""
    for (_, kind, spec), name in names.items():
        cfg = f"&{name} {flow(spec_to_yaml(spec))}"
        yield f'    - {{quantizer_path: "*.{kind}_quantizer", cfg: {cfg}, enable: false, required: false}}'


def _entries(
    space: Space,
    groups: Sequence[Group],
    choice: Choice,
    losses: Mapping[tuple[str, str], float],
    names: Mapping[tuple[str, str, TensorSpec], str],
) -> Iterator[str]:
    """Yields the entries of every group, behind a comment with what it loses."""
    for group in groups:
        candidate = space.named(choice.chosen[group.name])
        each = ", ".join(f"{name} {losses[group.name, name]:.2g}" for name in group.allowed)
        yield f"    # {group.name}: {candidate.name} ({each})"
        alike: dict[tuple[tuple[str, TensorSpec], ...], list[Target]] = {}
        for own in filter(None, map(candidate.quantized, sorted(group.names))):
            alike.setdefault(tuple(_specs(own)), []).append(own)
        for specs, targets in alike.items():
            for pattern in _patterns(space, targets):
                for kind, spec in specs:
                    name = names[candidate.name, kind, spec]
                    yield f'    - {{quantizer_path: "{pattern}.{kind}_quantizer", cfg: *{name} }}'


def _patterns(space: Space, targets: Sequence[Target]) -> list[str]:
    """Returns few patterns that match these modules and no other."""
    names = sorted(target.name for target in targets)
    taken = {name for name in space.base.plan.targets if name not in names}
    for pattern in _guesses(names):
        expression = re.compile(_regular(pattern))
        if all(map(expression.fullmatch, names)) and not any(map(expression.fullmatch, taken)):
            return [pattern]
    return names


def _guesses(names: Sequence[str]) -> Iterator[str]:
    """Yields patterns that may be right: one letter that differs, then what is common at both ends."""
    if len(names) < 2:
        return
    first = names[0]
    if len({len(name) for name in names}) == 1:
        places = [place for place in range(len(first)) if len({name[place] for name in names}) > 1]
        if len(places) == 1 and all(name[places[0]].isalnum() for name in names):
            letters = "".join(name[places[0]] for name in names)
            yield f"{first[: places[0]]}[{letters}]{first[places[0] + 1 :]}"
    start = _common(names)
    end = _common([name[len(start) :][::-1] for name in names])[::-1]
    yield f"{start}*{end}"
    yield f"{start}*"


def _common(names: Sequence[str]) -> str:
    """Returns what all names begin with."""
    low, high = min(names), max(names)
    same = next(
        (i for i, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), min(len(low), len(high))
    )
    return low[:same]


def _regular(pattern: str) -> str:
    """Returns a pattern of `_guesses` as a regular expression."""
    return re.sub(r"\\\[(\w+)\\\]", r"[\1]", re.escape(pattern)).replace(r"\*", ".*")
