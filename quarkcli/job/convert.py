"""Writes a quantized checkpoint in another dialect: the same codes and scales, under other names and packing.

What is written is read back by the other dialect's own reader, before any weight from names, shapes and config alone,
then tensor by tensor: a dialect that would change a code or a scale is refused by the name of the tensor. Memory holds
one part of the model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quarkcli import __version__, dialects, family, memory
from quarkcli.dialects.base import CONFIG_FILE, CONFIG_KEY, Decoded, Reader, StoredView, Writer
from quarkcli.disk import contents, manifest, side_files, verify
from quarkcli.disk.checkpoint import Checkpoint, LogicalHeader
from quarkcli.disk.compare import near, number, same_bits, same_params
from quarkcli.disk.journal import Journal
from quarkcli.disk.outputs import MANIFEST, OURS, PAGE, RECIPE, REPORT
from quarkcli.disk.source import Source
from quarkcli.disk.writer import (
    atomic_write_text,
    file_size,
    free_bytes,
    partial_path,
    tensor_bytes,
    write_part,
)
from quarkcli.documents import text
from quarkcli.documents.report import fits
from quarkcli.errors import ModelError, QuarkError, ResourceError, UsageError
from quarkcli.events import Listener, Message, PartDone, Phase, Working, silent
from quarkcli.job import finish, preflight
from quarkcli.plan.model import Attention, Part, Plan, QuantizedTarget, Target
from quarkcli.reporting import text as written
from quarkcli.reporting.card import card_of_conversion
from quarkcli.reporting.page import page
from quarkcli.reporting.tensors import Records, converted
from quarkcli.spec import TensorSpec
from quarkcli.threads import Workers, default, limited

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "quantize the original model again with --dialect"


@dataclass
class Conversion:
    """All that is known before the first weight is read.

    owners  targets by the tensor they lie in
    there   what the other dialect's reader will find in the files
    moved   scales of whole tensors that are one unit in the last place off: some dialects store the inverse
    """

    checkpoint: Checkpoint
    plan: Plan
    owners: Mapping[str, list[Target]]
    reader: Reader
    writer: Writer
    back: Reader
    there: StoredView
    bytes: int
    moved: list[str] = field(default_factory=list)


def prepare(source: Source, to: str) -> Conversion:
    """Returns a conversion that config, headers and writer allow. Raises ModelError, naming the tensor, and UsageError.

    to   the name of a dialect that is written here
    """
    writer = dialects.writer(to, "--to")
    checkpoint = Checkpoint(source)
    reader, back = checkpoint.reader, writer.reader
    if reader is None:
        hint = "run 'quark quantize --dialect' to write this format directly"
        raise _cannot("is not quantized, so there is nothing to convert", source.name, hint)
    if reader.name == writer.name:
        raise UsageError(f"the checkpoint has the format {writer.name} already", where="--to", kind="E-FLAG-CONFLICT")
    family.check_fit(checkpoint.family, checkpoint.layout, source.config, checkpoint.headers)
    scaled = next((each.columns for each in checkpoint.view.targets.values() if each.columns is not None), None)
    if scaled is not None:
        raise _cannot(f"inputs are multiplied by it, and format {writer.name} has no place for that", scaled)
    by_head = next((each.name for each in checkpoint.view.attention.values() if each.scales and not each.specs), None)
    if by_head is not None:
        raise _cannot(f"its KV cache has a scale for every head, and format {writer.name} has one for all", by_head)
    plan = checkpoint.plan(checkpoint.layout)
    refusals = [*writer.refusals(plan), *writer.online_refusals(plan)]
    if refusals:
        more = f" (and {len(refusals) - 1} more reasons)" if len(refusals) > 1 else ""
        raise _cannot(f"format {writer.name} cannot hold this checkpoint: {refusals[0]}{more}", source.name)
    if back is None:
        raise _cannot(f"quark cannot read format {writer.name} back, so it cannot check that nothing is lost")
    owners = contents.part_targets(plan)
    parts = (contents.part_infos(plan, writer, part, checkpoint.headers, owners) for part in plan.parts)
    infos = list(chain.from_iterable(parts))
    headers = {info.name: LogicalHeader(info.dtype, info.shape) for info in infos}
    config = writer.files(plan).get(CONFIG_FILE, {}).get(CONFIG_KEY) or {}
    there = back.view(config, headers)
    _check_specs(plan, there, writer)
    return Conversion(checkpoint, plan, owners, reader, writer, back, there, file_size(infos))


def convert(
    source: Source,
    to: str,
    output: Path,
    *,
    overwrite: bool = False,
    tell: Listener = silent,
    threads: int | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint in another dialect. Returns a summary. Raises QuarkError; then no output directory exists.

    threads   as many weights are packed at once; None: see `threads.default`
    """
    started = time.monotonic()
    tell(Phase("check"))
    partial = partial_path(output)
    found = prepare(source, to)
    preflight.check_output(output, overwrite, source.folder)
    if found.bytes > (free := free_bytes(output)):
        raise ResourceError(
            f"{found.bytes:,} bytes needed, {free:,} free",
            where=str(output),
            hint="free some space on that disk",
            kind="E-DISK-FULL",
        )
    with Journal.lock(partial) as journal, finish.begun(), limited(1), Workers(threads or default()) as workers:
        journal.start(_fingerprint(source, found.writer))
        journal.verify()
        memory.return_large_buffers()
        memory.collect()
        tell(Phase("convert"))
        order = {name: number for number, name in enumerate(found.plan.targets)}
        todo = [part for part in found.plan.parts if part.name not in journal.finished]
        for part in todo:
            at = time.monotonic()
            files = write_part(partial, contents.slug(part), _part(found, part, workers, tell))
            memory.give_back()
            moved, found.moved = sorted(found.moved, key=order.__getitem__), []
            journal.finish(part.name, {"files": [file.record() for file in files], "moved": moved})
            seconds, total = time.monotonic() - at, len(found.plan.parts)
            label, eta = f"{found.reader.name} -> {found.writer.name}", (total - part.index - 1) * seconds
            tell(PartDone(part.index + 1, total, part.name, label, seconds, None, memory.peak_rss(), 0, eta))
        records = {part.name: journal.finished[part.name] for part in found.plan.parts}
        summary = _finish(found, source, partial, records, tell) | {"seconds": round(time.monotonic() - started, 2)}
        finish.hand_over(journal, partial, output, overwrite, tell)
    return {"directory": str(output), **summary}


