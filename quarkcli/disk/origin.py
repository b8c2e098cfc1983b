"""Says how a source is quantized, what of it a job leaves out, and what is wrong with it. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from quarkcli.dialects.base import StoredTarget
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.source import Source
from quarkcli.disk.weights import WeightSource
from quarkcli.errors import ModelError
from quarkcli.family import quantization
from quarkcli.memory import without_collection
from quarkcli.plan.model import Plan
from quarkcli.spec import TensorSpec

_PART = r"(?:weight|input|output|activation|prob_output|q|k|v|kv|k_cache|v_cache)"
# Leaves of tensors that mean nothing without a config that speaks of them.
_CODES = re.compile(
    rf"\.(?:{_PART}_(?:scale|scale_inv|scale_2|global_scale|zero_point|packed|shape|g_idx)"
    r"|qweight|qzeros|scales|g_idx|\w+_blocks|\w+_scales)$"
)
_HINT = "download the model again, or give the 16-bit model: files are missing, or config.json is of another model"


@dataclass
class Origin:
    """The quantization of a source, whose weights are decoded block by block while a job reads them.

    method    the word of its config for it
    weights   module -> how its weight is stored
    tensors   how many tensors of the files are decoded
    dtype     safetensors dtype that decoded weights have
    reads     weight whose input or output is quantized too -> whether that has a static scale
    cache     how many scales attention and its cache have
    decoded_because  why weights that a plan leaves alone do not keep their codes; empty: they do, or there are none
    stripped  how many of those that keep their codes do not keep static scales of what they read
    """

    method: str
    weights: Mapping[str, str]
    tensors: int
    dtype: str
    reads: Mapping[str, bool]
    cache: int
    decoded_because: str = ""
    stripped: int = 0

    def stored(self) -> str:
        """Returns how weights are stored, in words: `fp8_e4m3 tile 128x128`; with counts where they differ."""
        kinds = Counter(self.weights.values())
        if len(kinds) == 1:
            return next(iter(kinds))
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()) or "no weights"

    def left_alone(self, plan: Plan) -> list[str]:
        """Returns the quantized weights that are written decoded, because the plan does not quantize them."""
        targets = plan.targets
        return [name for name in self.weights if name not in targets or targets[name].weight is None]

    def lines(self, plan: Plan) -> list[str]:
        """Returns what becomes of it, one sentence a line."""
        found = [f"{self.stored()}, decoded layer by layer ({self.tensors} tensors -> {len(self.weights)} weights)"]
        if plan.carried:
            found.append(f"{len(plan.carried)} of its weights are not changed and keep their codes and scales")
        if self.stripped:
            found.append(f"{self.stripped} of these lose the static scales of their inputs: {self.decoded_because}")
        left = len(self.left_alone(plan))
        if left:
            why = f": {self.decoded_because}" if self.decoded_because else ""
            found.append(f"{left} of its weights are not quantized again and are written as {self.dtype}{why}")
        found += [f"not kept: {what} ({count}); the job makes new ones" for what, count in self.passed(plan).items()]
        return found

    def passed(self, plan: Plan) -> dict[str, int]:
        """Returns what is quantized beside weights, and is dropped -> how many; a job observes its own."""
        kept = {name for name in plan.carried if plan.targets[name].input is not None}
        reads = [static for name, static in self.reads.items() if name not in kept]
        found = {
            "its quantization of inputs and outputs": len(reads),
            "static scales of that": sum(reads),
            "its scales of attention and the KV cache": self.cache,
        }
        return {what: count for what, count in found.items() if count}

    def facts(self, plan: Plan) -> dict[str, Any]:
        """Returns the JSON form."""
        return {
            "method": self.method,
            "weights": dict(Counter(self.weights.values())),
            "tensors": self.tensors,
            "dtype": self.dtype,
            "carried": sorted(plan.carried),
            "decoded": self.left_alone(plan),
            "dropped": self.passed(plan),
            "said": self.lines(plan),
        }


@without_collection()
def open_weights(source: Source) -> tuple[WeightSource, Origin | None]:
    """Returns where the weights of a source come from, and its quantization; None for one that is not quantized.

    Raises ModelError for one that nothing here reads, and for files that its config does not describe.
    """
    checkpoint = Checkpoint(source)
    if not checkpoint.quantized:
        return source, None
    _check(checkpoint)
    view, config = checkpoint.view, quantization(source.config)
    stored = view.targets.values()
    return checkpoint, Origin(
        method=str(config.get("quant_method", checkpoint.reader.name if checkpoint.reader else "")),
        weights={name: _brief(each) for name, each in view.targets.items()},
        tensors=len({name for each in stored for name in each.tensors}),
        dtype=checkpoint.dtype,
        reads={each.name: each.is_static for each in stored if each.input or each.output},
        cache=sum(len(attention.scales) for attention in view.attention.values()),
    )


def _brief(stored: StoredTarget) -> str:
    """Returns element and granularity: `fp8_e4m3 tile 128x128`."""
    return _words(stored.weight)


@cache
def _words(spec: TensorSpec) -> str:
    return spec.codes.describe().partition(",")[0]


def _check(checkpoint: Checkpoint) -> None:
    """Raises ModelError for codes without scales, scales without codes, and inputs that are turned as it runs."""
    view, headers = checkpoint.view, checkpoint.source.headers
    where = str(checkpoint.source.folder)
    if not view.targets and not view.attention:
        raise ModelError(
            "its config says that it is quantized, but no tensor in its files is",
            where=where,
            hint=_HINT,
            kind="E-SOURCE-CONTRADICTS",
        )
    if view.online:
        raise ModelError(
            "its weights are rotated together with their inputs, so decoding the weights alone does not give the "
            "original ones",
            where=next(iter(view.online)),
            hint="give the original model",
            kind="E-SOURCE-TRANSFORM",
        )
    for name in checkpoint.copied():
        dtype = headers[name].dtype
        if (name.endswith(".weight") and dtype[0] not in "BF") or dtype.startswith("F8"):
            raise ModelError(
                f"is stored as {dtype}, but has no scale", where=name, hint=_HINT, kind="E-SOURCE-CONTRADICTS"
            )
        if _CODES.search(name):
            raise ModelError(
                "the quantization config does not mention this tensor",
                where=name,
                hint=_HINT,
                kind="E-SOURCE-CONTRADICTS",
            )
