"""KL of a quantized checkpoint on several texts at once; what the source says of them is computed once and kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.evaluation.run import Side
from quarkcli.evaluation.score import _divergence, _log_probabilities
from quarkcli.evaluation.windows import windows
from quarkcli.events import silent
from quarkcli.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Text:
    """A text to measure on.

    name     of its column in the table
    source   the file; None: the built-in text
    tokens   how many of its first tokens
    """

    name: str
    source: str | None
    tokens: int


class InputsAlone(Checkpoint):
    """A quantized checkpoint whose weights are those of the model it was made from: only activations are quantized."""

    def __init__(self, source: Source, original: Checkpoint) -> None:
        self.original = original
        super().__init__(source)

    def weight(self, name: str) -> Tensor:
        return self.original.weight(name)


class Measure:
    """Windows of texts, and the log-probabilities of a source model on them.

    cache   a folder for the log-probabilities: float32, 4 bytes for every token of the vocabulary and of the texts
    """

    def __init__(self, model: str, texts: list[Text], window: int, cache: Path, device: str = "cpu") -> None:
        self.model, self.texts, self.device = model, texts, device
        tokenizer = load_tokenizer(Path(model), False)
        each = [windows(tokenizer, text.source, window, text.tokens, "auto") for text in texts]
        self.counts = [len(rows.tokens) for rows in each]
        self.first = each[0].first
        self.tokens = torch.cat([rows.tokens for rows in each])
        self.batch = max(1, 2048 // window)
        key = hashlib.sha256(repr((str(Path(model).resolve()), window)).encode() + self.tokens.numpy().tobytes())
        self.base = self._base(cache / f"{key.hexdigest()[:16]}.logprobs")

    def _side(self, checkpoint: Checkpoint) -> Side:
        return Side(checkpoint, self.tokens, self.batch, torch.float32, self.device, False, False, "stop", silent)

    def _walked(self, checkpoint: Checkpoint, weights_only: bool) -> Side:
        side = self._side(checkpoint)
        for block in range(side.runner.num_blocks):
            side.advance(block, weights_only)
        side.runner.load_outside(side.walk.outside())
        return side

    def _base(self, file: Path) -> Tensor:
        """Returns log p of the source [windows, scored tokens, vocabulary], mapped from `file`, made where missing."""
        checkpoint = Checkpoint(Source.open(self.model))
        vocabulary = int(checkpoint.source.config["vocab_size"])
        shape = (len(self.tokens), self.tokens.shape[1] - self.first, vocabulary)
        size = shape[0] * shape[1] * shape[2]
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            scores = torch.from_file(str(part), shared=True, size=size, dtype=torch.float32).view(shape)
            side = self._walked(checkpoint, False)
            for index, place in enumerate(torch.arange(shape[0]).split(self.batch)):
                scores[place] = _log_probabilities(side, index, self.first)
            part.rename(file)
        return torch.from_file(str(file), shared=False, size=size, dtype=torch.float32).view(shape)

    def score(self, directory: str, *, weights_only: bool = False, inputs_only: bool = False) -> dict[str, Any]:
        """Returns KL, perplexities and the share of equal first choices, by text."""
        source = Source.open(directory)
        original = Checkpoint(Source.open(self.model))
        side = self._walked(InputsAlone(source, original) if inputs_only else Checkpoint(source), weights_only)
        found: dict[str, list[Tensor]] = {"kl": [], "nll": [], "base": [], "top1": []}
        for index, tokens in enumerate(self.tokens.split(self.batch)):
            at = slice(index * self.batch, index * self.batch + len(tokens))
            targets = tokens[:, self.first :, None]
            with side.runner.handlers(None, side.tail_handlers(weights_only)):
                scores = _log_probabilities(side, index, self.first).cpu()
            base = self.base[at]
            found["kl"].append(_divergence(base, scores).sum(-1).double().mean(1))
            found["nll"].append(-scores.gather(-1, targets).double().mean((1, 2)))
            found["base"].append(-base.gather(-1, targets).double().mean((1, 2)))
            found["top1"].append((scores.argmax(-1) == base.argmax(-1)).double().mean(1))
        means = {name: torch.cat(rows).split(self.counts) for name, rows in found.items()}
        return {
            text.name: {
                "kl": float(means["kl"][i].mean()),
                "perplexity": float(means["nll"][i].mean().exp()),
                "source_perplexity": float(means["base"][i].mean().exp()),
                "top1": float(means["top1"][i].mean()),
            }
            for i, text in enumerate(self.texts)
        }
