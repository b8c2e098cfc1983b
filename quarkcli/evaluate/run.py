"""`quark eval`: a checkpoint against the model it was made from, walked block by block.

Specs are rebuilt from the written config through the dialect's reader; inputs are fake-quantized as they say. Windows
do not overlap; every position but a window's first is scored; logits and sums are float32 and float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quarkcli import memory
from quarkcli.activations import quantizing_handlers
from quarkcli.calibration.defaults import builtin_texts
from quarkcli.checkpoint import Checkpoint
from quarkcli.errors import AccessError, CheckError, DataError, UsageError
from quarkcli.events import Listener, Message, PartDone, Phase
from quarkcli.source import Source
from quarkcli.walk import Walk

SCHEMA = "quark/eval/1"
BUILTIN_TOKENS = 8192
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Side:
    """One model on its way: its files, its runner, its carry."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: Tensor,
        batch: int,
        dtype: torch.dtype,
        device: str,
        trust: bool,
        eager: bool,
        tell: Any,
    ) -> None:
        from quarkcli.model.runner import Runner

        self.checkpoint = checkpoint
        self.dtype = dtype
        folder = checkpoint.source.folder
        self.runner = Runner(
            folder, checkpoint.headers, device=device, dtype=dtype, trust_remote_code=trust, eager=eager
        )
        outside = self.runner.outside_tensors()
        self.walk = Walk(self.runner, lambda: checkpoint.read_many(outside, dtype), tokens, None, batch, tell)
        self.walk.start()

    def advance(self, block: int, weights_only: bool) -> None:
        """Load a block, run it, forget it."""
        names = self.runner.block_tensors(block)
        self.runner.load_block(block, self.checkpoint.read_many(names, self.dtype))
        self.walk.advance(block, self._handlers(names, weights_only))
        self.runner.unload_block(block)

    def _handlers(self, names: list[str], weights_only: bool) -> Mapping[str, Any]:
        if weights_only or not self.checkpoint.quantized:
            return {}
        activations = self.checkpoint.activation_quantizers(names)
        return quantizing_handlers(activations, self.checkpoint.attention_quantizers(names))

    def tail_handlers(self, weights_only: bool) -> Mapping[str, Any]:
        """What a quantized head reads and returns is quantized as well."""
        return self._handlers(self.runner.outside_tensors(), weights_only)


