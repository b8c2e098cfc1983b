"""Tells norms that an algorithm rewrote from norms that are simply wrong, where no report says which were rewritten."""

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
_SMALL = 2**20  # values: norms and biases, among which one looks for the values of another


def check(checkpoint: Checkpoint, original: Checkpoint, changed: Collection[str]) -> None:
    """Raises CheckError for changed norms that no algorithm makes. `changed`: kept tensors that differ.

    An algorithm that changes a norm divides the weights that read it, or turns them and leaves the norm at ones.
    """
    moved = [f"{name} (those of {other})" for name, other in _moved(checkpoint, original, changed)]
    if moved:
        what = f"{len(moved)} kept tensors have the values of another tensor of the original model: {some(moved)}"
        raise CheckError(what, hint="write the checkpoint again", kind="E-CHECK-VALUES")
    alone = [pair.source for pair in _norms(original, changed) if _is_alone(pair, checkpoint, original)]
    if alone:
        what = f"{len(alone)} norms have other values, and the weights that read them are not scaled to match"
        raise CheckError(f"{what}: {some(alone)}", hint="write the checkpoint again", kind="E-CHECK-VALUES")


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


def _is_alone(pair: Pair, checkpoint: Checkpoint, original: Checkpoint) -> bool:
    """True where the first weight behind a changed norm is the source's, but for the noise of its codes."""
    reader, name = pair.readers[0], f"{pair.source}.weight"
    sides = checkpoint, original
    if any(side.view.online or not _holds(side, reader) for side in sides):
        return False
    offset = original.layout.rewrites.norm_offset
    now, was = (side.source.read(name).double() + offset for side in sides)
    ours, theirs = (side.weight(reader).double() for side in sides)
    if bool((was == 0).any()) or ours.shape != theirs.shape or ours.shape[-1:] != now.shape:
        return False
    plain, scaled = ((ours * factor - theirs).norm() for factor in (1.0, now / was))
    return bool(plain.square() < _NOISE * theirs.square().sum()) and bool(plain.square() * _NEARER < scaled.square())


def _holds(side: Checkpoint, module: str) -> bool:
    return module in side.view.targets or f"{module}.weight" in side.source.headers
