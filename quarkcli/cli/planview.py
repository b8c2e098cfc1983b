"""Shows a plan for people and as JSON (`quark/plan/2`), one row per class of modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from quarkcli.algorithms.base import Assignment
from quarkcli.cli import output
from quarkcli.disk import embedded
from quarkcli.job import directories, idle
from quarkcli.job.groups import groups
from quarkcli.plan import advice
from quarkcli.plan.model import Decision, Part, Plan, Target
from quarkcli.plan.online import sentences
from quarkcli.recipe.advice import AUTO
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.match import starred
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from quarkcli.job.options import Prepared

SCHEMA = "quark/plan/2"
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def fold(names: Iterable[tuple[str, Any]], everything: Iterable[str]) -> Iterator[tuple[str, int, Any]]:
    """Yields (name with indices folded, count, key) for (name, key) pairs, in order of first appearance.

    `layers.*.mlp` stands for all of `everything` that it matches; where a row has only some of them, the first index
    is written out: `layers.{0,2-31}.mlp`.
    """
    totals = Counter(starred(name) for name in everything)
    found: dict[tuple[str, Any], list[str]] = {}
    for name, key in names:
        found.setdefault((starred(name), key), []).append(name)
    for (pattern, key), members in found.items():
        shown = pattern
        firsts = {int(first[0]) for name in members if (first := _INDEX.search(name))}
        if firsts and len(members) < totals[pattern]:
            shown = pattern.replace("*", ranges(firsts) if len(firsts) == 1 else f"{{{ranges(firsts)}}}", 1)
        yield shown, len(members), key


def ranges(numbers: Iterable[int]) -> str:
    """Returns `0,2-31` for sorted distinct numbers."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def header(prepared: Prepared) -> list[str]:
    """Returns the facts above the table, one per line."""
    source, recipe, size = prepared.source, prepared.recipe, directories.together(prepared)
    architecture = ", ".join(source.config.get("architectures") or ["unknown architecture"])
    inferred = ", roles guessed from tensor names" if prepared.layout.inferred else ""
    commit = f" at {source.commit[:12]}" if source.commit else ""
    label = "recipe" if prepared.options.recipe is not None else "scheme"
    return output.pairs(
        [
            ("model", f"{source.hub_id or source.folder}{commit}"),
            *output.listed("source", prepared.origin.lines(prepared.plan) if prepared.origin else []),
            ("family", f"{prepared.plan.family}{inferred} ({architecture})"),
            (label, recipe.name + (f" ({recipe.file})" if recipe.file else "")),
            ("algorithms", ", ".join(step(prepared.plan, one) for one in prepared.steps)),
            *output.listed(f"{AUTO} chose", [advice.text(one.as_dict()) for one in prepared.advice]),
            *output.listed("dialect", [f"{one.dialect.name} ({one.dialect_reason})" for one in prepared.every]),
            *output.listed("at run time", sentences(prepared.plan.online)),
            ("data", _data(prepared)),
            *output.listed("size", [_size(one) for one in prepared.every]),
            ("quantized", prepared.coverage.text()),
            *output.listed("parallel", list(dict.fromkeys(parallel(one.tensor_parallel) for one in prepared.every))),
            ("memory", f"about {output.size(size.memory_bytes)} at the peak, Python and libraries included"),
            *download(prepared),
            ("disk", f"{output.size(size.disk_bytes)} while running"),
            *output.listed("output", [str(one.checkpoint) for one in prepared.every]),
        ]
    )  # fmt: skip


def _size(prepared: Prepared) -> str:
    size = prepared.forecast
    share = size.output_bytes / size.source_bytes if size.source_bytes else 0.0
    text = f"{output.size(size.source_bytes)} -> {output.size(size.output_bytes)} ({share:.0%}), "
    return f"{text}{size.effective_bits:.2f} bits per quantized weight"


def parallel(degrees: Sequence[int]) -> str:
    """Returns over how many devices servers can divide the weights."""
    if list(degrees) == [1]:
        return "on one device, not tensor parallel"
    return f"tensor parallel over {', '.join(map(str, degrees))} devices"


def download(prepared: Prepared) -> list[tuple[str, str]]:
    """Returns a row for what has to be downloaded."""
    found = prepared.download
    if found is None:
        return []
    how = f"each file is deleted after its last use, at most {output.size(found.at_once)} at a time"
    if found.kept:
        how = f"kept in the hub's cache: {found.kept}"
    return [("download", f"{found.files} files, {output.size(found.bytes)}, during the job; {how}")]


