"""Defines the shape of quark/report.json, and its JSON Schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from quarkcli.documents.shape import Shape, check
from quarkcli.errors import ModelError


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
    planned_bytes: float
    effective_bits: float
    bytes_by_dtype: dict[str, float]


class _Experts(Shape):
    parameters: int
    quantized_parameters: int
    share_quantized: float | None
    calibration_tokens: dict[str, dict[str, int]]


class _Calibration(Shape):
    source: str
    rows: int
    seqlen: int


class _Loss(Shape):
    mean_output_error: float | None
    output_errors: dict[str, float]
    mean_weight_error: float | None
    weight_errors: dict[str, float]


class _Token(Shape):
    kl: float
    window: int
    position: int
    context: str
    token: str
    source_expects: str
    expects: str


class _Evaluation(Shape):
    tokens: int
    perplexity: float
    baseline_perplexity: float
    perplexity_increase: float
    kl: float
    top1_agreement: float
    text: str
    dtype: str
    drift: list[float]
    worst_tokens: list[_Token]


class _Source(Shape):
    said: list[str]


class _State(Shape):
    finished: bool
    parts: int
    of: int


class _Phase(Shape):
    name: str
    seconds: float


class _Host(Shape):
    name: str
    system: str
    cores: int | None
    memory_bytes: int | None
    ranks: int


class _Run(Shape):
    command: list[str] | None
    started: str
    ended: str
    phases: list[_Phase]
    versions: dict[str, str]
    host: _Host


class _Part(Shape):
    name: str
    kind: str
    layer: int | None
    tensors: int
    source_bytes: int
    bytes: int
    done: bool
    output_error: float | None
    weight_error: float | None
    seconds: float | None
    rss_bytes: int | None
    peak_rss_bytes: int | None
    peak_gpu_bytes: int | None


class _Site(Shape):
    name: str
    part: str
    layer: int | None
    absmax: float | None
    quantiles: dict[str, float]
    channels: int
    outlier_ratio: float | None


class _Tensor(Shape):
    name: str
    tensor: str
    part: str
    layer: int | None
    expert: int | None
    role: str
    shape: list[int]
    fate: Literal["kept", "quantized", "changed", "dropped"]
    format: str
    why: str
    bits: float
    source_bytes: int
    bytes: int
    error: float | None
    output_error: float | None
    seconds: float | None


class _DeadInputs(Shape):
    weights: dict[str, int]
    activations: list[str]


class Report(Shape):
    """The shape of quark/report.json. docs/report.md says what its fields mean."""

    schema_: Literal["quark/report/2"] = Field(alias="schema")
    quark_version: str
    state: _State
    run: _Run
    parts: list[_Part]
    sites: list[_Site]
    tensors: list[_Tensor]
    dead_inputs: _DeadInputs
    skipped: dict[str, str]
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


def fits(document: Any) -> bool:
    """True for a whole report of this form."""
    try:
        check(Report, document, "")
    except ModelError:
        return False
    return True


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a report."""
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "quark/report/2"}
    return title | {key: value for key, value in Report.model_json_schema().items() if key != "title"}
