"""`quark eval`: compares a checkpoint with its source model, block by block.

Specs are rebuilt from the written config through the dialect's reader; inputs are fake-quantized as they say. Windows
do not overlap and begin as the tokenizer begins a text; what it puts there is not scored, nor is a window's first
token; logits and sums are float32 and float64.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quarkcli import family, memory
from quarkcli.disk import nonfinite, pickles
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.embedded import called
from quarkcli.disk.made_from import open_original
from quarkcli.disk.nonfinite import HINT, NonFinite, OnNonfinite
from quarkcli.disk.source import Source
from quarkcli.errors import CheckError, ModelError, UsageError
from quarkcli.evaluation.score import Decode, score
from quarkcli.events import Listener, Message, PartDone, Phase, Working
from quarkcli.forward.activations import quantizing_handlers
from quarkcli.forward.walk import Walk
from quarkcli.job import idle
from quarkcli.model.handlers import Handlers
from quarkcli.numerics.finite import is_finite
from quarkcli.threads import default, limited

if TYPE_CHECKING:
    from quarkcli.evaluation.windows import Windows

SCHEMA = "quark/eval/1"
BATCH = 2048  # tokens in one forward
# Distance of embedded tokens from the source's, as a share of them, above which channels have changed places: rounding
# an embedding moves it less, a rotation or a permutation by about 1.4.
_OTHER = 1.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Side:
    """One model on its way: its files, its runner, its hidden states."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: Tensor,
        batch: int,
        dtype: torch.dtype | None,
        device: str,
        trust: bool,
        eager: bool,
        on_nonfinite: OnNonfinite,
        tell: Any,
    ) -> None:
        from quarkcli.model.runner import Runner

        self.checkpoint = checkpoint
        self.on_nonfinite = on_nonfinite
        self.tell = tell
        self.found = NonFinite(_roles(checkpoint))
        self.copied = set(checkpoint.copied())
        folder = checkpoint.source.folder
        self.runner = Runner(
            folder, checkpoint.headers, device=device, dtype=dtype, trust_remote_code=trust, eager=eager,
            transposed_experts=checkpoint.transposed_experts,
        )  # fmt: skip
        self.dtype = self.runner.dtype
        self.runner.check_tokens(tokens)
        if not self.runner.has_head:
            raise ModelError(
                "the model has no head, so it gives no probabilities to measure",
                where=str(folder),
                hint="use 'quark verify' to check the files",
                kind="E-MODEL-HEAD",
            )
        outside = self.runner.outside_tensors()
        if turned := list(checkpoint.turned_inputs(outside)):
            raise ModelError(
                "the config rotates its input, but it is outside the decoder blocks",
                where=turned[0],
                kind="E-SOURCE-TRANSFORM",
            )
        self.walk = Walk(self.runner, lambda: self._read(outside), tokens, None, batch, tell)
        self.walk.start()
        self.require_numbers("behind the embedding")

    def advance(self, block: int, weights_only: bool) -> None:
        """Loads a block, runs it, forgets it."""
        names = self.runner.block_tensors(block)
        self.runner.load_block(block, self._read(names))
        self.walk.turned[block] = self.checkpoint.turned_inputs(names)
        self.walk.advance(block, self._handlers(names, weights_only))
        self.runner.unload_block(block)
        self.require_numbers(f"behind block {block}")

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """Returns tensors in source form. Raises CheckError for NaN or infinity in one that is stored as it was."""
        tensors = self.checkpoint.read_many(names, self.dtype)
        for name in names:
            if name in self.copied:
                self.found.look(name, tensors[name])
        first = self.found.first()
        if first is not None and self.on_nonfinite == "stop":
            raise CheckError(f"{first[1]} (in {self.folder})", where=first[0], hint=HINT, kind="E-CHECK-NONFINITE")
        return tensors

    def warn(self) -> None:
        """Warns of NaN and infinity that were taken as they are."""
        for sentence in nonfinite.warnings(self.found.parameters, self.found.others):
            self.tell(Message(f"{self.folder}: {sentence}", "warning"))

    @property
    def folder(self) -> str:
        return str(self.checkpoint.source.folder)

    def require_numbers(self, place: str, values: list[Tensor] | None = None) -> None:
        """Raises CheckError when `values` (None: hidden states) hold NaN, or infinity where there should be none."""
        if all(is_finite(value) for value in (self.walk.served if values is None else values)):
            return
        raise CheckError(
            f"the first NaN or inf is {place}",
            where=self.folder,
            hint="repair the checkpoint first: every later measurement would be wrong",
            kind="E-CHECK-NONFINITE",
        )

    def _handlers(self, names: list[str], weights_only: bool) -> Handlers:
        if weights_only or not self.checkpoint.quantized:
            return Handlers()
        activations = self.checkpoint.activation_quantizers(names)
        return quantizing_handlers(activations, self.checkpoint.attention_quantizers(names))

    def tail_handlers(self, weights_only: bool) -> Handlers:
        """Returns handlers that quantize the input and the output of a quantized head as well."""
        return self._handlers(self.runner.outside_tensors(), weights_only)


