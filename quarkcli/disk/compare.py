"""Compares two checkpoints tensor by tensor: what only one has, and how far their values lie apart.

Either may be quantized or not, in any dialect that is read; experts are compared one by one, whether a file holds them
fused or not. One tensor of each is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quarkcli.disk import nearest, rewritten
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.errors import CheckError
from quarkcli.events import Listener, Working, silent
from quarkcli.family import Weight

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.dialects.base import Decoded, StoredTarget
    from quarkcli.numerics.quantize import QParams
    from quarkcli.spec import TensorSpec

SCHEMA = "quark/compare/1"
_CHUNK = 2**22  # values that are widened to float64 at once


@dataclass(frozen=True)
class Row:
    """One tensor of both.

    a, b       how each holds it: a dtype, or the spec of its codes
    signal     sum of squares of the reference
    noise      sum of squares of the differences; NaN where either holds NaN and the other not the same
    largest    the largest difference
    identical  equal bit for bit: codes and scales of a quantized weight, else the bytes
    codes      of quantized weights: codes and block scales are equal bit for bit, and a scale of the whole tensor is
               within one unit in the last place: some dialects store it and some its inverse
    damage     what is wrong with the codes or scales in `a` alone, where it looked `closely` (`disk.nearest`)
    """

    name: str
    a: str
    b: str
    signal: float
    noise: float
    largest: float
    identical: bool
    codes: bool = False
    damage: str = ""

    @property
    def sqnr(self) -> float:
        """Returns the ratio of signal to noise in dB: inf for equal values, -inf where nothing of it is left."""
        if self.noise == 0:
            return math.inf
        if not math.isfinite(self.noise) or self.signal == 0:
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)


@dataclass
class Comparison:
    """All that two checkpoints differ in.

    reference  `a` or `b`: whose values are the signal. The one that is not quantized, else the first
    rows       tensors that both have, worst first
    scales     static scale of an activation that differs by more than one ulp -> its values in both
    turned     weights whose columns are turned by a Hadamard in one of them; they are turned back to be compared
    rewritten  tensors that differ, and that an algorithm rewrote in one of them together with others: what the model
               computes stays, so their own difference says nothing of the loss
    """

    a: str
    b: str
    reference: str
    rows: list[Row] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    scales: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    turned: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """True when names, shapes, codes, scales and everything else are equal bit for bit."""
        return self.complete and not self.scales and not self.turned and all(row.identical for row in self.rows)

    @property
    def complete(self) -> bool:
        return not (self.only_a or self.only_b or self.shapes)

    @property
    def sqnr(self) -> float:
        """Returns the ratio in dB over all tensors that are not identical; inf when all are."""
        rows = [row for row in self.rows if not row.identical]
        signal, noise = sum(row.signal for row in rows), sum(row.noise for row in rows)
        return Row("", "", "", signal, noise, 0.0, False).sqnr

    def as_dict(self, limit: int | None = None) -> dict[str, Any]:
        """Returns the JSON form, with `limit` tensors at most. A ratio that is not finite is null."""
        return {
            "a": self.a,
            "b": self.b,
            "reference": self.reference,
            "identical": self.identical,
            "compared": len(self.rows),
            "equal_bit_for_bit": sum(row.identical for row in self.rows),
            "equal_codes": sum(row.codes for row in self.rows),
            "sqnr_db": _finite(self.sqnr),
            "only_in_a": self.only_a,
            "only_in_b": self.only_b,
            "shapes_differ": {name: {"a": list(a), "b": list(b)} for name, (a, b) in self.shapes.items()},
            "scales_differ": {name: {"a": a, "b": b} for name, (a, b) in self.scales.items()},
            "turned": self.turned,
            "rewritten": self.rewritten,
            "tensors": [
                {
                    "name": row.name, "a": row.a, "b": row.b, "sqnr_db": _finite(row.sqnr),
                    "largest_difference": _finite(row.largest), "equal_values": row.noise == 0,
                    "equal_bit_for_bit": row.identical, "equal_codes": row.codes,
                }
                for row in self.rows[:limit]
            ],
        }  # fmt: skip


def compare(a: Checkpoint, b: Checkpoint, tell: Listener = silent, *, closely: bool = False) -> Comparison:
    """Returns the comparison of two checkpoints. Raises ModelError for one that is quantized and not read here."""
    first, second = _Side(a), _Side(b)
    swapped = a.quantized and not b.quantized
    found = Comparison(a.source.name, b.source.name, "b" if swapped else "a")
    found.only_a = [name for name in first.shapes if name not in second.shapes]
    found.only_b = [name for name in second.shapes if name not in first.shapes]
    for name, shape in first.shapes.items():
        if name in second.shapes and second.shapes[name] != shape:
            found.shapes[name] = shape, second.shapes[name]
    names = [name for name in first.shapes if second.shapes.get(name) == first.shapes[name]]
    for count, name in enumerate(names, 1):
        tell(Working(f"comparing {name}, {count} of {len(names)}"))
        found.rows.append(_row(name, first, second, swapped, found, closely))
    found.scales |= _attention_scales(first, second)
    found.rows.sort(key=lambda row: row.sqnr)
    different = [row.name for row in found.rows if not row.identical]
    found.rewritten = rewritten.among(different, a, b)
    return found


def check(found: Comparison, least: float | None, limit: int | None = None) -> dict[str, Any]:
    """Returns the JSON form (`quark/compare/1`), with `limit` tensors at most.

    Raises CheckError when a tensor is below `least` dB, or cannot be compared; None: nothing is asked. It has the form
    as its `result`.
    """
    shown = {"schema": SCHEMA, "ok": True, **found.as_dict(limit), "min_sqnr_db": least}
    try:
        _check(found, least)
    except CheckError as error:
        error.result = {**shown, "ok": False}
        raise
    return shown


def _check(found: Comparison, least: float | None) -> None:
    if least is None:
        return
    bad = [row for row in found.rows if row.sqnr < least]
    if bad:
        worst = bad[0]
        what = f"{len(bad)} of {len(found.rows)} tensors are below {least:g} dB; the worst has {decibels(worst.sqnr)}"
        hint = (
            "measure the loss with 'quark eval': an algorithm rewrote the tensor"
            if worst.name in found.rewritten
            else ""
        )
        raise CheckError(what, where=worst.name, hint=hint, kind="E-GATE-COMPARE")
    if not found.complete:
        lost = [*found.only_a, *found.only_b, *found.shapes]
        what = f"{len(lost)} tensors are only in one checkpoint or have another shape in the other"
        raise CheckError(what, where=lost[0], kind="E-GATE-COMPARE")


def decibels(value: float) -> str:
    """Returns a ratio for people: `21.34 dB`; `equal` for equal values, `lost` where nothing of the signal is left."""
    if math.isinf(value):
        return "equal" if value > 0 else "lost"
    return f"{value:.2f} dB"


class _Side:
    """One of the two: its tensors by the names and shapes that both kinds of file agree on, experts one by one."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        weights = checkpoint.layout.weights
        self.weights: dict[str, Weight] = {f"{name}.weight": weight for name, weight in weights.items()}
        owned = {weight.view.tensor for weight in weights.values()}
        self.shapes = {name: tuple(header.shape) for name, header in checkpoint.headers.items() if name not in owned}
        self.shapes |= {name: weight.shape for name, weight in self.weights.items()}
        self._whole: dict[str, Tensor] = {}  # the fused tensor that was read last

    def stored(self, name: str) -> StoredTarget | None:
        """Returns the quantized weight that this tensor is."""
        return self.checkpoint.view.targets.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def turned(self, name: str) -> int | None:
        """Returns the size of the Hadamard blocks by which the weight is turned, None for none."""
        return self.checkpoint.view.online.get(name.removesuffix(".weight"))

    def read(self, name: str) -> Tensor:
        """Returns a tensor that is not quantized, as it is stored; of a quantized bias its values."""
        source, weight = self.checkpoint.source, self.weights.get(name)
        if weight is None:
            module = name.removesuffix(".bias")
            quantized = name not in source.headers and module in self.checkpoint.view.targets
            return self.checkpoint.bias(module) if quantized else self._read(name)
        tensor = weight.view.tensor
        if tensor not in source.headers:  # one of experts that the family's own files have fused
            return self._read(name)
        if self._whole.keys() != {tensor}:
            self._whole = {}
            self._whole = {tensor: source.read(tensor)}
        part: Tensor = weight.view.of(self._whole[tensor])
        return part

    def _read(self, name: str) -> Tensor:
        """Returns a tensor by the name that it has in the files, or in published ones."""
        read = self.checkpoint.source if name in self.checkpoint.source.headers else self.checkpoint
        return read.read_many([name])[name]


