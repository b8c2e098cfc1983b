"""Groups the tensors of a plan: those that play the same part in the model and end the same way are one row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quarkcli.dialects.base import Writer
from quarkcli.disk.contents import part_targets
from quarkcli.disk.writer import tensor_bytes
from quarkcli.job.options import Prepared
from quarkcli.plan import words
from quarkcli.plan.model import Target, is_quantized

_ATTENTION = ("q", "q_a", "q_b", "k", "v", "kv", "kv_a", "kv_b", "qkv", "o", "o_a", "o_b")
# Role -> the group that people know it as, and its word there. Other roles are groups of their own.
_KNOWN = {
    **{f"expert_{word}": ("experts", word) for word in ("gate", "up", "down", "gate_up")},
    **{f"shared_{word}": ("shared experts", word) for word in ("gate", "up", "down", "gate_up")},
    **{word: ("attention", word) for word in _ATTENTION},
    **{word: ("mlp", word) for word in ("gate", "up", "down", "gate_up")},
    "norm": ("norms", ""), "embedding": ("embedding", ""), "head": ("head", ""), "other": ("other", ""),
}  # fmt: skip
CACHE = "scales of the KV cache"


@dataclass
class PlanRow:
    """Tensors of one row.

    name     `experts`, `attention`, ... or a role
    words    their projections
    tensors  their number; `parameters` of them, `before` and `after`: bytes in the source and in the output
    how, why what becomes of them, and the reason, in words
    role     that of the first tensor
    errors   of a finished run: those of its weights; `seconds` that they took
    """

    name: str
    how: str
    why: str
    quantized: bool
    words: dict[str, None] = field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0
    before: int = 0
    after: int = 0
    role: str = ""
    errors: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_protected(self) -> bool:
        """True where a default exclusion keeps it."""
        return self.why.startswith(words.PROTECTED)

    @property
    def error(self) -> float | None:
        """Returns the mean of the errors; None where none was measured."""
        return sum(self.errors) / len(self.errors) if self.errors else None

    @property
    def projections(self) -> list[str]:
        """Returns the projections in the order of the table above."""
        order = [word for _, word in _KNOWN.values()]
        return sorted(self.words, key=order.index)

    @property
    def label(self) -> str:
        return " ".join((self.name, *self.projections))

    def add(self, word: str, parameters: int, before: int, after: int) -> None:
        """Counts a tensor."""
        if word:
            self.words.setdefault(word)
        self.tensors += 1
        self.parameters += parameters
        self.before += before
        self.after += after

    def facts(self) -> dict[str, object]:
        """Returns the JSON form."""
        return {
            "name": self.name, "projections": self.projections, "tensors": self.tensors, "parameters": self.parameters,
            "source_bytes": self.before, "output_bytes": self.after, "how": self.how, "why": self.why,
            "quantized": self.quantized,
        }  # fmt: skip


def of_report(rows: Iterable[Mapping[str, Any]], error: str) -> list[PlanRow]:
    """Returns all groups of a finished run, from the rows of its report. `error`: which of a row's errors counts."""
    found: dict[tuple[str, str, str], PlanRow] = {}
    for row in rows:
        name, word = named(row["role"])
        quantized = row["fate"] == "quantized"
        group = found.setdefault((name, row["format"], row["why"]), PlanRow(name, row["format"], row["why"], quantized))
        group.add(word, math.prod(row["shape"]), row["source_bytes"], row["bytes"])
        group.errors += [row[error]] if row[error] is not None else []
        group.seconds += row["seconds"] or 0.0
    return in_order(found.values())


def in_order(found: Iterable[PlanRow]) -> list[PlanRow]:
    """Returns groups: quantized ones first, each kind by size."""
    return sorted(found, key=lambda group: (not group.quantized, -group.before, -group.after))


def named(role: str) -> tuple[str, str]:
    """Returns the group that people know a role as, and its word there."""
    return _KNOWN.get(role, (role.replace("_", " "), ""))


def groups(prepared: Prepared) -> list[PlanRow]:
    """Returns all groups of a plan: quantized ones first, each kind by size."""
    return prepared.plan.once(f"groups in {prepared.dialect.name}", lambda: _groups(prepared))


def _groups(prepared: Prepared) -> list[PlanRow]:
    counting = _Counting(prepared)
    for part in prepared.plan.parts:
        for name in part.tensors:
            counting.tensor(name)
    counting.rest()
    return in_order(counting.found.values())


class _Counting:
    def __init__(self, prepared: Prepared) -> None:
        self.plan, self.writer = prepared.plan, prepared.dialect
        self.headers, self.roles = prepared.weights.headers, prepared.layout.tensor_roles
        self.owners = part_targets(self.plan)
        self.found: dict[tuple[str, str, str], PlanRow] = {}
        self._ends: dict[object, tuple[str, str, int]] = {}
        self._dropped, self._kept = self.plan.dropped, self.plan.kept

    def tensor(self, name: str) -> None:
        """Counts a source tensor, and the weights in it one by one where some are quantized."""
        header = self.headers[name]
        own = self.owners.get(name, [])
        if not own or name in self._kept or name in self._dropped:
            size, role = tensor_bytes(header.dtype, header.shape), self.roles.get(name, "other")
            how, why = words.stored(header.dtype), words.reason(self._kept.get(name, ""))
            gone = self._dropped.get(name)
            if gone is not None:
                how, why = "dropped", gone
            elif name not in self._kept:
                how, why = "with its weight", "a quantized bias"
            elif why.startswith(f"{role}: "):
                why = why.partition(": ")[2]
            self._group(role, how, why, False, math.prod(header.shape), size, 0 if gone is not None else size)
            return
        for target in own:
            how, why, after = self._end(target)
            self._group(target.role, how, why, is_quantized(target), target.numel, _bytes(target), after)

    def rest(self) -> None:
        """Counts what the output has beside the source's tensors."""
        cache = [info for module in self.plan.attention.values() for info in self.writer.attention_infos(module)]
        if cache:
            group = PlanRow(CACHE, "", words.why_cached(self.plan), True)
            for info in cache:
                group.add("", 0, 0, tensor_bytes(info.dtype, info.shape))
            self.found[CACHE, "", ""] = group

    def _end(self, target: Target) -> tuple[str, str, int]:
        """Returns how, why and the bytes in the output; once for all targets that ended alike."""
        key = id(target.slots), target.shape, target.dtype, target.bias is None, target.name in self.plan.carried
        if key not in self._ends:
            after = _packed(self.writer, target) if is_quantized(target) else _bytes(target)
            self._ends[key] = words.how(target), words.why(self.plan, target), after
        return self._ends[key]

    def _group(self, role: str, how: str, why: str, quantized: bool, *counts: int) -> None:
        name, word = named(role)
        group = self.found.setdefault((name, how, why), PlanRow(name, how, why, quantized, role=role))
        group.add(word, *counts)


def _bytes(target: Target) -> int:
    return tensor_bytes(target.dtype, target.shape)


def _packed(writer: Writer, target: Target) -> int:
    assert is_quantized(target)
    return sum(tensor_bytes(info.dtype, info.shape) for info in writer.infos(target))
