"""Decides whether fused experts are stored [experts, out, in] or [experts, in, out].

Each layer gets one decision. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quarkcli.errors import ModelError
from quarkcli.family.config import hidden_size
from quarkcli.family.schema import ExpertsModel, FamilyModel, FusedModel, HeaderLike

_HINT = "write a family file with transpose: true or false in experts.fused; docs/models.md explains it"


@dataclass(frozen=True)
class _Stored:
    """A fused tensor of a layer: its name, its rule, and the two sizes of one expert's matrix as the file has it."""

    name: str
    rule: FusedModel
    rows: int
    columns: int

    def sizes(self, reading: bool, reads: bool) -> tuple[int, int] | None:
        """Returns (hidden, inner) as the rule says, an open one read as `reading`; None for rows that do not split.

        Gate and up read the hidden state, down writes it.
        """
        transposed = reading if self.rule.transpose == "auto" else self.rule.transpose
        hidden, own = (self.columns, self.rows) if reads != transposed else (self.rows, self.columns)
        count = len(self.rule.targets)
        rows = own if reads else hidden
        return None if rows % count else (hidden, own // count if reads else own)


def decide(
    experts: ExpertsModel, blocks: Sequence[str], headers: Mapping[str, HeaderLike], hidden: int | None
) -> dict[str, FusedModel]:
    """Returns a mapping from fused tensor to its rule with `transpose` decided, for every block that has some.

    Projections of a layer must agree on hidden and inner size, and the hidden size is the config's. A layer whose
    shapes allow both readings takes that of the layers that can tell. Raises ModelError where none can, and where the
    shapes contradict the family file.
    """
    layers = [own for block in blocks if (own := _stored(experts, block, headers))]
    allowed = [(layer, _readings(experts, layer, hidden)) for layer in layers]
    told = {readings[0] for _, readings in allowed if len(readings) == 1}
    found = {
        name: rule
        for block in blocks
        for name, rule in (experts.fused_tensors(block).items() if experts.fused else ())
        if rule.stacked and name in headers
    }
    for layer, readings in allowed:
        left = readings if len(readings) == 1 else [reading for reading in readings if reading in told]
        if len(left) != 1:
            raise _undecided(layer, readings, hidden)
        for tensor in layer:
            auto = tensor.rule.transpose == "auto"
            found[tensor.name] = tensor.rule.model_copy(update={"transpose": left[0]}) if auto else tensor.rule
    return found


def hidden_transpositions(
    family: FamilyModel, config: Mapping[str, Any], headers: Mapping[str, HeaderLike]
) -> frozenset[str]:
    """Returns fused tensors stored [experts, in, out] with a square shape, of families with files of both kinds."""
    experts = family.experts
    if experts is None or all(rule.transpose != "auto" for rule in experts.fused.values()):
        return frozenset()
    start = re.compile(re.escape(family.blocks) + r"\.\d+(?=\.)")
    blocks = list(dict.fromkeys(found[0] for name in headers if (found := start.match(name))))
    decided = decide(experts, blocks, headers, hidden_size(config))
    return frozenset(name for name, rule in decided.items() if rule.transpose and len({*headers[name].shape[1:]}) == 1)


def stored_transposed(
    linears: Iterable[tuple[str, str | None]], headers: Mapping[str, HeaderLike], config: Mapping[str, Any]
) -> tuple[str, ...]:
    """Returns linears stored [in, out], as transformers' Conv1D is (GPT-2, OpenAI GPT, ImageGPT).

    The bias has as many values as there are outputs; without one, names that Conv1D has read or write the hidden
    size. Square ones cannot tell, and count where others do.

    linears   (module name, name of its bias)
    """
    hidden, found, square = hidden_size(config), [], []
    for name, bias in linears:
        out, inner = headers[f"{name}.weight"].shape
        if out == inner:
            square.append(name)
        elif (bias is not None and headers[bias].shape == (inner,)) or (
            bias is None and _reads(name) is not None and hidden == (out if _reads(name) else inner)
        ):
            found.append(name)
    return (*found, *square) if found else ()


def _reads(name: str) -> bool | None:
    """True when a module with one of Conv1D's names reads the residual stream, False when it writes it, else None."""
    if name.endswith((".c_attn", ".c_fc")):
        return True
    return False if name.endswith(".mlp.c_proj") else None


def _stored(experts: ExpertsModel, block: str, headers: Mapping[str, HeaderLike]) -> list[_Stored]:
    tensors = experts.fused_tensors(block)
    shapes = {name: headers[name].shape for name in tensors if name in headers}
    return [
        _Stored(name, tensors[name], *shape[1:])
        for name, shape in shapes.items()
        if len(shape) == 3 and not tensors[name].stacked
    ]


def _readings(experts: ExpertsModel, layer: list[_Stored], hidden: int | None) -> list[bool]:
    """Returns the readings that all shapes of a layer allow.

    One stands for both where the family leaves nothing open.
    """
    sides = {side for tensor in layer for side in (tensor.rows, tensor.columns)}
    wanted = hidden if hidden in sides else None  # experts may read a latent of another size
    auto = any(tensor.rule.transpose == "auto" for tensor in layer)
    return [reading for reading in ((False, True) if auto else (False,)) if _fits(experts, layer, wanted, reading)]


def _fits(experts: ExpertsModel, layer: list[_Stored], hidden: int | None, reading: bool) -> bool:
    sizes = {tensor.sizes(reading, experts.down not in tensor.rule.targets) for tensor in layer}
    found = next(iter(sizes))
    return len(sizes) == 1 and found is not None and hidden in (None, found[0])


def _undecided(layer: list[_Stored], readings: list[bool], hidden: int | None) -> ModelError:
    shapes = ", ".join(f"{tensor.name} [.., {tensor.rows}, {tensor.columns}]" for tensor in layer)
    if len(readings) == 2:
        what = f"the order of the axes of experts, [out, in] or [in, out], is unknown: {shapes}"
    else:
        what = f"the shapes of fused experts fit neither each other nor a hidden size of {hidden}: {shapes}"
        if any(tensor.rule.transpose != "auto" for tensor in layer):
            what = (
                f"fused experts are not stored as the family file says, or do not have hidden size {hidden}: {shapes}"
            )
    return ModelError(what, where=layer[0].name, hint=_HINT, kind="E-MODEL-FAMILY")