# ---- before any weight is read


def _check_specs(plan: Plan, there: StoredView, writer: Writer) -> None:
    """Raises ModelError where the other dialect would read codes, activations or caches as something else."""
    for target in plan.quantized():
        stored = there.targets.get(target.name)
        pairs: list[tuple[str, TensorSpec | None, TensorSpec | None]] = [
            ("weight", target.weight, stored.weight if stored else None),
            ("input", target.input, stored.input if stored else None),
            ("output", target.output, stored.output if stored else None),
            ("bias", target.bias_spec, stored.bias if stored else None),
        ]
        for kind, ours, theirs in pairs:
            if _meaning(ours, kind) != _meaning(theirs, kind):
                raise _changed(f"{target.name}.{kind}", ours, theirs, writer)
    for name, module in plan.attention.items():
        found = there.attention.get(name)
        specs = found.specs if found else {}
        for kind in {**module.specs, **specs}:
            if _meaning(module.specs.get(kind), "input") != _meaning(specs.get(kind), "input"):
                raise _changed(f"{name}.{kind}", module.specs.get(kind), specs.get(kind), writer)
    extra = [name for name in there.targets if not plan.targets[name].weight]
    if extra or dict(there.online) != plan.online:
        raise _cannot(f"format {writer.name} would describe it differently", (extra or [*plan.online])[0])


def _changed(slot: str, ours: TensorSpec | None, theirs: TensorSpec | None, writer: Writer) -> ModelError:
    said = [spec.describe() if spec else "not quantized" for spec in (ours, theirs)]
    return _cannot(f"it is {said[0]}, and format {writer.name} would describe it as {said[1]}", slot)


def _cannot(what: str, where: str = "", hint: str = "") -> ModelError:
    return ModelError(what, where=where, hint=hint, kind="E-CONVERT-CANNOT")


