"""Refuses plans with slots without meaning, specs that do not fit their slots, or widths without whole groups."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from quarkcli.errors import ConfigError, ModelError, some
from quarkcli.plan.compose import OFF
from quarkcli.plan.model import Attention, Plan, QuantizedTarget, Target
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.entries import Entry, Origin
from quarkcli.recipe.match import slot_pattern, starred
from quarkcli.recipe.recipe import exclusion_entries
from quarkcli.spec import PerChannel, PerGroup, PerTile, TensorSpec

KEEP, PAD = "--on-indivisible keep", "--on-indivisible pad"


def warn(plan: Plan) -> None:
    """Adds warnings for slots that an entry enables and that stay off, and for what is shared or overruled."""
    unused = {"input": "their weight is not quantized", "output": "their weight is not quantized"}
    for kind, reason in unused.items():
        _lone(plan, kind, reason, lambda t: t.weight is None)
    _lone(
        plan,
        "output",
        "embeddings have no input or output to quantize",
        lambda t: t.weight is not None and t.is_embedding,
    )
    _lone(plan, "bias", "their module has no quantized weight, or no bias", lambda t: t.bias_spec is None)
    if plan.tied_head is not None and any(run[0].is_embedding for run in plan.quantized_alike()):
        plan.warnings.append(f"the embedding is quantized, and {plan.tied_head} with it: the two are one tensor")
    _overruled_cache(plan)


def _lone(plan: Plan, kind: str, reason: str, off: Callable[[Target], bool]) -> None:
    runs = [run for run in plan.alike() if run[0].slots[kind].spec is not None and off(run[0])]
    if runs:
        count = sum(map(len, runs))
        lone = {id(run[0].slots) for run in runs}
        names = (t.name for t in plan.targets.values() if id(t.slots) in lone and off(t))
        plan.warnings.append(f"{count} {kind} quantizers stay off because {reason}: {some(names, 3)}")


def _overruled_cache(plan: Plan) -> None:
    """Warns where an attention scheme, which comes after the cache's or its end, decides k and v in its place."""
    caches = [entry for entry in plan.entries if entry.unit.startswith("cache ") or entry.unit == OFF]
    for module in plan.attention.values():
        for decision in module.slots.values():
            winner = plan.entries[decision.entry] if decision.entry is not None else None
            if winner is None or not winner.unit.startswith("attention "):
                continue
            same_slot = [entry for entry in caches if entry.quantizer_path == winner.quantizer_path]
            if same_slot and same_slot[0].cfg != winner.cfg:
                plan.warnings.append(f"{winner.origin} decides the KV cache, not {same_slot[0].origin}")
                return


def check_stored(plan: Plan, transposed: Collection[str]) -> None:
    """Raises ModelError when weights that the file stores [in, out] are to be quantized."""
    names = [name for name in transposed if plan.targets[name].weight is not None]
    if names:
        first = plan.targets[names[0]]
        raise ModelError(
            f"is stored transposed ({list(first.shape)}), like {len(names) - 1} more: its class is not nn.Linear "
            "(Conv1D of transformers), and no server loads a quantized one",
            where=first.view.tensor,
            hint="use a copy of the model whose layers are nn.Linear",
            kind="E-MODEL-FAMILY",
        )


def check(plan: Plan) -> None:
    """Raises ConfigError for specs that make no sense for their slot, ModelError for widths that do not fit."""
    for target, *_ in plan.quantized_alike():
        for kind in ("input", "output"):
            spec: TensorSpec | None = getattr(target, kind)
            if spec is not None:
                _check_activation(f"{target.name}.{kind}_quantizer", spec)
        if target.output is not None:
            _check_output(target, target.output)
    for module in plan.attention.values():
        for kind, spec in module.specs.items():
            _check_activation(f"{module.name}.{kind}_bmm_quantizer", spec)
            _check_attention(module, kind, spec)
    _check_widths(plan)


def _check_activation(slot: str, spec: TensorSpec) -> None:
    """Refuses scales by row, column or tile: an activation has no fixed number of rows."""
    for stage in spec.stages:
        if isinstance(stage.granularity, PerTile | PerChannel):
            raise ConfigError(
                f"an activation cannot have scales per row of a weight ({stage.describe()})",
                where=slot,
                hint="write granularity: tensor, token, or {group: SIZE}",
                kind="E-SLOT-IMPOSSIBLE",
            )


def _check_output(target: Target, spec: TensorSpec) -> None:
    if target.expert is not None:
        raise ConfigError(
            "outputs of routed experts cannot be quantized: one kernel adds them up",
            where=f"{target.name}.output_quantizer",
            hint="switch the output quantizers of the experts off with an entry for them",
            kind="E-SLOT-IMPOSSIBLE",
        )
    if spec.needs_amax and target.site is None:
        raise ConfigError(
            f"its output needs calibration, and text does not reach this module (role {target.role})",
            where=f"{target.name}.output_quantizer",
            hint=f"use --exclude '{target.name}', or a format that needs no data",
            kind="E-SLOT-UNREACHED",
        )


