"""Makes the rows of a report: every tensor, every measured activation, every part.

What a plan knows stands there from the start; the records of finished parts fill in what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from quarkcli.dialects.base import Writer
from quarkcli.disk.contents import part_targets
from quarkcli.disk.writer import tensor_bytes
from quarkcli.family import HeaderLike
from quarkcli.plan import words
from quarkcli.plan.model import Part, Plan, Target, is_quantized

Row = dict[str, Any]
Records = Mapping[str, Mapping[str, Any]]


def planned(plan: Plan, writer: Writer, headers: Mapping[str, HeaderLike], roles: Mapping[str, str]) -> list[Row]:
    """Returns a row for every weight of a source tensor that is quantized in whole or part, and for every other tensor.

    headers   of the source
    roles     of its tensors
    """
    owners, fates = part_targets(plan), plan.fates()
    rows: list[Row] = []
    ends: dict[object, Row] = {}
    for part in plan.parts:
        for name in part.tensors:
            own = owners.get(name, [])
            if fates[name].kind == "quantized" and own:
                rows += [_weight(plan, writer, part, target, ends) for target in own]
            else:
                role = own[0].role if own else roles.get(name, "other")
                rows.append(_whole(part, name, role, fates[name], headers[name]))
    return rows


def _row(part: Part, name: str, tensor: str, role: str, shape: Sequence[int], expert: int | None = None) -> Row:
    place: Row = {
        "name": name,
        "tensor": tensor,
        "part": part.name,
        "layer": part.block,
        "expert": expert,
        "role": role,
    }
    return {**place, "shape": list(shape)}


def _weight(plan: Plan, writer: Writer, part: Part, target: Target, ends: dict[object, Row]) -> Row:
    """Returns the row of a weight. `ends`: what is the same for all that ended alike."""
    key = id(target.slots), target.shape, target.dtype, target.bias is None, target.name in plan.carried
    if key not in ends:
        before = after = tensor_bytes(target.dtype, target.shape)
        if is_quantized(target):
            after = sum(tensor_bytes(info.dtype, info.shape) for info in writer.infos(target))
        fate = "quantized" if is_quantized(target) else "kept"
        ends[key] = _end(fate, words.why(plan, target), words.how(target), target.numel, before, after)
    expert = target.expert[1] if target.expert else None
    row = _row(part, target.name, target.view.tensor, target.role, target.shape, expert)
    return {**row, **ends[key]}


def _whole(part: Part, name: str, role: str, fate: Any, header: HeaderLike) -> Row:
    size = tensor_bytes(header.dtype, header.shape)
    dropped = fate.kind == "dropped"
    how = "not written" if dropped else "with its weight" if fate.kind == "quantized" else words.stored(header.dtype)
    row = _row(part, name, name, role, header.shape)
    count = math.prod(header.shape)
    return {**row, **_end(fate.kind, words.reason(fate.reason), how, count, size, 0 if dropped else size)}


def _end(fate: str, why: str, how: str, count: int, before: int, after: int) -> Row:
    sizes: Row = {"bits": round(8 * after / count, 4) if count else 0.0, "source_bytes": before, "bytes": after}
    return {"fate": fate, "format": how, "why": why, **sizes, "error": None, "output_error": None, "seconds": None}


def measured(rows: Iterable[Row], records: Records) -> list[Row]:
    """Returns the rows of tensors with what the parts that are done found.

    error          |W - Q| / |W| of a quantized weight
    output_error   |(W - Q) X| / |W X| on held-out tokens, else on those that were fitted to: where a solver measured it
    seconds        of solving (shared evenly by what is solved together) and packing
    """
    found = []
    for row in rows:
        record, name = records.get(row["part"]), row["name"]
        if record is None or name not in record["weight_errors"]:
            found.append(row)
            continue
        outcome = record["outcomes"].get(name)
        seconds = record["weight_seconds"].get(name)
        measures = {"error": record["weight_errors"][name], "output_error": _output_error(outcome), "seconds": seconds}
        found.append({**row, **measures})
    return found


def _output_error(outcome: Mapping[str, Any] | None) -> float | None:
    """Returns the root of the share of a weight's outputs that is lost; None where a tuner changed its codes since."""
    if outcome is None or outcome.get("tuned"):
        return None
    share = outcome["after"] if outcome["held_after"] is None else outcome["held_after"]
    return math.sqrt(share) if math.isfinite(share) and share >= 0 else None


def parts(plan: Plan, rows: Iterable[Row]) -> list[Row]:
    """Returns a row for every part of the walk, as it is planned."""
    sizes: dict[str, list[int]] = {}
    for tensor in rows:
        size = sizes.setdefault(tensor["part"], [0, 0, 0])
        for place, value in enumerate((1, tensor["source_bytes"], tensor["bytes"])):
            size[place] += value
    found = []
    for part in plan.parts:
        count, before, after = sizes.get(part.name, (0, 0, 0))
        row: Row = {"name": part.name, "kind": part.kind, "layer": part.block, "tensors": count}
        found.append({**row, "source_bytes": before, "bytes": after, "done": False, **dict.fromkeys(_MEASURED)})
    return found


_MEASURED = ("output_error", "weight_error", "seconds", "rss_bytes", "peak_rss_bytes", "peak_gpu_bytes")


def measured_parts(rows: Iterable[Row], records: Records) -> list[Row]:
    """Returns the rows of parts with what those that are done took and cost. `bytes`: of their files, then."""
    return [{**row, **_part(records[row["name"]])} if row["name"] in records else row for row in rows]


def _part(record: Mapping[str, Any]) -> Row:
    errors = record["weight_errors"].values()
    memory = {key: record[key] for key in ("rss_bytes", "peak_rss_bytes", "peak_gpu_bytes")}
    return {
        "bytes": sum(file["size"] for file in record["files"]),
        "done": True,
        "output_error": record["output_error"],
        "weight_error": fmean(errors) if errors else None,
        "seconds": round(record["seconds"], 4),
        **memory,
    }


def sites(plan_parts: Iterable[Row], records: Records) -> list[Row]:
    """Returns a row for every activation that calibration measured, in the order of the parts."""
    return list(_sites(plan_parts, records))


def _sites(plan_parts: Iterable[Row], records: Records) -> Iterator[Row]:
    for part in plan_parts:
        for name, facts in records.get(part["name"], {}).get("sites", {}).items():
            yield {"name": name, "part": part["name"], "layer": part["layer"], **facts}


def converted(
    report: Mapping[str, Any], dialect: Row, checks: list[str], sizes: Mapping[str, int], records: Records
) -> Row:
    """Returns the report of a checkpoint that was written again in another dialect.

    sizes     bytes of every quantized weight there
    records   of its parts, with their files
    """
    files = {name: sum(file["size"] for file in record["files"]) for name, record in records.items()}
    rows = [_resized(row, sizes.get(row["name"], row["bytes"])) for row in report["tensors"]]
    parts = [{**row, "bytes": files.get(row["name"], row["bytes"])} for row in report["parts"]]
    size = report["size"] | {"output_bytes": sum(files.values()), "planned_bytes": sum(files.values())}
    return {**report, "dialect": dialect, "checks": checks, "size": size, "parts": parts, "tensors": rows}


def _resized(row: Row, size: int) -> Row:
    count = math.prod(row["shape"])
    return {**row, "bytes": size, "bits": round(8 * size / count, 4) if count else 0.0}
