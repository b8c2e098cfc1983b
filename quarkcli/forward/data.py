"""Turns a file, a folder, a hub data set or the built-in text into rows of token ids.

Text is packed without padding: documents are joined, cut into windows of `seqlen`, and a seeded sample of the windows
is taken. A conversation is one row: rendered once by the chat template, cut at `seqlen`, padded on the right and
masked (right padding cannot reach real tokens in a causal model, so only the statistics need the mask). Where a source
has both, rows of both kinds are chosen among. A row that cannot be used is skipped and counted by reason.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quarkcli.errors import AccessError, DataError, first_line
from quarkcli.forward import files
from quarkcli.forward.defaults import BUILTIN, builtin_texts
from quarkcli.forward.documents import Conversation, Skipped, Unusable, document

CHARACTERS = 64  # no text has more of them in a token, but for runs of spaces
MIXED = 100_000  # characters of the built-in text that are read at least
_TEMPLATE = "chat template"  # words of a reason why conversations were not used: it fails, or
_NO_TEMPLATE = f"no {_TEMPLATE}"  # there is none
TOGETHER = 16  # files of a folder that are read at the same time
PATIENCE = 10_000  # rows that are read before it is said that none can be used


class Tokenizer(Protocol):
    """The methods that calibration needs of a tokenizer."""

    @property
    def eos(self) -> int | None: ...

    def prefix(self, bos: str) -> list[int]: ...
    def begun(self, ids: list[int], bos: str) -> list[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[list[int], list[int] | None]: ...


@dataclass
class CalibrationData:
    """Token rows.

    tokens   int64 [rows, seqlen]
    mask     bool [rows, seqlen], False on padding, or None when nothing is padded
    source   origin of the rows, for the report
    digest   sha256 of the token ids and the mask
    prefix   token numbers put before every row of text
    notes    warnings
    skipped  reason -> rows that were not used for it
    held     further rows of the same kind, for measuring; None: none were asked for, or left
    held_mask   theirs
    """

    tokens: Tensor
    mask: Tensor | None
    source: str
    digest: str
    prefix: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    held: Tensor | None = None
    held_mask: Tensor | None = None

    @property
    def token_count(self) -> int:
        return int(self.mask.sum()) if self.mask is not None else self.tokens.numel()


def load(
    source: str,
    tokenizer: Tokenizer,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    column: str | None = None,
    bos: str = "auto",
    asked: bool = True,
    allow_short: bool = False,
    offline: bool = False,
    held: int = 0,
) -> CalibrationData:
    """Returns `samples` rows of `seqlen` tokens.

    held    tokens in further rows that are no part of these

    bos     first tokens of rows: see `model.tokenizer.Tokenizer.prefix` for text, `begun` for conversations
    asked   the number of rows was asked for, so fewer are an error unless `allow_short`; fewer than a default are
            used and said
    Raises DataError (no usable text, too few rows, unknown columns) or AccessError (not found).
    """
    skipped = Skipped()
    prefix = tokenizer.prefix(bos)
    if len(prefix) >= seqlen:
        what = f"rows of {seqlen} tokens are too short: they begin with {prefix}"
        raise DataError(what, hint="use a larger --calib-seqlen", kind="E-DATA-SEQLEN")
    budget = _budget(source, samples * seqlen)
    found = _source(source, seed, column, offline, budget, skipped)
    stream, chats = _collect(found, column, tokenizer, samples, seqlen, bos, budget, skipped)
    rows = _windows(stream, prefix, seqlen) + chats
    if not rows:
        raise _too_short(source, len(stream), seqlen) if stream else _useless(source, skipped)
    others: list[list[int]] = []
    if len(rows) > samples:
        chosen = sorted(random.Random(seed).sample(range(len(rows)), samples))
        others = [rows[index] for index in sorted({*range(len(rows))} - {*chosen})]
        rows = [rows[index] for index in chosen]
    wanted = -(-held // seqlen)
    if len(others) < wanted:  # the source is read on from where it was left
        budget = _budget(source, wanted * seqlen)
        further, talks = _collect(found, column, tokenizer, wanted, seqlen, bos, budget, Skipped())
        others += _windows(further, prefix, seqlen) + talks
    others = others[:: max(1, len(others) // max(1, wanted))][:wanted]
    notes = [f"{skipped.total} rows skipped: {skipped}"] if skipped.total else []
    notes += skipped.remarks
    if len(rows) < samples:
        short = f"the data has {len(rows)} rows of {seqlen} tokens, {samples} asked for"
        if asked and not allow_short:
            more = "".join(f"; {note}" for note in notes)
            hint = "use --allow-short, fewer --calib-samples, or more data"
            raise DataError(short + more, where=source, hint=hint, kind="E-DATA-FEW")
        notes.append(f"calibration uses {short.removeprefix('the data has ').replace('asked for', 'wanted')}")
    tokens, real = _tensors(rows, seqlen, tokenizer.eos, bool(chats))
    ragged = any(len(row) < seqlen for row in others)
    scored, scored_mask = _tensors(others, seqlen, tokenizer.eos, ragged) if others else (None, None)
    return CalibrationData(
        tokens, real, source, _digest(tokens, real), prefix, notes, dict(skipped.counts), scored, scored_mask
    )


def of_rows(rows: list[list[int]], held: list[list[int]], source: str, prefix: list[int]) -> CalibrationData:
    """Returns rows of one length as calibration data, and further ones to be scored."""
    tokens = torch.tensor(rows, dtype=torch.int64)
    scored = torch.tensor(held, dtype=torch.int64) if held else None
    return CalibrationData(tokens, None, source, _digest(tokens, None), prefix, held=scored)


def _budget(source: str, tokens: int) -> int:
    """Returns the characters that are read for some tokens. Of the built-in text, whose documents are mixed, fewer."""
    return max(MIXED, tokens * 8) if source == BUILTIN else max(4_000_000, tokens * 16)


def _windows(stream: list[int], prefix: list[int], seqlen: int) -> list[list[int]]:
    """Returns the stream cut into rows that begin with `prefix`; what is left over is dropped."""
    width = seqlen - len(prefix)
    return [prefix + stream[start : start + width] for start in range(0, len(stream) - width + 1, width)]


def _too_short(source: str, tokens: int, seqlen: int) -> DataError:
    text = f"the text has {tokens} tokens, fewer than one window of {seqlen}"
    return DataError(text, where=source, hint="use more text or a smaller --calib-seqlen", kind="E-DATA-FEW")


def _digest(tokens: Tensor, mask: Tensor | None) -> str:
    digest = hashlib.sha256(tokens.numpy().tobytes())
    if mask is not None:
        digest.update(mask.numpy().tobytes())
    return digest.hexdigest()


def _collect(
    rows: Iterable[files.Row], column: str | None, tokenizer: Tokenizer, samples: int, seqlen: int, bos: str,
    budget: int, skipped: Skipped,
) -> tuple[list[int], list[list[int]]]:  # fmt: skip
    """Returns the tokens of all texts, joined by end marks, and those of each conversation.

    Reads as many rows as are needed.
    """
    stream: list[int] = []
    chats: list[list[int]] = []
    for row in rows:
        try:
            found = document(row.value, column)
            if isinstance(found, str):
                stream += tokenizer.encode(found[:budget])
                stream += [] if tokenizer.eos is None else [tokenizer.eos]
                budget -= len(found)
            else:
                ids = _talk(found, tokenizer, seqlen * CHARACTERS)
                chats.append(tokenizer.begun(ids, bos)[:seqlen])
        except Unusable as reason:
            skipped.add(str(reason), row.place)
            if skipped.total >= PATIENCE and not (stream or chats):
                break
        if budget <= 0 or len(chats) >= samples:
            break
    if stream and tokenizer.eos is not None:
        stream.pop()  # an end mark joins documents; nothing follows the last
    return stream, chats


def _talk(conversation: Conversation, tokenizer: Tokenizer, limit: int) -> list[int]:
    """Returns the tokens of a conversation's first `limit` characters.

    Raises Unusable when its template makes nothing of it.
    """
    try:
        ids = tokenizer.chat(_shortened(conversation.messages, limit), conversation.tools)[0]
    except DataError as refusal:
        raise Unusable(refusal.what) from refusal
    if not ids:
        raise Unusable("the chat template makes nothing of a conversation")
    return ids


def _shortened(messages: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Returns messages up to a number of characters: nobody waits for megabytes of which one row is kept."""
    kept: list[dict[str, Any]] = []
    for message in messages:
        if limit <= 0:
            break
        kept.append({**message, "content": message["content"][:limit]})
        limit -= len(message["content"])
    return kept


