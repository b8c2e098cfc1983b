"""Defines the shape of quark/report.json, as far as it is shown."""

from __future__ import annotations

from quarkcli.documents.shape import Shape


class _Model(Shape):
    name: str
    path: str
    commit: str | None
    family: str


class _Named(Shape):
    name: str


class _Solver(Shape):
    share: float
    held_out_share: float | None
    damp: dict[str, int]
    strength: dict[str, int]
    nearest: list[str]


class _Outcomes(Shape):
    solvers: dict[str, _Solver]


class _Advice(Shape):
    format: str
    weights: int
    steps: list[str]
    why: str


class _Dialect(Shape):
    name: str
    reason: str


class _Size(Shape):
    source_bytes: float
    output_bytes: float
    effective_bits: float
    bytes_by_dtype: dict[str, float]


class _Experts(Shape):
    parameters: int
    share_quantized: float | None


class _Calibration(Shape):
    source: str
    rows: int
    seqlen: int


class _Loss(Shape):
    mean_output_error: float | None
    output_errors: dict[str, float]
    mean_weight_error: float | None
    weight_errors: dict[str, float]


class _Evaluation(Shape):
    tokens: int
    perplexity: float
    baseline_perplexity: float
    perplexity_increase: float
    kl: float
    top1_agreement: float
    text: str
    dtype: str


class _Source(Shape):
    said: list[str]


class Report(Shape):
    """See `quarkcli.report.build`."""

    model: _Model
    recipe: _Named
    algorithms: list[str]
    advice: list[_Advice] | None = None
    dialect: _Dialect
    size: _Size
    experts: _Experts
    calibration: _Calibration | None
    loss: _Loss
    evaluation: _Evaluation | None
    outcomes: _Outcomes | None = None
    source: _Source | None = None
    exact: dict[str, int] | None = None
    threads: int | None = None
    online: dict[str, int] | None = None
    modules_by_scheme: dict[str, int]
    attention_by_scheme: dict[str, int]
    shared_scales: dict[str, int]
    decided_by: dict[str, dict[str, int]]
    kept_reasons: dict[str, int]
    split: dict[str, int]
    warnings: list[str]
    checks: list[str]
    device: str
    seconds: float
    peak_rss_bytes: float
    peak_gpu_bytes: float | None
