"""Turns text into the windows that `quark eval` measures on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quarkcli.errors import AccessError, DataError
from quarkcli.forward import files
from quarkcli.forward.defaults import builtin_texts
from quarkcli.model.tokenizer import Tokenizer

BUILTIN_TOKENS = 8192
WINDOW = 256


@dataclass(frozen=True)
class Windows:
    """Rows that do not overlap.

    tokens  int64 [windows, window]
    prefix  token numbers that every window begins with; they are no part of the text
    source  origin of the text, for people
    mask    bool [windows, window], False on padding, which is not scored; None: there is none
    """

    tokens: Tensor
    prefix: list[int]
    source: str
    mask: Tensor | None = None

    @property
    def first(self) -> int:
        """Returns the place of the first scored token: something stands before it, and it belongs to the text."""
        return max(1, len(self.prefix))

    def real(self, index: int, batch: int) -> Tensor:
        """Returns which tokens from `first` on are scored, bool [windows of batch `index`, window - first]."""
        mask = torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask
        return mask[index * batch : (index + 1) * batch, self.first :]


def width(asked: int | None, limits: Iterable[int | None]) -> int:
    """Returns tokens per window: as asked for, else `WINDOW`, or the limit of the models if that is less.

    limits  tokens that a model takes, None where nothing says so
    Raises DataError when more is asked for.
    """
    limit = min((some for some in limits if some is not None), default=None)
    if limit is None:
        return asked or WINDOW
    if asked is not None and asked > limit:
        raise DataError(
            f"--window {asked} is more than the model's {limit} positions",
            hint=f"use --window {limit}",
            kind="E-DATA-SEQLEN",
        )
    return asked or min(WINDOW, limit)


def windows(tokenizer: Tokenizer, text: str | None, window: int, max_tokens: int | None, bos: str) -> Windows:
    """Returns windows from the start of a text file, or of the built-in text.

    Raises DataError, AccessError, UsageError.
    """
    prefix = tokenizer.prefix(bos)
    own = window - len(prefix)
    if own < 1 or window < 2:
        raise DataError(
            f"a window of {window} tokens is too short: it begins with {prefix}",
            hint="use a larger --window",
            kind="E-DATA-SEQLEN",
        )
    limit = max_tokens or (None if text else BUILTIN_TOKENS)
    ids: list[int] = []
    for piece in _pieces(text):
        ids += tokenizer.encode(piece)
        if limit is not None and len(ids) >= limit + window:
            break
    if max_tokens is not None and max_tokens < own <= len(ids):
        what = f"--tokens {max_tokens} is fewer than one window of {window}"
        raise DataError(what, hint=f"use --tokens {own} or more, or a smaller --window", kind="E-DATA-SEQLEN")
    ids = ids[:limit] if len(ids) >= own else ids
    count = len(ids) // own
    if not count:
        what = f"the text has {len(ids)} token{'s' if len(ids) != 1 else ''}, fewer than one window of {window}"
        fits = len(prefix) + len(ids)
        smaller = f", or --window {fits}" if fits > 1 and ids else ""
        raise DataError(what, where=text or "builtin", hint=f"give a longer text{smaller}", kind="E-DATA-FEW")
    rows = torch.tensor(ids[: count * own], dtype=torch.int64).view(count, own)
    return Windows(
        torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(count, -1), rows], dim=1), prefix, _named(text)
    )


def _named(text: str | None) -> str:
    if text is None:
        return "the built-in text"
    encoding = files.encoding(Path(text))
    return text if encoding.startswith("utf-8") else f"{text}, read as {encoding.upper()}"


def _pieces(text: str | None) -> Iterable[str]:
    if text is None:
        return builtin_texts(held_out=True)
    path = Path(text)
    if not path.is_file():
        raise AccessError("there is no such text file", where=text, kind="E-DATA-NOT-FOUND")
    if files.kind(path) == "json":  # its braces and keys would be measured too
        what = "holds rows in JSON, and perplexity is measured on plain text"
        raise DataError(what, where=text, hint="write the texts of its rows to a .txt file", kind="E-DATA-FILE")
    whole = files.text(path)
    return (whole[start : start + 32768] for start in range(0, len(whole), 32768))
