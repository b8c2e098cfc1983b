"""Holds the options of a job, and all that is known of it before the first weight is read. Torch-free data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quarkcli import threads
from quarkcli.algorithms.base import Assignment
from quarkcli.dialects import AUTO
from quarkcli.dialects.base import Writer
from quarkcli.disk.origin import Origin
from quarkcli.disk.side_files import SideFiles
from quarkcli.disk.source import Source
from quarkcli.disk.weights import WeightSource
from quarkcli.family import Layout
from quarkcli.forward.defaults import Offload
from quarkcli.job.forecast import Forecast
from quarkcli.plan.advice import Advice
from quarkcli.plan.compose import Overrides
from quarkcli.plan.coverage import Coverage
from quarkcli.plan.fused import Servers
from quarkcli.plan.model import Plan
from quarkcli.recipe.recipe import Recipe

OnNonfinite = Literal["stop", "skip-algorithm", "keep"]
SKIP: OnNonfinite = "skip-algorithm"


def dialect_of(options: Options, recipe: Recipe) -> str:
    """Returns the dialect that was asked for, or a comma list of them, or `auto`."""
    return next(name for name in (options.dialect, recipe.dialect, AUTO) if name is not None)


@dataclass
class Options:
    """The options of the command line. Defaults are the flags' defaults; None means not given.

    command   the command line itself, for the report
    """

    model: str
    scheme: str | None = None
    recipe: str | Recipe | None = None
    settings: Sequence[str] = ()
    output: Path | None = None
    dialect: str | None = None
    target: Servers = "auto"
    overrides: Overrides = field(default_factory=Overrides)
    algorithm: str | None = None
    calib_data: str | None = None
    calib_samples: int | None = None
    calib_seqlen: int | None = None
    calib_batch: int | None = None
    calib_column: str | None = None
    chat_template: Path | None = None
    bos: Literal["auto", "on", "off"] | None = None
    allow_short: bool = False
    moe_calibration: Literal["routed", "all"] | None = None
    min_expert_tokens: int | None = None
    device: str = "auto"
    seed: int | None = None
    resume: Literal["auto", "never", "require"] = "auto"
    overwrite: bool = False
    strict: bool = False
    on_nonfinite: OnNonfinite = "stop"
    time_budget: float | None = None
    max_cpu_mem: int | None = None
    max_gpu_mem: int | None = None
    offload: Offload = "auto"
    threads: int | None = None
    verify: bool = True
    evaluate: bool | None = None
    tp: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    revision: str = "main"
    offline: bool = False
    keep_download: bool = False
    command: Sequence[str] = ()


def seed_of(options: Options, recipe: Recipe) -> int:
    """Returns the seed of everything random: the flag's, else the recipe's, else 0."""
    return options.seed if options.seed is not None else recipe.seed or 0


@dataclass
class Calibration:
    """The data that a calibrated plan uses: flags, else the recipe, else defaults.

    asked   the number of rows was given, so fewer are an error
    moe     `routed`: experts see their own tokens; `all`: every token feeds every expert's statistics
    min_expert_tokens   with fewer, the layer's statistics stand in for an expert
    bos     `on`: rows begin with the tokenizer's BOS token; `auto`: as the tokenizer begins a text (see
            `Tokenizer.prefix`)
    """

    source: str
    samples: int
    seqlen: int
    asked: bool
    column: str | None = None
    seed: int = 0
    moe: Literal["routed", "all"] = "routed"
    min_expert_tokens: int = 1
    bos: Literal["auto", "on", "off"] = "auto"
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Download:
    """The weight files of a model on the hub that are not here.

    at_once   bytes of them that lie beside the output at most; 0: they go to the hub's cache
    kept      why they stay in the cache; empty: each is dropped after its last use
    """

    files: int
    bytes: int
    at_once: int
    kept: str


@dataclass
class Prepared:
    """All that is known before the first weight is read.

    weights          where the source's tensors come from, in source form
    origin           the quantization of a source that has one; its weights are decoded as they are read
    advice           the choices that the algorithm `auto` stands for; empty: the steps were named
    needs            site -> the statistics that the job has to make of it (see `preflight.data_needs`)
    prepass          the same of the pass over the original model before part 0; empty: there is none
    tensor_parallel  usual numbers of devices over which servers can split the output
    download         weight files that have to be downloaded; None: all are here
    folder           the folder in the output that gets the checkpoint; empty: the output is the checkpoint
    others           the same in the further dialects of a list; what differs is the dialect, and what follows from it
    """

    options: Options
    recipe: Recipe
    source: Source
    weights: WeightSource
    origin: Origin | None
    layout: Layout
    plan: Plan
    steps: list[Assignment]
    advice: list[Advice]
    dialect: Writer
    dialect_reason: str
    needs: dict[str, set[str]]
    prepass: dict[str, set[str]]
    calibration: Calibration | None
    forecast: Forecast
    coverage: Coverage
    tensor_parallel: list[int]
    download: Download | None
    output: Path
    side_files: SideFiles
    warnings: list[str]
    folder: str = ""
    others: list[Prepared] = field(default_factory=list)

    @property
    def asked(self) -> str:
        """Returns the dialect that was asked for, or a comma list of them, or `auto`."""
        return dialect_of(self.options, self.recipe)

    @property
    def every(self) -> list[Prepared]:
        """Returns one for each dialect, this one first: with its weights, as they decode, calibration goes on."""
        return [self, *self.others]

    @property
    def checkpoint(self) -> Path:
        """Returns the directory of the checkpoint."""
        return self.output / self.folder

    @property
    def seed(self) -> int:
        """Returns the seed of everything random."""
        return seed_of(self.options, self.recipe)

    @property
    def is_random(self) -> bool:
        """True where the seed decides anything: rows of the calibration data, or signs of a transform."""
        return self.calibration is not None or any(step.algorithm.random for step in self.steps)

    @property
    def threads(self) -> int:
        """Returns the number of threads that compute on the CPU."""
        return self.options.threads or threads.default()
