"""Calibration data: a file, a folder, a hub data set or the built-in text become rows of token ids.

Text is packed without padding: documents are joined, cut into windows of `seqlen`, and a seeded sample of the windows
is taken. A conversation is one row: rendered once by the chat template, cut at `seqlen`, padded on the right and
masked (right padding cannot reach real tokens in a causal model, so only the statistics need the mask).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quarkcli.calibration.defaults import BUILTIN, builtin_texts
from quarkcli.errors import AccessError, DataError

_SUFFIXES = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_EXAMPLE = (
    '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "...", "response": "..."}'
)


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    @property
    def eos(self) -> int | None: ...

    def prefix(self, bos: str) -> list[int]: ...
    def begun(self, ids: list[int], bos: str) -> list[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int] | None]: ...


@dataclass
class CalibrationData:
    """Token rows.

    tokens   int64 [rows, seqlen]
    mask     bool [rows, seqlen], False on padding, or None when nothing is padded
    source   what the rows came from, for the report
    digest   sha256 of the token ids and the mask
    prefix   token numbers put before every row of text
    """

    tokens: Tensor
    mask: Tensor | None
    source: str
    digest: str
    prefix: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
) -> CalibrationData:
    """`samples` rows of `seqlen` tokens.

    bos     what rows begin with: see `model.tokenizer.Tokenizer.prefix` for text, `begun` for conversations
    asked   the number of rows was asked for, so fewer are an error unless `allow_short`; fewer than a default are
            used and said
    Raises DataError (no usable text, too few rows, unknown columns) or AccessError (not found).
    """
    documents = _documents(source, column, seed, offline)
    chosen = random.Random(seed)
    text_budget = max(4_000_000, samples * seqlen * 16)
    rows, mask = _rows(documents, tokenizer, samples, seqlen, bos, chosen, text_budget, source)
    notes = []
    if len(rows) < samples:
        short = f"{len(rows)} rows of {seqlen} tokens, {samples} asked for"
        if asked and not allow_short:
            raise DataError(short, where=source, hint="--allow-short, fewer --calib-samples, or more data")
        notes.append(f"calibration uses {short.replace('asked for', 'wanted')}")
    tokens = torch.tensor(rows, dtype=torch.int64)
    padded = torch.tensor(mask, dtype=torch.bool) if mask is not None else None
    return CalibrationData(tokens, padded, source, _digest(tokens, padded), tokenizer.prefix(bos), notes)


def _digest(tokens: Tensor, mask: Tensor | None) -> str:
    digest = hashlib.sha256(tokens.numpy().tobytes())
    if mask is not None:
        digest.update(mask.numpy().tobytes())
    return digest.hexdigest()


def _rows(
    documents: Iterable[Any], tokenizer: Tokenizer, samples: int, seqlen: int, bos: str, chosen: random.Random,
    budget: int, source: str,
) -> tuple[list[list[int]], list[list[bool]] | None]:  # fmt: skip
    stream: list[int] = []
    chats: list[list[int]] = []
    used = 0
    for document in documents:
        if isinstance(document, str):
            text = document[: budget - used]
            used += len(text)
            stream += tokenizer.encode(text)
            if tokenizer.eos is not None:
                stream.append(tokenizer.eos)
        else:
            chats.append(tokenizer.begun(tokenizer.chat(document)[0], bos)[:seqlen])
        if used >= budget or len(chats) >= samples:
            break
    if chats and stream:
        raise DataError("text and conversations are mixed", where=source, hint="give one kind, or convert the other")
    if chats:
        return _padded(chats, seqlen, tokenizer.eos or 0)
    if stream and tokenizer.eos is not None:
        stream.pop()  # an end mark joins documents; nothing follows the last
    prefix = tokenizer.prefix(bos)
    width = seqlen - len(prefix)
    if width < 1:
        raise DataError(f"rows of {seqlen} tokens have no room behind {prefix}", hint="a larger --calib-seqlen")
    windows = [prefix + stream[start : start + width] for start in range(0, len(stream) - width + 1, width)]
    if not windows:
        raise DataError(
            f"{len(stream)} tokens of text, fewer than one window of {seqlen}",
            where=source,
            hint="more text or a smaller --calib-seqlen",
        )
    if len(windows) > samples:
        windows = [windows[index] for index in sorted(chosen.sample(range(len(windows)), samples))]
    return windows, None


def _padded(chats: list[list[int]], seqlen: int, pad: int) -> tuple[list[list[int]], list[list[bool]]]:
    width = min(seqlen, max(len(chat) for chat in chats))
    rows = [chat + [pad] * (width - len(chat)) for chat in chats]
    mask = [[True] * len(chat) + [False] * (width - len(chat)) for chat in chats]
    return rows, mask


def _documents(source: str, column: str | None, seed: int, offline: bool) -> Iterator[Any]:
    """Texts (str) or conversations (list of messages)."""
    if source == BUILTIN:
        yield from builtin_texts(held_out=False)
        return
    path = Path(source)
    if not path.exists():
        if path.suffix in _SUFFIXES or source.startswith((".", "/")):
            raise AccessError("no such calibration file", where=source)
        yield from _from_hub(source, column, seed, offline)
        return
    files = _files(path)
    for file in files:
        if _SUFFIXES[file.suffix] == "text":
            yield from _text_file(file)
        else:
            yield from _table(_SUFFIXES[file.suffix], file, column, seed)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in _SUFFIXES and file.is_file()]
        if not files:
            raise DataError(f"no {', '.join(_SUFFIXES)} file in this folder", where=str(path))
        return files
    if path.suffix not in _SUFFIXES:
        raise DataError(f"unknown kind of file '{path.suffix}'", where=str(path), hint=f"use {', '.join(_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError("the calibration file is empty", where=str(path), hint=f"a line that works: {_EXAMPLE}")
    return [path]


def _text_file(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise DataError("the calibration file holds no text", where=str(path))
    yield text


def _table(kind: str, file: Path, column: str | None, seed: int) -> Iterator[Any]:
    import datasets

    try:
        rows = datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
        yield from _render(rows.shuffle(seed=seed, buffer_size=10_000), column, str(file))
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds for broken files; all are the user's file
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot be read as {kind}: {text}", where=str(file), hint=f"a line: {_EXAMPLE}") from error


def _from_hub(name: str, column: str | None, seed: int, offline: bool) -> Iterator[Any]:
    import datasets

    try:
        config = datasets.DownloadConfig(local_files_only=offline)
        rows = datasets.load_dataset(name, split="train", streaming=not offline, download_config=config)
        rows = rows.shuffle(seed=seed, buffer_size=10_000) if not offline else rows.shuffle(seed=seed)
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "a local .jsonl, .parquet or .txt file, or --calib-data builtin"
        raise AccessError(f"data set cannot be loaded: {text}", where=name, hint=hint) from error
    yield from _render(rows, column, name)


def _render(rows: Iterable[dict[str, Any]], column: str | None, source: str) -> Iterator[Any]:
    found = False
    for row in rows:
        document = _document(row, column, source)
        if document:
            found = True
            yield document
    if not found:
        raise DataError("no row holds any text", where=source, hint=f"a line that works: {_EXAMPLE}")


def _document(row: dict[str, Any], column: str | None, source: str) -> Any:
    """A text, or the messages of a conversation."""
    if column is not None:
        if column not in row:
            raise DataError(f"no column '{column}'; columns are {', '.join(row)}", where=source)
        value = row[column]
        if value is not None and not isinstance(value, str | list):
            raise DataError(f"column '{column}' holds neither text nor messages", where=source)
        return _messages(value) if isinstance(value, list) else value
    if isinstance(row.get("messages"), list):
        return _messages(row["messages"])
    if isinstance(row.get("text"), str):
        return row["text"]
    answer = row.get("response", row.get("completion"))
    if isinstance(row.get("prompt"), str) and isinstance(answer, str):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
    raise DataError(
        f"none of the columns {', '.join(row)} is known",
        where=source,
        hint=f"--calib-column NAME, or a line such as {_EXAMPLE}",
    )


def _messages(rows: list[Any]) -> list[dict[str, str]]:
    return [{"role": str(row["role"]), "content": str(row["content"])} for row in rows]
