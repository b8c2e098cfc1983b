"""Keeps what blocks hand to later ones beside hidden states where recordings are made anew: a resume, other batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quarkcli.errors import ModelError

PREFIX = "handed"  # of names in the file of hidden states
Handed = dict[str, list[dict[str, Tensor]]]  # stream -> one mapping for each batch


def collect(recordings: Mapping[str, Sequence[Any]]) -> Handed:
    """Returns what the blocks have written so far, by stream and batch; empty where they write nothing."""
    found = {stream: [one.handed() for one in batches] for stream, batches in recordings.items()}
    return found if any(any(each) for each in found.values()) else {}


def spread(handed: Handed, recordings: Mapping[str, Sequence[Any]], start: int = 0) -> None:
    """Gives it to other recordings, whose first row is row `start` of it. Raises ModelError if rows cannot be told."""
    for stream, batches in recordings.items():
        old = handed.get(stream, [])
        if start == 0 and len(old) == len(batches):
            cut = old
        elif old:
            cut = _cut(old, [len(one.tokens) for one in batches], start)
        else:
            continue
        for recording, named in zip(batches, cut, strict=True):
            device = recording.tokens.device
            recording.hand({name: tensor.to(device) for name, tensor in named.items()})


def first_rows(recording: Any, few: Any) -> None:
    """Gives the first rows of a recording to one of these rows alone."""
    found, rows = recording.handed(), len(recording.tokens)
    if all(tensor.shape[:1] == (rows,) for tensor in found.values()):
        few.hand({name: tensor[: len(few.tokens)] for name, tensor in found.items()})


def flat(handed: Handed) -> dict[str, Tensor]:
    """Returns it under names for a file, on the CPU."""
    return {
        f"{PREFIX}/{stream}/{batch:06d}/{name}": tensor.detach().cpu().contiguous()
        for stream, batches in handed.items()
        for batch, named in enumerate(batches)
        for name, tensor in named.items()
    }


def read(files: Sequence[Mapping[str, Tensor]], streams: Sequence[str]) -> Handed:
    """Returns what `flat` has named in the files of one or more ranks, one behind the other."""
    found: Handed = {}
    for stream in streams:
        start = f"{PREFIX}/{stream}/"
        for file in files:
            batches: dict[str, dict[str, Tensor]] = {}
            for name in sorted(name for name in file if name.startswith(start)):
                batch, _, own = name.removeprefix(start).partition("/")
                batches.setdefault(batch, {})[own] = file[name]
            found.setdefault(stream, []).extend(batches.values())
    return found


def _cut(old: list[dict[str, Tensor]], rows: Sequence[int], start: int) -> list[dict[str, Tensor]]:
    """Returns the same, cut as other batches are."""
    counts = [{len(tensor) for tensor in named.values()} for named in old]
    if any(set(named) != set(old[0]) for named in old) or any(len(count) != 1 for count in counts):
        raise ModelError(
            "quark cannot tell which rows of a block's outputs belong to which calibration rows",
            hint="use --resume never to start again, and a smaller --calib-batch",
            kind="E-CLASS-FOLLOW",
        )
    whole = {name: torch.cat([named[name] for named in old]) for name in old[0]}
    found, first = [], start
    for count in rows:
        found.append({name: tensor[first : first + count] for name, tensor in whole.items()})
        first += count
    return found
