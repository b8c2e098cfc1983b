"""Scores two models token by token: what their last hidden states predict for the next token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from quarkcli.errors import CheckError
from quarkcli.events import Working
from quarkcli.forward.walk import SERVED
from quarkcli.numerics.finite import is_finite

if TYPE_CHECKING:
    from quarkcli.evaluation.run import Side
    from quarkcli.evaluation.windows import Windows

Decode = Callable[[list[int]], str]
WORST = 20  # tokens that are named
CONTEXT = 24  # tokens before them


def score(tested: Side, source: Side | None, rows: Windows, weights_only: bool, decode: Decode) -> dict[str, Any]:
    """Runs the tails batch by batch and compares them. `decode`: token numbers -> text."""
    sides = [side for side in (tested, source) if side is not None]
    for side in sides:
        side.runner.load_outside(side.walk.outside())
        side.warn()
    sums = {"nll": 0.0, "base_nll": 0.0, "kl": 0.0, "agree": 0.0}
    count, worst = 0, list[_Token]()
    for index, tokens in enumerate(rows.tokens.split(tested.walk.batch)):
        targets = tokens[:, rows.first :].to(tested.walk.device)
        real = rows.real(index, tested.walk.batch).to(tested.walk.device)
        tested.tell(Working(f"scoring batch {index + 1} of {len(tested.walk.served)}"))
        with tested.runner.handlers(None, tested.tail_handlers(weights_only)):
            scores = _log_probabilities(tested, index, rows.first)
        sums["nll"] -= float(scores.gather(-1, targets[..., None])[real].double().sum())
        count += int(real.sum())
        if source is not None:
            base = _log_probabilities(source, index, rows.first)
            sums["base_nll"] -= float(base.gather(-1, targets[..., None])[real].double().sum())
            divergence = _divergence(base, scores).sum(-1)
            sums["kl"] += float(divergence[real].double().sum())
            tops = base.argmax(-1), scores.argmax(-1)
            sums["agree"] += float((tops[0] == tops[1])[real].sum())
            worst = _worst(worst, divergence.where(real, -1.0), tops, index * tested.walk.batch)
    found = _summary(sums, count, source is not None)
    return {**found, "worst_tokens": [_told(token, rows, decode) for token in worst]}


class _Token(NamedTuple):
    """A scored token: its KL, its window, its place behind the window's first scored one, what both sides expect."""

    kl: float
    window: int
    place: int
    expected: int
    got: int


def _worst(known: list[_Token], divergence: Tensor, tops: tuple[Tensor, Tensor], first: int) -> list[_Token]:
    """Returns the tokens of largest KL of those known and of a batch.

    divergence   [windows, tokens], negative where nothing is scored
    tops         the tokens that source and tested model find most likely
    first        window of the batch
    """
    values, places = divergence.flatten().topk(min(WORST, divergence.numel()))
    width = divergence.shape[1]
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        row, column = divmod(place, width)
        if value >= 0:
            expected, got = (int(top[row, column]) for top in tops)
            known = [*known, _Token(value, first + row, column, expected, got)]
    return sorted(known, key=lambda token: (-token.kl, token.window, token.place))[:WORST]


def _told(token: _Token, rows: Windows, decode: Decode) -> dict[str, Any]:
    """Returns the JSON form of a token, in words. A token without text has its number: vocabularies may be padded."""
    position = rows.first + token.place
    ids = rows.tokens[token.window].tolist()
    each = {"token": ids[position], "source_expects": token.expected, "expects": token.got}
    context = decode(ids[max(0, position - CONTEXT) : position])
    place = {"kl": token.kl, "window": token.window, "position": position}
    return {**place, "context": context, **{key: decode([one]) or f"<token {one}>" for key, one in each.items()}}


def _divergence(base: Tensor, scores: Tensor) -> Tensor:
    """Returns p (log p - log q) per token of the vocabulary; 0 for one that `base` rules out."""
    terms = base.exp() * (base - scores)
    return terms if is_finite(base) else terms.masked_fill_(base == -math.inf, 0.0)


def _log_probabilities(side: Side, index: int, first: int) -> Tensor:
    """Returns log p of the tokens from `first` on, float32 [batch, window - first, vocabulary]."""
    hidden = side.walk.served[index].to(side.walk.device)
    logits: Tensor = side.runner.logits(side.walk.recordings[SERVED][index], hidden)
    scores = torch.log_softmax(logits[:, first - 1 : -1].float(), dim=-1)
    # A token that a model rules out has -inf, which is a score; NaN and +inf end as NaN in the whole row.
    side.require_numbers("in the logits", [scores.amax(-1)])
    return scores


def _summary(sums: dict[str, float], count: int, compared: bool) -> dict[str, Any]:
    nll = sums["nll"] / count
    base = sums["base_nll"] / count
    wrong = [name for name, value in sums.items() if not math.isfinite(value)]
    if wrong:
        raise CheckError(
            f"{wrong[0]} is {sums[wrong[0]]}: one of the models gives a token probability 0",
            where="the sum over all tokens",
            kind="E-CHECK-NONFINITE",
        )
    result: dict[str, Any] = {
        "tokens": count,
        "perplexity": _exponential(nll),
        "baseline_perplexity": None,
        "perplexity_increase": None,
        "kl": None,
        "top1_agreement": None,
    }
    if compared:
        result |= {
            "baseline_perplexity": _exponential(base),
            "perplexity_increase": _exponential(nll - base) - 1,
            "kl": sums["kl"] / count,
            "top1_agreement": sums["agree"] / count,
        }
    return result


def _exponential(value: float) -> float:
    return math.exp(min(value, 700.0))