def evaluate(
    directory: str,
    *,
    baseline: str | None = None,
    text: str | None = None,
    window: int = 256,
    max_tokens: int | None = None,
    weights_only: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    tell: Listener,
) -> dict[str, Any]:
    """Perplexity of a directory, and its distance from `baseline` when given.

    text          a text file; None: the built-in text, `BUILTIN_TOKENS` tokens of it
    weights_only  leave activations and cache as they are
    dtype         what to compute in: float32, bfloat16; auto: float32 on a CPU, bfloat16 on a GPU
    Returns the result (schema `quark/eval/1`); KL is per token, in nats, of the source against the quantized model.
    """
    from quarkcli import preflight

    started = time.monotonic()
    device = preflight.device(device)
    memory.return_large_buffers()
    compute = _compute_dtype(dtype, device)
    checkpoint = Checkpoint(Source.open(directory))
    reference = Checkpoint(Source.open(baseline)) if baseline is not None else None
    if reference is not None:
        _check_baseline(checkpoint.source.config, reference.source.config)
    tokens = _windows(checkpoint.source.folder, text, window, max_tokens, trust_remote_code)
    batch = max(1, 2048 // window)
    tell(Message(f"{tokens.shape[0]} windows of {window} tokens from {text or 'the built-in text'}, {_name(compute)}"))
    tell(Phase("evaluate"))
    # Both sides compute attention in the same way, so that their distance is that of the quantization.
    setting = (tokens, batch, compute, device, trust_remote_code, checkpoint.quantizes_softmax and not weights_only)
    tested = _Side(checkpoint, *setting, tell)
    source = _Side(reference, *setting, tell) if reference else None
    if source is not None and source.runner.num_blocks != tested.runner.num_blocks:
        raise UsageError(
            f"{tested.runner.num_blocks} blocks here, {source.runner.num_blocks} in the baseline", where="--baseline"
        )
    _walk_blocks(tested, source, weights_only, tell)
    scores = _score(tested, source, tokens, weights_only)
    return {
        "schema": SCHEMA,
        "directory": directory,
        "baseline": baseline,
        **scores,
        "text": text or "builtin",
        "window": window,
        "weights_only": weights_only,
        "dtype": _name(compute),
        "device": device,
        "peak_rss_bytes": memory.peak_rss(),
        "seconds": round(time.monotonic() - started, 2),
    }


def check_gates(result: dict[str, Any], max_kl: float | None, max_ppl_increase: float | None) -> None:
    """Raises CheckError (exit 8) when a gate fails. `max_ppl_increase` is a fraction: 0.03 for 3 %."""
    if result["kl"] is None and (max_kl is not None or max_ppl_increase is not None):
        raise UsageError("a gate needs a baseline to compare with", hint="--baseline SRC")
    failed = []
    if max_kl is not None and not result["kl"] <= max_kl:
        failed.append(f"KL {result['kl']:.5f} is above {max_kl:g}")
    if max_ppl_increase is not None and not result["perplexity_increase"] <= max_ppl_increase:
        failed.append(f"perplexity rose by {result['perplexity_increase']:.2%}, more than {max_ppl_increase:.2%}")
    if failed:
        raise CheckError("; ".join(failed), where=result["directory"])


def _check_baseline(config: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    """The same tokens must mean the same to both."""
    for key in ("vocab_size", "num_hidden_layers"):
        ours, theirs = ((some.get("text_config") or some).get(key) for some in (config, baseline))
        if ours != theirs:
            raise UsageError(
                f"{key} is {theirs}, here it is {ours}",
                where="--baseline",
                hint="give the model this one was made from",
            )


def _compute_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'", where="--dtype", hint="auto, float32 or bfloat16")
    return _DTYPES[dtype]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _windows(folder: Path, text: str | None, window: int, max_tokens: int | None, trust: bool) -> Tensor:
    """int64 [windows, window], from the start of the text."""
    from quarkcli.model.tokenizer import load_tokenizer

    limit = max_tokens or (None if text else BUILTIN_TOKENS)
    ids: list[int] = []
    tokenizer = load_tokenizer(folder, trust)
    for piece in _pieces(text):
        ids += tokenizer.encode(piece)
        if limit is not None and len(ids) >= limit + window:
            break
    ids = ids[: limit if limit is not None else len(ids)]
    count = len(ids) // window
    if not count:
        raise DataError(f"{len(ids)} tokens of text, fewer than one window of {window}", where=text or "builtin")
    return torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)


def _pieces(text: str | None) -> Any:
    if text is None:
        return builtin_texts(held_out=True)
    path = Path(text)
    if not path.is_file():
        raise AccessError("no such text file", where=text)
    whole = path.read_text(encoding="utf-8", errors="replace")
    return (whole[start : start + 32768] for start in range(0, len(whole), 32768))


def _walk_blocks(tested: _Side, source: _Side | None, weights_only: bool, tell: Listener) -> None:
    blocks = tested.runner.num_blocks
    begun = time.monotonic()
    for block in range(blocks):
        at = time.monotonic()
        tested.advance(block, weights_only)
        error = None
        if source is not None:
            source.advance(block, weights_only)
            error = _distance(source.walk.carry[0], tested.walk.carry[0])
        now = time.monotonic()
        eta = (now - begun) / (block + 1) * (blocks - block - 1)
        tell(PartDone(block + 1, blocks, f"block {block}", "eval", now - at, error, memory.peak_rss(), 0, eta))


def _distance(reference: Tensor, other: Tensor) -> float:
    norm = reference.float().norm()
    return float((reference.float() - other.float()).norm() / norm) if float(norm) else 0.0


def _score(tested: _Side, source: _Side | None, tokens: Tensor, weights_only: bool) -> dict[str, Any]:
    """Run the tails batch by batch and compare."""
    sides = [side for side in (tested, source) if side is not None]
    for side in sides:
        side.runner.load_outside(side.walk.outside())
    sums = {"nll": 0.0, "base_nll": 0.0, "kl": 0.0, "agree": 0.0}
    count = 0
    for index, rows in enumerate(tokens.split(tested.walk.batch)):
        targets = rows[:, 1:].to(tested.walk.device)
        with tested.runner.handlers(None, **tested.tail_handlers(weights_only)):
            scores = _log_probabilities(tested, index)
        sums["nll"] -= float(scores.gather(-1, targets[..., None]).double().sum())
        count += targets.numel()
        if source is not None:
            base = _log_probabilities(source, index)
            sums["base_nll"] -= float(base.gather(-1, targets[..., None]).double().sum())
            sums["kl"] += float((base.exp() * (base - scores)).sum(-1).double().sum())
            sums["agree"] += float((base.argmax(-1) == scores.argmax(-1)).sum())
    return _summary(sums, count, source is not None)


def _log_probabilities(side: _Side, index: int) -> Tensor:
    """log p of the next token at every position but the last, float32 [batch, window - 1, vocabulary]."""
    hidden = side.walk.carry[index].to(side.walk.device)
    logits: Tensor = side.runner.logits(side.walk.recordings[index], hidden)
    return torch.log_softmax(logits[:, :-1].float(), dim=-1)


def _summary(sums: dict[str, float], count: int, compared: bool) -> dict[str, Any]:
    nll = sums["nll"] / count
    base = sums["base_nll"] / count
    perplexity = math.exp(min(nll, 700.0))
    result: dict[str, Any] = {
        "tokens": count,
        "perplexity": perplexity,
        "baseline_perplexity": None,
        "perplexity_increase": None,
        "kl": None,
        "top1_agreement": None,
    }
    if compared:
        result |= {
            "baseline_perplexity": math.exp(min(base, 700.0)),
            "perplexity_increase": math.exp(nll - base) - 1,
            "kl": sums["kl"] / count,
            "top1_agreement": sums["agree"] / count,
        }
    return result