def _meaning(spec: TensorSpec | None, kind: str) -> list[tuple[object, ...]] | None:
    """Returns what decides the values that a server computes with.

    How codes and stored scales were chosen is past. A stored scale's dtype is compared by its values. An activation
    that is quantized while the model runs goes by its rule.
    """
    if spec is None:
        return None
    found: list[tuple[object, ...]] = []
    for stage in spec.stages:
        scale = stage.scale
        fixed = kind in ("weight", "bias")
        runs = None if fixed or scale is None or not _at_run_time(stage) else (scale.dtype, scale.rule)
        when = None if fixed or scale is None else scale.outermost.when
        found.append((stage.element, stage.granularity, stage.zero_point, stage.stored, stage.is_two_level, when, runs))
    return found


def _at_run_time(stage: TensorSpec) -> bool:
    """True when scales are computed from every activation: all of them, or those of blocks under a fixed one."""
    return stage.scale is not None and (stage.scale.outermost.when == "dynamic" or stage.is_two_level)


def _fingerprint(source: Source, writer: Writer) -> dict[str, Any]:
    files = {name: list(stamp) for name, stamp in source.stamps.items()}
    return {"convert": source.header_digest(), "files": files, "to": writer.name, "version": __version__}


# ---- one part


def _part(found: Conversion, part: Part, workers: Workers, tell: Listener) -> dict[str, Tensor]:
    """Returns the tensors of a part in the other dialect."""
    plan, read = found.plan, found.checkpoint
    out = {row.info.name: _kept(read, row) for row in contents.copied(plan, part, read.headers, found.owners)}
    packed = contents.Packed(found.writer, plan.quantized(part.index))
    targets = list(plan.quantized(part.index))
    for target, made in zip(targets, workers.map(partial(_packed, found), targets), strict=True):
        tell(Working(f"converted {target.name}"))
        packed.put(target, made)
    out |= packed.tensors
    for module in plan.attention.values():
        if module.part == part.index and module.specs:
            out |= _attention(found, module)
    return out | found.writer.online_tensors(plan, part.index)


def _kept(checkpoint: Checkpoint, row: contents.Copied) -> Tensor:
    """Returns a tensor that is not quantized, as it is stored."""
    if row.target is None:
        return checkpoint.read_many([row.tensor])[row.tensor]
    if row.info.name in checkpoint.source.headers:
        return checkpoint.source.read(row.info.name)
    value: Tensor = row.target.view.of(checkpoint.read_many([row.tensor])[row.tensor]).contiguous()
    return value


def _packed(found: Conversion, target: QuantizedTarget) -> dict[str, Tensor]:
    """Returns the tensors of a quantized weight. Raises ModelError when they are not read back as they were."""
    decoded = found.checkpoint.decode(found.checkpoint.view.targets[target.name])
    static = {
        kind: scale for kind, scale in (("input", decoded.input), ("output", decoded.output)) if scale is not None
    }
    tensors = found.writer.tensors(target, decoded.weight, static, decoded.bias)
    # Alone, before it is put into a tensor of several weights.
    stored = replace(found.there.targets[target.name], tensors=tuple(tensors), places={})
    again = found.back.decode(stored, tensors)
    lost = _lost(decoded, again)
    if lost:
        what = f"format {found.writer.name} does not keep its {lost} as {found.reader.name} does"
        raise _cannot(what, target.name, AGAIN)
    if not _exact(decoded, again):
        found.moved.append(target.name)
    return tensors


def _attention(found: Conversion, module: Attention) -> dict[str, Tensor]:
    """Returns the scales of a cache and of operands. Raises ModelError where one is not read back as it was."""
    read, stored = found.checkpoint, found.checkpoint.view.attention[module.name]
    scales = found.reader.decode_attention(stored, read.source.read_many(stored.scales.values()))
    tensors = found.writer.attention_tensors(module, scales)
    again = found.back.decode_attention(found.there.attention[module.name], tensors)
    lost = [kind for kind, scale in scales.items() if not near(number(scale), number(again.get(kind)))]
    if lost:
        one = f"format {found.writer.name} has one scale for what {found.reader.name} has several of"
        raise _cannot(f"the scale of {lost[0]} would be another: {one}", module.name, AGAIN)
    return tensors