def _row(name: str, first: _Side, second: _Side, swapped: bool, found: Comparison, closely: bool) -> Row:
    """Compares one tensor. Notes static scales that differ, and turned weights, in `found`."""
    targets = first.stored(name), second.stored(name)
    blocks = first.turned(name), second.turned(name)
    decoded = [side.checkpoint.decode(t) if t else None for side, t in zip((first, second), targets, strict=True)]
    values, texts = [], []
    for side, target, codes in zip((first, second), targets, decoded, strict=True):
        values.append(_values(side, name, target, codes))
        texts.append(target.weight.describe() if target else str(values[-1].dtype).removeprefix("torch."))
    if blocks[0] != blocks[1]:
        found.turned.append(name)
        values = [_turned_back(value, block) for value, block in zip(values, blocks, strict=True)]
    module = name.removesuffix(".weight")
    found.scales |= {f"{module}.{kind}": pair for kind, pair in _static(decoded)}
    alike = blocks[0] == blocks[1]
    same = _same_codes(targets, decoded) if all(targets) else same_bits(*_rounded(values, targets))
    near = alike and any(targets) and _same_codes(targets, decoded, ulp=1)
    reference, other = values[::-1] if swapped else values
    signal, noise, largest = _difference(reference, other)
    (target, source), own, damage = targets, decoded[0], ""
    if closely and alike and target is not None and own is not None and source is None:
        damage = nearest.damage(target, own.weight, values[1])
    return Row(name, texts[0], texts[1], signal, noise, largest, same and alike, near, damage)