def _data(prepared: Prepared) -> str:
    settings = prepared.calibration
    if settings is None:
        unused = ", ".join(idle.given(prepared.options, idle.OF_DATA))
        return "none needed" + (f"; {unused} not used" if unused else "")
    at_most = "" if settings.asked else "up to "
    return (
        f"{len(prepared.needs)} layer inputs need data: {at_most}{settings.samples} rows of {settings.seqlen} "
        f"tokens from {settings.source}, bos {settings.bos}"
    )


def step(plan: Plan, one: Assignment) -> str:
    """Returns an algorithm's name, with the number of its weights where that is not all."""
    if one.weights is None:
        return one.name
    return f"{one.name} on {sum(map(one.takes, plan.quantized()))} weights"


def show(prepared: Prepared, more: Iterable[str] = ()) -> None:
    """Prints every decision on stdout (`--modules`). `more`: further lines of the header."""
    plan = prepared.plan
    for line in [*header(prepared), *more]:
        output.data(line)
    output.data("")
    _modules(plan)
    _attention(plan)
    output.data("")
    tensors = [tensor for part in plan.parts for tensor in part.tensors]
    rows = list(fold(plan.kept.items(), tensors))
    output.table(("KEPT TENSORS", "COUNT", "WHY"), rows)
    if plan.tied_head is not None:
        output.data(f"\n{plan.tied_head} and the embedding are one tensor (tied)")


def warn(prepared: Prepared) -> None:
    """Prints the warnings of a plan on stderr."""
    for warning in _warnings(prepared):
        output.warning(warning)


def _warnings(prepared: Prepared) -> list[str]:
    return list(dict.fromkeys(warning for one in prepared.every for warning in one.warnings))


def _modules(plan: Plan) -> None:
    kinds = ["weight", "input"]  # the others only where there are some
    kinds += [kind for kind in ("output", "bias") if any(_spec(run[0], kind) for run in plan.quantized_alike())]
    texts: dict[str, tuple[str, ...]] = {}
    for run in plan.quantized_alike():
        first = run[0]
        text = (*(_text(_spec(first, kind)) for kind in kinds), _decider(plan, first))
        texts |= dict.fromkeys((target.name for target in run), text)
    decided = ((target.name, texts[target.name]) for target in plan.quantized())
    rows = [(name, count, *key) for name, count, key in fold(decided, plan.targets)]
    output.table(("QUANTIZED MODULES", "COUNT", *(kind.upper() for kind in kinds), "DECIDED BY"), rows)


def _spec(target: Target, kind: str) -> TensorSpec | None:
    """Returns the spec that a target's slot is quantized with. It may be on without effect: then None."""
    return {"weight": target.weight, "input": target.input, "output": target.output, "bias": target.bias_spec}[kind]


def _attention(plan: Plan) -> None:
    decided = [
        (f"{module.name}.{kind}_bmm_quantizer", (_text(decision.spec), _origin(plan, decision)))
        for module in plan.attention.values()
        for kind, decision in module.slots.items()
        if decision.spec is not None
    ]
    if decided:
        slots = [name for name, _ in plan.slots()]
        output.data("")
        rows = [(name, count, *key) for name, count, key in fold(decided, slots)]
        output.table(("ATTENTION", "COUNT", "SPEC", "DECIDED BY"), rows)


def _text(spec: TensorSpec | None) -> str:
    return spec.describe() if spec is not None else "-"


def _decider(plan: Plan, target: Target) -> str:
    return (
        "the quantized original, whose codes it keeps"
        if target.name in plan.carried
        else _origin(plan, target.slots["weight"])
    )


def _origin(plan: Plan, decision: Decision) -> str:
    return str(plan.entries[decision.entry].origin) if decision.entry is not None else "no entry matched"