def _lost(ours: Decoded, theirs: Decoded) -> str:
    """Returns what is not the same within one unit in the last place of a scale of the whole tensor; or nothing."""
    for kind, one, other in (("codes", ours.weight, theirs.weight), ("bias", ours.bias, theirs.bias)):
        if one is None or other is None:
            if one is not other:
                return kind
            continue
        if not same_bits(one.codes, other.codes):
            return f"{kind} of the bias" if kind == "bias" else kind
        if not same_bits(one.order, other.order):
            return "order of columns"
        if not same_params(one.params, other.params, ulp=1, values=True):
            return "scales"
    static = ((ours.input, theirs.input), (ours.output, theirs.output))
    return "" if all(near(number(a), number(b)) for a, b in static) else "activation scales"


def _exact(ours: Decoded, theirs: Decoded) -> bool:
    same = same_params(ours.weight.params, theirs.weight.params, values=True)
    return same and all(number(a) == number(b) for a, b in ((ours.input, theirs.input), (ours.output, theirs.output)))


# ---- beside the weights


def _finish(
    found: Conversion, source: Source, partial: Path, records: Mapping[str, Mapping[str, Any]], tell: Listener
) -> dict[str, Any]:
    """Writes all that is beside the weights, checks the whole, and returns the summary."""
    tell(Phase("finalize"))
    plan, writer = found.plan, found.writer
    beside = side_files.gather(source)
    for name in _described(found):
        beside.copied.pop(Path(name), None)
    beside.left_out = {why: names for why, names in beside.left_out.items() if names != [OURS]}
    for line in beside.warnings():
        tell(Message(line, "warning"))
    finish.describe(writer, plan, source, beside, partial, records)
    tell(Phase("verify"))
    checks = verify.against_plan(partial, plan, writer, found.checkpoint.headers)
    facts = _facts(source)
    size = sum(file["size"] for record in records.values() for file in record["files"])
    _carry_over(source, found, partial, checks, records)
    card = card_of_conversion(facts, source.name, found.reader.name, writer, plan, beside.readme)
    atomic_write_text(partial / "README.md", card)
    finish.write_manifest(facts, partial, records)
    return {
        "from": found.reader.name,
        "to": writer.name,
        "weights": len(found.checkpoint.view.targets),
        "bytes": size,
        "one_ulp_off": [name for record in records.values() for name in record["moved"]],
        "loads_in": sorted(writer.loaders(plan)),
        "checks": checks,
    }


def _described(found: Conversion) -> list[str]:
    """Returns the files by which the checkpoint's own dialect describes it: they do not go with it."""
    own = next((writer for writer in dialects.writers() if writer.name == found.reader.name), None)
    if own is None or own.refusals(found.plan):
        return []
    return [name for name in own.files(found.plan) if name != CONFIG_FILE]


def _facts(source: Source) -> dict[str, Any]:
    """Returns what is known of the model that was quantized: from the manifest, else of the checkpoint itself."""
    path = source.folder / MANIFEST
    facts = _json(path).get("source") if manifest.read(source.folder) is not None else None
    return facts if isinstance(facts, dict) else finish.source_facts(source)


def _carry_over(source: Source, found: Conversion, partial: Path, checks: list[str], records: Records) -> None:
    """Writes the report and the recipe of the quantization again, where they are there, with the new dialect."""
    report = _json(source.folder / REPORT)
    if fits(report):
        reason = f"converted from {found.reader.name}; codes and scales are unchanged"
        sizes = {
            target.name: sum(tensor_bytes(info.dtype, info.shape) for info in found.writer.infos(target))
            for target in found.plan.quantized()
        }
        dialect = {"name": found.writer.name, "reason": reason}
        again = converted(report, dialect, checks, sizes, records)
        atomic_write_text(partial / REPORT, written.written(again))
        atomic_write_text(partial / PAGE, page(again))
    path = source.folder / RECIPE
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if isinstance(recipe, dict) and isinstance(recipe.get("export"), dict):
        recipe["export"]["dialect"] = found.writer.name
        atomic_write_text(partial / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120))


def _json(path: Path) -> dict[str, Any]:
    """Returns an object of ours; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        value = text.parse(path.read_bytes(), path.name, paths=True)
    except QuarkError:
        return {}
    return value if isinstance(value, dict) else {}