def _tensors(rows: list[list[int]], seqlen: int, eos: int | None, ragged: bool) -> tuple[Tensor, Tensor | None]:
    """Returns rows as one matrix, with a mask where there are conversations, which are of any length (`ragged`)."""
    if not ragged:
        return torch.tensor(rows, dtype=torch.int64), None
    padded, mask = _padded(rows, seqlen, eos or 0)
    return torch.tensor(padded, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool)


def _padded(rows: list[list[int]], seqlen: int, pad: int) -> tuple[list[list[int]], list[list[bool]]]:
    width = min(seqlen, max(len(row) for row in rows))
    mask = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    return [row + [pad] * (width - len(row)) for row in rows], mask


def _useless(source: str, skipped: Skipped) -> DataError:
    reasons = f": {skipped}" if skipped.total else ""
    hint, kind = f"write each line like this: {files.EXAMPLE}", "E-DATA-FILE"
    if skipped.total and all(_TEMPLATE in reason for reason in skipped.counts):
        hint, kind = "correct the chat template, or give another one with --chat-template FILE", "E-CHAT-TEMPLATE"
    if _NO_TEMPLATE in str(skipped):
        hint = "give the chat template with --chat-template FILE, or data with plain text"
    return DataError(f"no row can be used{reasons}", where=source, hint=hint, kind=kind)