def _rounded(values: list[Tensor], targets: tuple[StoredTarget | None, ...]) -> list[Tensor]:
    """Returns both values; those of the one that is quantized, if only one is, in the dtype of the other."""
    (first, second), (one, other) = values, targets
    if (one is None) == (other is None):
        return values
    return [first, second.to(first.dtype)] if one is None else [first.to(second.dtype), second]


def _values(side: _Side, name: str, target: StoredTarget | None, decoded: Decoded | None) -> Tensor:
    return side.read(name) if target is None or decoded is None else side.checkpoint.values(target, decoded)


def _turned_back(values: Tensor, block: int | None) -> Tensor:
    """Returns a weight as it was before its columns were turned."""
    from quarkcli.numerics.hadamard import turned

    return values if block is None else turned(values, block)  # Sylvester's matrix is its own inverse


def _difference(reference: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Returns the sum of squares of the reference, that of the differences, and the largest difference."""
    import torch

    signal, noise, largest = 0.0, 0.0, 0.0
    pairs = zip(reference.reshape(-1).split(_CHUNK), other.reshape(-1).split(_CHUNK), strict=True)
    for left, right in pairs:
        x, y = left.to(torch.float64), right.to(torch.float64)
        gap = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, x - y).abs()
        finite = x.where(x.isfinite(), 0.0)
        signal += float(finite.square().sum())
        noise += float(gap.square().sum())
        if gap.numel():
            largest = max(largest, float(gap.nan_to_num(math.inf).max()))
    return signal, noise, largest


def _static(decoded: list[Decoded | None]) -> Iterator[tuple[str, tuple[float | None, float | None]]]:
    """Yields static scales of activations that are more than one ulp apart, where both are quantized."""
    first, second = decoded
    if first is None or second is None:
        return
    for kind, a, b in (("input", first.input, second.input), ("output", first.output, second.output)):
        pair = number(a), number(b)
        if not near(*pair):
            yield kind, pair


def _attention_scales(first: _Side, second: _Side) -> dict[str, tuple[float | None, float | None]]:
    """Returns the scales of caches and attention that are more than one ulp apart, where both are quantized."""
    if not (first.checkpoint.quantized and second.checkpoint.quantized):
        return {}
    ours, theirs = _of_attention(first.checkpoint), _of_attention(second.checkpoint)
    names = [*ours, *(name for name in theirs if name not in ours)]
    return {name: (ours.get(name), theirs.get(name)) for name in names if not near(ours.get(name), theirs.get(name))}


def _of_attention(checkpoint: Checkpoint) -> dict[str, float]:
    found: dict[str, float] = {}
    for stored in checkpoint.view.attention.values():
        assert checkpoint.reader is not None
        if not stored.specs:  # a scale for every head: nothing to compare them with
            continue
        tensors: Mapping[str, Tensor] = checkpoint.source.read_many(stored.scales.values())
        scales = checkpoint.reader.decode_attention(stored, tensors)
        found |= {f"{stored.name}.{kind}": float(scale) for kind, scale in scales.items()}
    return found


def _same_codes(targets: tuple[StoredTarget | None, ...], decoded: list[Decoded | None], ulp: int = 0) -> bool:
    """True when both are quantized, to the same format, with the same codes and scales. `ulp`: see `same_params`."""
    (first, second), (ours, theirs) = targets, decoded
    if first is None or second is None or ours is None or theirs is None:
        return False
    if _format(first.weight) != _format(second.weight):
        return False
    if not (same_bits(ours.weight.order, theirs.weight.order) and same_bits(ours.weight.codes, theirs.weight.codes)):
        return False
    return same_params(ours.weight.params, theirs.weight.params, ulp)


def _format(spec: TensorSpec) -> list[tuple[object, ...]]:
    """Returns what codes and scales mean, apart from how they were chosen."""
    return [(stage.element, stage.granularity, stage.zero_point, stage.stored) for stage in spec.stages]


def same_params(first: QParams, second: QParams, ulp: int = 0, values: bool = False) -> bool:
    """True when all scales, zero points and shift bits are equal bit for bit.

    ulp     how far scales of the whole tensor may be apart, in units in the last place of float32
    values  scales of other dtypes and shapes with equal values are equal
    """
    same = _same_values if values else same_bits
    if (first.then is None) != (second.then is None):
        return False
    if first.then is not None and second.then is not None and not same_params(first.then, second.then, ulp, values):
        return False
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("scale", "global_scale", "zero_point", "shift")]
    return all(same(a, b) or (ulp > 0 and number(a) is not None and near(number(a), number(b), ulp)) for a, b in pairs)


def same_bits(first: Tensor | None, second: Tensor | None) -> bool:
    """True for tensors of one dtype with the same bytes, and where both are absent."""
    import torch

    if first is None or second is None:
        return first is second
    if first.dtype != second.dtype or first.numel() != second.numel():
        return False
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(a, b)


def _same_values(first: Tensor | None, second: Tensor | None) -> bool:
    """True for equal bits, and for floats or whole numbers of two dtypes with equal values."""
    import torch

    if same_bits(first, second):
        return True
    if first is None or second is None or first.numel() != second.numel():
        return False
    if first.is_floating_point() != second.is_floating_point():  # a code of a scale is no scale
        return False
    return torch.equal(first.double().reshape(-1), second.double().reshape(-1))


def number(scale: Tensor | None) -> float | None:
    """Returns a scale of the whole tensor; None for scales of parts, and where there is none."""
    return float(scale) if scale is not None and scale.dim() == 0 and scale.is_floating_point() else None


def near(a: float | None, b: float | None, ulp: int = 1) -> bool:
    """True when both are there, and so many units in the last place of float32 apart at most; or both are absent."""
    if a is None or b is None:
        return a is b
    return abs(a - b) <= ulp * math.ldexp(1.0, math.frexp(a)[1] - 24)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
