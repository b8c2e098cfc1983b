"""Holds the result of the work on one part: tensors for the writer, facts for the journal and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quarkcli import memory
from quarkcli.events import Measure, PartDone
from quarkcli.plan.model import Part

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PartResult:
    """The result of a part: packed tensors by file name, and facts for journal and report.

    output_error      of the block's output, relative to the source block's for the same inputs; None without data
    others            the tensors in further dialects
    apart             of these, those whose weights decode a little otherwise: see `Packing.apart`
    exact             weight that its format holds without a solver -> how many of its blocks were rounded
    dead_inputs       weight -> inputs that were always zero in calibration
    outcomes          weight -> `Outcome` of its solver
    silent            activations with a static scale that were zero altogether
    tuning            tuner -> error of the block's output on held-out rows, `before` and `after` it
    nonfinite         kept parameters with NaN or infinity; `nonfinite_others`: buffers and unknown tensors
    transforms        what each transform decided, by its key
    weight_seconds    weight -> seconds of solving and packing
    sites             activation that calibration measured -> see `forward.outliers.Outliers.facts`
    skipped           weight, activation or part that algorithms passed over -> what was not finite there
    """

    tensors: dict[str, Tensor]
    output_error: float | None
    weight_errors: dict[str, float]
    expert_tokens: dict[str, dict[int, int]]
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    dead_inputs: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    nonfinite_others: list[str] = field(default_factory=list)
    tuning: dict[str, dict[str, float]] = field(default_factory=dict)
    transforms: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    exact: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    apart: dict[str, int] = field(default_factory=dict)
    others: list[dict[str, Tensor]] = field(default_factory=list)
    weight_seconds: dict[str, float] = field(default_factory=dict)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def error(self) -> tuple[float | None, Measure]:
        """Returns the error that people are shown, and what it is of."""
        if self.output_error is not None:
            return self.output_error, "output"
        errors = self.weight_errors.values()
        return sum(errors) / len(errors) if errors else None, "weight"

    def told(self, part: Part, total: int, label: str, eta: float, device: str) -> PartDone:
        """Returns the event that says that the part is done. `label`: what its weights became, if any was quantized."""
        label = label if self.weight_errors else "kept"
        rss, gpu = memory.peak_rss(), memory.peak_gpu(device)
        error, measure = self.error
        return PartDone(part.index + 1, total, part.name, label, self.seconds, error, rss, gpu, eta, measure)

    def record(self, device: str = "cpu") -> dict[str, Any]:
        """Returns the JSON form without the tensors, and the memory of this process by now."""
        facts = {key: value for key, value in vars(self).items() if key not in ("tensors", "others")}
        tokens = {layer: {str(e): n for e, n in counts.items()} for layer, counts in self.expert_tokens.items()}
        rss, peak = memory.resident()
        used = {"rss_bytes": rss, "peak_rss_bytes": peak, "peak_gpu_bytes": memory.peak_gpu(device)}
        return {**facts, "expert_tokens": tokens, **used}