def _source(
    source: str, seed: int, column: str | None, offline: bool, budget: int, skipped: Skipped
) -> Iterator[files.Row]:
    if source == BUILTIN:
        yield from (files.Row(text, BUILTIN) for text in builtin_texts(held_out=False))
        return
    path = files.local(source)
    if path is None:
        yield from _from_hub(source, seed, offline)
        return
    found = files.find(path)
    step = -(-len(found) // TOGETHER)
    spread = [file for start in range(step) for file in found[start::step]]
    together = min(len(found), TOGETHER)
    each = ((file, _rows(file, seed, column, budget, together, skipped)) for file in spread)
    yield from files.in_turn((_placed(rows, file, path, len(found) > 1, skipped) for file, rows in each), together)


def _placed(
    rows: Iterator[files.Row], file: Path, source: Path, several: bool, skipped: Skipped
) -> Iterator[files.Row]:
    """Yields the rows of a file with their place in the source. One of `several` that cannot be read is skipped."""
    name = "" if file == source else f"{file.relative_to(source)} "
    try:
        for row in rows:
            yield replace(row, place=f"{name}{row.place}".strip())
    except DataError as error:
        if not several:
            raise
        skipped.add(f"the file {error.what.removeprefix('the file ')}", name.strip())


def _rows(
    path: Path, seed: int, column: str | None, budget: int, together: int, skipped: Skipped
) -> Iterator[files.Row]:
    kind = files.kind(path)
    if kind != "parquet" and not (encoding := files.encoding(path)).startswith("utf-8"):
        skipped.remarks.append(f"{path} is read as {encoding.upper()}")
    if kind == "text":
        yield from (files.Row(text, "") for text in files.texts(path, budget // together, together))
    else:
        yield from files.rows(path, seed, column, together)


def _from_hub(name: str, seed: int, offline: bool) -> Iterator[files.Row]:
    import datasets

    hint = "use a local .jsonl, .parquet or .txt file, or --calib-data builtin"
    if not offline:
        _check_hub(name, hint)
    try:
        config = datasets.DownloadConfig(local_files_only=offline)
        rows = datasets.load_dataset(name, split="train", streaming=not offline, download_config=config)
        rows = rows.shuffle(seed=seed, buffer_size=10_000) if not offline else rows.shuffle(seed=seed)
        for number, row in enumerate(rows, 1):
            yield files.Row(row, f"row {number}")
    except Exception as error:  # datasets raises many kinds
        raise AccessError(
            f"data set cannot be loaded: {first_line(error)}", where=name, hint=hint, kind="E-DATA-HUB"
        ) from error


def _check_hub(name: str, hint: str) -> None:
    """Raises AccessError where the hub cannot be reached: `datasets` would try for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(name, timeout=5)
    except (HfHubHTTPError, OfflineModeIsEnabled):  # the hub answered, or is not to be asked: `datasets` knows more
        return
    except Exception as error:  # of the network; their kinds differ by release
        raise AccessError(
            f"the hub cannot be reached: {first_line(error)}", where=name, hint=hint, kind="E-DATA-HUB"
        ) from error