def _check_attention(module: Attention, kind: str, spec: TensorSpec) -> None:
    slot = f"{module.name}.{kind}_bmm_quantizer"
    for size in sorted(spec.group_sizes):
        if kind == "p":
            raise ConfigError(
                f"the softmax output has one column per token, which groups of {size} do not divide",
                where=slot,
                hint="write granularity: tensor, or token",
                kind="E-SLOT-IMPOSSIBLE",
            )
        if module.head_dim is not None and module.head_dim % size:
            raise ModelError(
                f"the {module.head_dim} features of a head are not a multiple of group size {size} (remainder "
                f"{module.head_dim % size})",
                where=slot,
                hint="use a format with one scale per tensor: --kv-cache fp8",
                kind="E-GROUP-SIZE",
            )


def _check_widths(plan: Plan) -> None:
    """Refuses widths that a group does not divide."""
    bad = list(_indivisible(plan))
    if not bad:
        return
    run, kind, size, width = bad[0]
    count = sum(len(run) for run in {id(run): run for run, *_ in bad}.values())
    features = "input" if kind in ("weight", "input") else "output"
    leaf = run[0].name.rsplit(".", 1)[-1]
    raise ModelError(
        f"its {width} {features} features are not a multiple of group size {size} (remainder {width % size})"
        + (f"; {count} modules have this width" if count > 1 else ""),
        where=f"{run[0].name}.{kind}_quantizer",
        hint=f"use --exclude '*{leaf}', or another scheme for them: --layer '*{leaf}=fp8'; {KEEP} leaves all such "
        "modules as they are"
        + (f", and {PAD} makes their last groups shorter" if kind == "weight" else f"; {PAD} works only for weights"),
        kind="E-GROUP-SIZE",
    )


def left_out(plan: Plan) -> tuple[list[Entry], str]:
    """Returns entries that leave out the modules whose widths groups do not divide, and what that does, for people."""
    reasons: dict[str, dict[str, None]] = {}
    for run, _, size, width in _indivisible(plan):
        why = f"{width} features are not a multiple of {size}"
        reasons.setdefault(why, {}).update(dict.fromkeys(target.name for target in run))
    if not reasons:
        return [], f"{KEEP} changes nothing: the group size divides every width"
    alike = Counter(starred(name) for name in plan.targets)
    entries: list[Entry] = []
    for why, names in reasons.items():
        for pattern in _patterns(names, alike):
            entries += exclusion_entries(pattern, Origin(f"{KEEP}: {why}"), user=False, required=False)
    said = (f"{len(names)} modules because {why} ({some(names, 2)})" for why, names in reasons.items())
    return entries, f"{KEEP} leaves out {'; '.join(said)}"


def padded(plan: Plan) -> tuple[list[Entry], str]:
    """Returns entries that give such weights a shorter last group, and what that does, for people.

    A group of a row is a tile one row high, and tiles may end where a matrix does.
    """
    found: dict[tuple[TensorSpec, int], dict[str, None]] = {}
    for run, kind, _, width in _indivisible(plan):
        if kind == "weight":
            found.setdefault((run[0].weight, width), {}).update(dict.fromkeys(target.name for target in run))
    if not found:
        return [], f"{PAD} changes nothing: the group size divides every weight's width"
    alike = Counter(starred(name) for name in plan.targets)
    entries, said = [], []
    for (spec, width), names in found.items():
        size = max(size for size in spec.group_sizes if width % size)
        origin = Origin(f"{PAD}: a last group of {width % size} of {size} features")
        said.append(f"{len(names)} modules a last group of {width % size} of {size} features ({some(names, 2)})")
        cfg = spec_to_yaml(_cut(spec, width))
        for pattern in _patterns(names, alike):
            slot = slot_pattern(pattern, "weight_quantizer")
            entries.append(Entry(slot, cfg, True, None, False, origin, str(origin)))
    return entries, f"{PAD} gives {'; '.join(said)}"


def _cut(spec: TensorSpec, width: int) -> TensorSpec:
    """Returns a spec whose groups may end with the row, in every stage that needs it."""
    then = _cut(spec.then, width) if spec.then is not None else None
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0
    cut = size and width % size and not spec.format.sub_block
    return replace(spec, granularity=PerTile(1, size) if cut else spec.granularity, then=then)


def _patterns(names: Iterable[str], alike: Mapping[str, int]) -> Iterator[str]:
    """Yields patterns for exactly these names: one for all that differ in numbers alone, where these are all."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(starred(name), []).append(name)
    for key, members in groups.items():
        if len(members) == 1 or len(members) < alike[key]:
            yield from members
        else:
            yield "re:" + re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(members[0]))


def _indivisible(plan: Plan) -> Iterator[tuple[list[QuantizedTarget], str, int, int]]:
    for run in plan.quantized_alike():
        target = run[0]
        rows, columns = target.shape
        widths = {"weight": columns, "input": columns, "output": rows, "bias": rows}
        specs = {"weight": target.weight, "input": target.input, "output": target.output, "bias": target.bias_spec}
        for kind, spec in specs.items():
            for size in sorted(spec.group_sizes) if spec is not None else ():
                if widths[kind] % size:
                    yield run, kind, size, widths[kind]
