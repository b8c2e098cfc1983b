"""Tells tensors that an algorithm rewrote from those that are simply wrong, where no report says which."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.writer import bytes_of
from quarkcli.errors import CheckError, some
from quarkcli.family import Pair, Weight

# How much nearer a reader is to the source as it is than scaled back, in squares: its norm was changed without it.
_NEARER = 1.25
# How far off it may be, in squares of its values: codes lose less, and turned or permuted weights are further off.
_NOISE = 0.5
_ROWS = 4096  # of a reader that tell
_SMALL = 2**20  # values: norms and biases, among which one looks for the values of another


def check(checkpoint: Checkpoint, original: Checkpoint, changed: Collection[str]) -> None:
    """Raises CheckError for changes that no algorithm makes. `changed`: kept tensors that differ.

    An algorithm that changes a norm divides the weights that read it, or turns them and leaves the norm at ones. One
    that turns what all blocks read changes embedding and head together.
    """
    moved = [f"{name} (those of {other})" for name, other in _moved(checkpoint, original, changed)]
    if moved:
        what = f"{len(moved)} kept tensors have the values of another tensor of the original model: {some(moved)}"
        raise CheckError(what, hint="write the checkpoint again", kind="E-CHECK-VALUES")
    alone = [pair.source for pair in _norms(original, changed) if _is_alone(pair, checkpoint, original)]
    if alone:
        what = f"{len(alone)} norms have other values, and the weights that read them are not scaled to match"
        raise CheckError(f"{what}: {some(alone)}", hint="write the checkpoint again", kind="E-CHECK-VALUES")
    if outside := _outside(checkpoint, original, changed):
        what = f"{len(outside)} tensors outside the blocks have other values, and those beside them do not match"
        raise CheckError(f"{what}: {some(outside)}", hint="write the checkpoint again", kind="E-CHECK-VALUES")


def _outside(checkpoint: Checkpoint, original: Checkpoint, changed: Collection[str]) -> list[str]:
    """Returns changed ones of embedding, last norm and head that are not changed as an algorithm does it.

    What changes the norm or the embedding changes the head as well, and nothing changes a head alone. An embedding that
    is the head too may be changed alone. Nothing is known where one of them is quantized.
    """
    heads, tables = _of_role(original, "head"), _of_role(original, "embedding")
    readers, others = (heads, _last_norms(original) | tables) if heads else (tables, _last_norms(original))
    quantized = any(name.removesuffix(".weight") in checkpoint.view.targets for name in readers | others)
    if not readers or quantized or not (readers | others).issubset(checkpoint.source.headers):
        return []
    if readers.isdisjoint(changed):
        return sorted(others.intersection(changed))
    return sorted(readers) if heads and others.isdisjoint(changed) else []


def _of_role(side: Checkpoint, role: str) -> set[str]:
    return {weight.view.tensor for weight in side.layout.weights.values() if weight.role == role}


def _last_norms(side: Checkpoint) -> set[str]:
    tail = {tensor for part in side.layout.parts if part.kind == "tail" for tensor in part.tensors}
    return {tensor for tensor in tail if side.layout.tensor_roles.get(tensor) == "norm" and tensor.endswith(".weight")}


def _moved(checkpoint: Checkpoint, original: Checkpoint, changed: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields changed tensors that hold exactly what another one of the original does, and its name."""
    import torch

    small = {n for n, header in original.source.headers.items() if torch.Size(header.shape).numel() <= _SMALL}
    names = [name for name in changed if name in small and name in checkpoint.source.headers]
    if not names:
        return
    shapes = {tuple(original.source.headers[name].shape) for name in names}
    held: dict[bytes, str] = {}
    for name in small:
        if tuple(original.source.headers[name].shape) in shapes:
            held.setdefault(bytes(bytes_of(original.source.read(name))), name)
    for name in names:
        values = checkpoint.source.read(name)
        flat = values.reshape(-1)
        other = held.get(bytes(bytes_of(values)))
        if other not in (None, name) and bool((flat != flat[0]).any()):  # ones are what a rotation leaves
            yield name, str(other)


def _norms(original: Checkpoint, changed: Collection[str]) -> Iterator[Pair]:
    """Yields the changed norms whose channels an algorithm may scale, and what reads them."""
    layout = original.layout
    by_part: dict[int, dict[str, Weight]] = {part.index: {} for part in layout.parts}
    for name, weight in layout.weights.items():
        by_part[weight.part][name] = weight
    for part in layout.parts:
        weights = by_part[part.index]
        vectors = set(part.tensors) - {weight.view.tensor for weight in weights.values()}
        pairs = layout.rewrites.pairs(part.name, weights, vectors) if part.block is not None else []
        yield from (pair for pair in pairs if pair.norm and f"{pair.source}.weight" in changed)
    heads = tuple(name for name, weight in layout.weights.items() if weight.role == "head")
    for name in _last_norms(original).intersection(changed) if heads else ():
        yield Pair(name.removesuffix(".weight"), True, heads)


def _is_alone(pair: Pair, checkpoint: Checkpoint, original: Checkpoint) -> bool:
    """True where the first weight behind a changed norm is the source's, but for the noise of its codes."""
    reader, name = pair.readers[0], f"{pair.source}.weight"
    sides = checkpoint, original
    if any(side.view.online or not _holds(side, reader) for side in sides):
        return False
    offset = original.layout.rewrites.norm_offset
    now, was = (side.source.read(name).double() + offset for side in sides)
    ours, theirs = (side.weight(reader)[:_ROWS].double() for side in sides)
    if bool((was == 0).any()) or ours.shape != theirs.shape or ours.shape[-1:] != now.shape:
        return False
    plain, scaled = ((ours * factor - theirs).norm() for factor in (1.0, now / was))
    return bool(plain.square() < _NOISE * theirs.square().sum()) and bool(plain.square() * _NEARER < scaled.square())


def _holds(side: Checkpoint, module: str) -> bool:
    return module in side.view.targets or f"{module}.weight" in side.source.headers