def evaluate(
    directory: str,
    *,
    baseline: str | None = None,
    text: str | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    bos: str = "auto",
    weights_only: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    on_nonfinite: OnNonfinite = "stop",
    offline: bool = False,
    allow_pickle: bool = False,
    tell: Listener,
) -> dict[str, Any]:
    """Returns perplexity, and KL from `baseline` per token in nats, of it against the directory (`quark/eval/1`).

    text          a text file; None: the beginning of the built-in text
    window        tokens per window; None: `windows.WINDOW`, or what the model takes if less
    bos           first tokens of a window (see `Tokenizer.prefix`)
    weights_only  leave activations and cache as they are
    threads       on the CPU; None: see `threads.default`
    on_nonfinite  `keep`: go on with NaN and infinity in tensors that were not quantized, while no result is one
    dtype         of the computation: float32, bfloat16; auto: float32 on a CPU, bfloat16 on a GPU
    """
    from quarkcli.evaluation import windows
    from quarkcli.job import device as devices
    from quarkcli.model.tokenizer import load_tokenizer

    started, device = time.monotonic(), devices.device(device)
    memory.return_large_buffers()
    compute = _compute_dtype(dtype, device)
    checkpoint, reference = _open(directory, baseline, tell, allow_pickle, offline)
    models = [model for model in (checkpoint, reference) if model is not None]
    window = windows.width(window, [family.position_limit(model.source.config) for model in models])
    tokenizer = load_tokenizer(checkpoint.source.folder, trust_remote_code)
    rows = windows.windows(tokenizer, text, window, max_tokens, bos)
    tell(Message(f"{len(rows.tokens)} windows of {window} tokens from {rows.source}, {_name(compute)}"))
    _begin(tell, models, rows, tokenizer, max_tokens, bos, weights_only, trust_remote_code)
    with limited(threads or default()):
        scores = scored(
            checkpoint, reference, rows, dtype=compute, device=device, trust=trust_remote_code, decode=tokenizer.decode,
            weights_only=weights_only, on_nonfinite=on_nonfinite, batch=max(1, BATCH // window), tell=tell,
        )  # fmt: skip
    return {
        "schema": SCHEMA,
        "directory": called(directory),
        "baseline": None if baseline is None else called(baseline),
        **scores,
        "text": text or "builtin",
        "window": window,
        "bos": rows.prefix,
        "weights_only": weights_only,
        "device": device,
        "peak_rss_bytes": memory.peak_rss(),
        "seconds": round(time.monotonic() - started, 2),
    }


def scored(
    checkpoint: Checkpoint,
    reference: Checkpoint | None,
    rows: Windows,
    *,
    dtype: torch.dtype | None,
    device: str,
    trust: bool,
    weights_only: bool = False,
    on_nonfinite: OnNonfinite = "stop",
    batch: int,
    decode: Decode,
    tell: Listener,
) -> dict[str, Any]:
    """Returns tokens, perplexity and, beside a reference, its perplexity, KL and agreement, as in `quark/eval/1`.

    dtype   of the computation; None: the model's own
    batch   windows in one forward
    decode  token numbers -> text
    """
    # Both sides compute attention in the same way, so that their distance is that of the quantization.
    eager = checkpoint.quantizes_softmax and not weights_only
    setting = (rows.tokens, batch, dtype, device, trust, eager, on_nonfinite)
    tested = Side(checkpoint, *setting, tell)
    source = Side(reference, *setting, tell) if reference else None
    drift = _walk_blocks(tested, source, weights_only, tell)
    found = score(tested, source, rows, weights_only, decode)
    return {**found, "drift": drift, "dtype": _name(tested.dtype)}


def _open(
    directory: str, baseline: str | None, tell: Listener, allow_pickle: bool, offline: bool
) -> tuple[Checkpoint, Checkpoint | None]:
    tell(Working("opening the models"))
    sources = [Source.open(directory, allow_pickle=allow_pickle, local=True)]
    if baseline is not None:
        sources.append(open_original(baseline, directory, offline=offline, allow_pickle=allow_pickle, tell=tell))
    if allow_pickle and not any(source.pickled for source in sources):
        tell(Message(pickles.UNUSED, "warning"))
    checkpoint, *references = map(Checkpoint, sources)
    for model in (checkpoint, *references):  # the model's class would leave out a block that config.json does not count
        family.check_fit(model.family, model.layout, model.source.config, model.headers)
    if not references:
        return checkpoint, None
    (reference,) = references
    _check_baseline(checkpoint.source.config, reference.source.config)
    return checkpoint, reference


def _begin(
    tell: Listener, models: list[Checkpoint], rows: Windows, tokenizer: Any, max_tokens: int | None, bos: str,
    weights_only: bool, trust: bool,
) -> None:  # fmt: skip
    """Tells that evaluation begins, with a warning for every flag that has no effect on what is measured."""
    count, window = rows.tokens.shape
    more = (count + 1) * (window - len(rows.prefix))
    found = {
        f"--tokens {max_tokens} is not used: the text has fewer than {more}": max_tokens and max_tokens >= more,
        "--bos off is not used: the tokenizer has no BOS token at the start of a text": (
            bos == "off" and not tokenizer.prefix("auto")
        ),
        "--weights-only is not used: neither activations nor a cache are quantized": (
            weights_only and not any(model.quantizes_activations for model in models)
        ),
        idle.NO_CODE: trust and not any(idle.brings_code(model.source) for model in models),
    }
    for text, holds in found.items():
        if holds:
            tell(Message(text, "warning"))
    memory.collect()
    tell(Phase("evaluate"))


def _check_baseline(config: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    """Raises UsageError unless the same tokens mean the same to both, and their hidden states can be compared."""
    facts = {
        "vocab_size": family.vocabulary,
        "num_hidden_layers": family.block_count,
        "hidden_size": family.hidden_size,
    }
    for key, of in facts.items():
        ours, theirs = of(config), of(baseline)
        if ours != theirs:
            raise UsageError(
                f"{key} is {theirs}, but {ours} in the checkpoint",
                where="--baseline",
                hint="give the original model of this checkpoint",
                kind="E-BASELINE-OTHER",
            )


def _compute_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise UsageError(
            f"unknown dtype '{dtype}'", where="--dtype", hint="use auto, float32 or bfloat16", kind="E-FLAG-VALUE"
        )
    return _DTYPES[dtype]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _walk_blocks(tested: Side, source: Side | None, weights_only: bool, tell: Listener) -> list[float]:
    """Moves both sides through all blocks. Returns how far apart hidden states are behind each.

    Nothing where their channels were turned or permuted: they are far apart, though the function is the same.
    """
    drift: list[float] = []
    blocks = tested.runner.num_blocks
    if source is not None and source.runner.num_blocks != blocks:
        raise UsageError(
            f"the checkpoint has {blocks} blocks, and the baseline {source.runner.num_blocks}",
            where="--baseline",
            kind="E-BASELINE-OTHER",
        )
    begun = time.monotonic()
    turned = source is not None and _distance(source.walk.served[0], tested.walk.served[0]) > _OTHER
    if turned:
        tell(Message("an algorithm has turned or permuted the hidden states' channels: there is no drift to measure"))
    for block in range(blocks):
        at = time.monotonic()
        tested.advance(block, weights_only)
        error = None
        if source is not None:
            source.advance(block, weights_only)
            error = None if turned else _distance(source.walk.served[0], tested.walk.served[0])
            drift += [error] if error is not None else []
        now = time.monotonic()
        eta = (now - begun) / (block + 1) * (blocks - block - 1)
        rss = memory.peak_rss()
        tell(PartDone(block + 1, blocks, f"block {block}", "eval", now - at, error, rss, 0, eta, "drift"))
    return drift


def _distance(reference: Tensor, other: Tensor) -> float:
    norm = reference.float().norm()
    return float((reference.float() - other.float()).norm() / norm) if float(norm) else 0.0


def _roles(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the role of every tensor that the family knows."""
    return checkpoint.layout.tensor_roles