def as_json(prepared: Prepared, full: bool = False) -> dict[str, Any]:
    """Returns what a script may ask of a plan. `full`: with every slot, weight, site and kept tensor."""
    plan, source, recipe, size = prepared.plan, prepared.source, prepared.recipe, directories.together(prepared)
    settings = prepared.calibration
    return {
        "schema": SCHEMA,
        "model": {
            "name": source.name,
            "path": embedded.place(source),
            "commit": source.commit,
            "architectures": source.config.get("architectures"),
            "family": plan.family,
            "inferred": prepared.layout.inferred,
        },
        "source": prepared.origin.facts(plan) if prepared.origin is not None else None,
        "recipe": {"name": recipe.name, "file": recipe.file or None, "scheme": recipe.scheme},
        "algorithms": [step.name for step in prepared.steps],
        "advice": [choice.as_dict() for choice in prepared.advice],
        "dialect": {"name": prepared.dialect.name, "reason": prepared.dialect_reason},
        "online": plan.online,
        "output": str(prepared.output),
        "directories": [_directory(one) for one in prepared.every],
        **_sizes(prepared),
        "tensor_parallel": prepared.tensor_parallel,
        "effective_bits": size.effective_bits,
        "coverage": prepared.coverage.facts(),
        "bytes_by_dtype": size.dtypes,
        "groups": [group.facts() for group in groups(prepared)],
        "sites": len(prepared.needs),
        "calibration": settings
        and {"source": settings.source, "samples": settings.samples, "seqlen": settings.seqlen, "bos": settings.bos},
        "entries": entries(plan) if full else folded(entries(plan)),
        "parts": [_part(part) for part in plan.parts],
        "share": None
        if plan.share is None
        else [{"slots": row.slots, "origin": str(row.origin)} for row in plan.share],
        "tied_head": plan.tied_head,
        "warnings": _warnings(prepared),
        **(_full(prepared) if full else {}),
    }


def entries(plan: Plan) -> list[dict[str, Any]]:
    """Returns the ordered list, one row for each entry."""
    return [
        {
            "index": index,
            "pattern": entry.quantizer_path,
            "parent_class": entry.parent_class,
            "enable": entry.enable,
            "cfg": entry.cfg,
            "required": entry.required,
            "origin": str(entry.origin),
            "matches": matches,
        }
        for index, (entry, matches) in enumerate(zip(plan.entries, plan.matches, strict=True))
    ]


def folded(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for neighbours of one origin that differ in numbers alone, such as the exclusions of a role.

    It has the index of the first, stars for the numbers, and `count`, which tells how many they are.
    """
    found = []
    for _, run in groupby(rows, lambda row: str(row["origin"])):
        alike: dict[str, list[dict[str, Any]]] = {}
        for row in run:
            same = {**row, "pattern": starred(row["pattern"]), "index": 0, "matches": 0}
            alike.setdefault(repr(same), []).append(row)
        for first, *others in alike.values():
            pattern = starred(first["pattern"]) if others else first["pattern"]
            matches = sum(row["matches"] for row in (first, *others))
            found.append({**first, "pattern": pattern, "matches": matches, "count": 1 + len(others)})
    return found


def _full(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    decisions = {id(decision): decision for _, decision in plan.slots()}
    slots = {key: _slot(plan, decision) for key, decision in decisions.items()}
    return {
        "needs": prepared.needs,
        "slots": {name: slots[id(decision)] for name, decision in plan.slots()},
        "targets": {target.name: _target(target) for target in plan.targets.values()},
        "kept": plan.kept,
    }


def _directory(prepared: Prepared) -> dict[str, Any]:
    return {
        "dialect": prepared.dialect.name,
        "reason": prepared.dialect_reason,
        "path": str(prepared.checkpoint),
        "bytes": prepared.forecast.output_bytes,
        "tensor_parallel": prepared.tensor_parallel,
    }


def _part(part: Part) -> dict[str, Any]:
    return {"index": part.index, "name": part.name, "kind": part.kind, "tensors": len(part.tensors)}


def _sizes(prepared: Prepared) -> dict[str, Any]:
    size, found = prepared.forecast, prepared.download
    return {
        "output_bytes": size.output_bytes,
        "source_bytes": size.source_bytes,
        "memory_bytes": size.memory_bytes,
        "whole_model_bytes": size.whole_bytes or None,
        "disk_bytes": size.disk_bytes,
        "download": vars(found) if found is not None else None,
    }


def _target(target: Target) -> dict[str, Any]:
    return {
        "tensor": target.view.tensor,
        "shape": target.shape,
        "dtype": target.dtype,
        "role": target.role,
        "part": target.part,
        "scale_group": target.scale_group,
    }


def _slot(plan: Plan, decision: Decision) -> dict[str, Any]:
    entry = None
    if decision.entry is not None:
        decider = plan.entries[decision.entry]
        entry = {"index": decision.entry, "pattern": decider.quantizer_path, "origin": str(decider.origin)}
    return {"spec": spec_to_yaml(decision.spec) if decision.spec is not None else None, "entry": entry}
