"""Defines the contracts of algorithms: transforms, solvers, refiners, tuners. Their declarations are torch-free.

The worker groups the weights and hands each solver one `Problem` after the other; a solver knows nothing of files,
dialects or lists of experts. The order in a part: transforms before, observe, transforms after, shared amax and static
scales, solve, refine, tune, pack, advance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from quarkcli.plan.model import Changes, Plan, QuantizedTarget, Target
from quarkcli.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.algorithms.tensors import PartTensors
    from quarkcli.forward.statistics import Statistics
    from quarkcli.job.tuning import TunedBlock
    from quarkcli.numerics.quantize import Quantized

Kind = Literal["transform", "solver", "refiner", "tuner"]
Needs = dict[str, set[str]]  # kinds of statistics by site
# Rows that `samples` keeps of an activation at most: those that something is fitted to, and held-out ones.
FITTED_ROWS, HELD_ROWS = 512, 256
FIRST = 8  # for each so many of them, one first token of a calibration row is kept beside them
SAMPLED_ROWS = (FITTED_ROWS + HELD_ROWS) * (FIRST + 1) // FIRST


@dataclass
class Moment:
    """Second moments of the activation that the weights of a problem read: running means over calibration tokens.

    They belong to the problem: a solver may set to None what it needs no longer, and so free it.

    gram       mean of x x^T, float32 [in, in]
    tokens     number of tokens that it is the mean of; 0 where it is borrowed from the layer of an expert that saw none
    cross      mean of x s^T, where s is the same token's activation in the source model; only where a solver needs it
    gram_val   mean of x x^T over the held-out tokens; None when none were held out, or nobody needs it
    cross_val  mean of x s^T over the held-out tokens; None when none were held out, or nobody needs it
    """

    gram: Tensor
    tokens: int
    cross: Tensor | None = None
    gram_val: Tensor | None = None
    cross_val: Tensor | None = None

    def scaled(self, factor: Tensor) -> Moment:
        """Returns the moments of the activation times `factor`, float32 [in]."""
        both = factor[:, None] * factor
        return self._changed(lambda mean: mean * both)

    def turned(self, block: int) -> Moment:
        """Returns the moments of the activation behind a block Hadamard of this size."""
        from quarkcli.numerics.online import turned

        def both_sides(mean: Tensor) -> Tensor:
            return turned(turned(mean, block).T, block).T

        return self._changed(both_sides)

    def means(self) -> list[Tensor]:
        """Returns all that there are."""
        return [mean for mean in (self.gram, self.cross, self.gram_val, self.cross_val) if mean is not None]

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Moment:
        more = (mean if mean is None else change(mean) for mean in (self.cross, self.gram_val, self.cross_val))
        return Moment(change(self.gram), self.tokens, *more)


class Outcome(NamedTuple):
    """The result of a solver on one problem, for journal and report.

    before, after   share of the weights' outputs that rounding to nearest with the same scales loses, and the result:
                    the mean over weights, on the tokens that it was fitted to, of a sample of rows; `held_before` and
                    `held_after` on held-out tokens, None where none were held out; against the source stream's
                    outputs, where a solver goes for these, less what no choice changes
    damp            ridge as a share of the mean diagonal, as used; `attempts`: dampings until there was a factor
    strength        of what a solver aims for beside the weights, as used
    sweeps          of refinement
    nearest         what the solver found lost more on held-out tokens, and the weights are rounded to nearest
    tuned           a tuner changed codes or scales afterwards
    """

    solver: str
    before: float
    after: float
    held_before: float | None
    held_after: float | None
    damp: float
    attempts: int
    strength: float
    sweeps: int
    nearest: bool
    tuned: bool = False


def _unreported(outcome: Outcome) -> None:
    """Takes an outcome that nobody asked for."""


@dataclass(frozen=True)
class Problem:
    """Weights that read one activation (of one expert), in one stage, with one spec. Their rows are independent.

    site      name of the activation; None where nothing is read by a matrix (embeddings)
    expert    index of the expert that reads it, None for ordinary weights
    stage     place in the order of a block's stages, when a solver asks for stages; else 0
    targets   the weights, in plan order
    weights   the source weights [out, in], in the source's dtype, on the device
    amax      per weight: amax (float32 []) that its scale group shares, None when its scales are its own
    moment    None when the solver did not ask for one, or no token reached the site
    warn      takes a sentence for the log and the report
    report    takes the outcome
    known     per weight: what `known_range` returned for it; empty: it was not asked
    """

    site: str | None
    expert: int | None
    stage: int
    targets: tuple[QuantizedTarget, ...]
    weights: tuple[Tensor, ...]
    amax: tuple[Tensor | None, ...]
    moment: Moment | None
    warn: Callable[[str], None]
    report: Callable[[Outcome], None] = _unreported
    known: tuple[Tensor | None, ...] = ()

    @property
    def name(self) -> str:
        """Returns the first weight's name, for messages."""
        return self.targets[0].name

    @property
    def spec(self) -> TensorSpec:
        return self.targets[0].weight

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the number of rows of all weights, and of inputs."""
        return sum(len(weight) for weight in self.weights), self.weights[0].shape[1]

    def singles(self) -> Iterator[Problem]:
        """Yields a problem for each weight."""
        for at in range(len(self.targets)):
            own = slice(at, at + 1)
            yield replace(
                self, targets=self.targets[own], weights=self.weights[own], amax=self.amax[own], known=self.known[own]
            )


class Effort(NamedTuple):
    """The work of an algorithm on one problem, for the forecast of time: floating point operations.

    factors     of factors and inverses
    products    of large products in float32
    candidates  values of weights times what is tried or done with each, one after the other
    """

    factors: float = 0.0
    products: float = 0.0
    candidates: float = 0.0


class Algorithm:
    """An algorithm. Every member's class declares these; what it leaves out has the values here.

    name         the file's name, in its dash form
    parameters   settings that a recipe may give, with their defaults
    streams      the streams of activations it wants to see: `served`, what the quantized blocks below hand on (in one
                 pass: what the source's do), and `source`, what those of the source model do
    random       it draws from the seed
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    parameters: ClassVar[Mapping[str, Any]] = {}
    streams: ClassVar[frozenset[str]] = frozenset({"served"})
    random: bool = False

    def needs(self, plan: Plan) -> Needs:
        """Returns the kinds of statistics by site name; empty: no data."""
        return {}

    def check(self, plan: Plan) -> None:
        """Raises ConfigError when the plan is not one it can work on."""
        return

    def memory(self, plan: Plan) -> int:
        """Returns the bytes it needs beside the part's own tensors, at most."""
        return 0

    def effort(self, shape: tuple[int, int], spec: TensorSpec) -> Effort:
        """Returns the work on a problem of so many rows and inputs, beside rounding and packing."""
        return Effort()

    def forwards(self, tokens: int) -> float:
        """Returns the passes of all calibration tokens through a block that it adds."""
        return 0.0


class Solver(Algorithm):
    """A solver chooses the codes and scales of weights.

    staged   it wants the weights of a block one activation after the other, each on what the quantized ones before it
             hand on; the block is then run again for every activation
    apart    without data it may get the weights of a problem one by one
    balance  exponent by which frequent tokens count less in the second moments that it wants, see `forward.balance`
    """

    kind = "solver"
    staged: bool = False
    apart: bool = False
    balance: float = 0.0

    def solve(self, problem: Problem) -> list[Quantized] | None:
        """Returns codes and scales of every weight; None: the worker rounds to nearest, and says so."""
        raise AssertionError("a solver solves")

    def solve_many(self, problems: Sequence[Problem]) -> list[list[Quantized] | None]:
        """Does as `solve`, of problems of one activation's experts, all of one shape and spec."""
        return [self.solve(problem) for problem in problems]

    def at_once(self, shape: tuple[int, int]) -> int:
        """Returns how many problems of a shape, all rows x inputs, it wants together, as `memory` counts on it."""
        return 1


class Refiner(Algorithm):
    """A refiner improves the codes and scales that any solver chose."""

    kind = "refiner"

    def refine(self, problem: Problem, quantized: list[Quantized]) -> list[Quantized]:
        """Returns codes and scales that are no worse by the objective of the problem."""
        raise AssertionError("a refiner refines")


class Tuned(NamedTuple):
    """The result of a tuner for one block. What it leaves out stays.

    weights  codes and scales by weight
    vectors  values by tensor of the source: norms and biases that the plan keeps, and the tuner declared
    before   error of the block's output on held-out rows before the tuner, and `after` it; None: not measured
    """

    weights: Mapping[str, Quantized]
    vectors: Mapping[str, Tensor] = {}
    before: float | None = None
    after: float | None = None


class Tuner(Algorithm):
    """A tuner improves the codes and scales of one block together, by the output of the block.

    Its needs name at least one activation of every block that it works on, by the kind `outputs`.
    """

    kind = "tuner"

    def changes(self, plan: Plan) -> Changes:
        """Returns the kept tensors that it will change."""
        return Changes()

    def tune(self, block: TunedBlock, quantized: dict[str, Quantized]) -> Tuned:
        """Returns codes, scales and vectors that are no worse.

        block   runs the block with weights that gradients flow into, and knows what it should return
        """
        raise AssertionError("a tuner tunes")


class Transform(Algorithm):
    """A transform rewrites weights without changing the function that the model computes.

    `before` and `after` change the tensors of one part through `PartTensors`; `changes` has declared them. Statistics
    follow what `after` changed: exactly where channels were scaled and a second moment is all that is needed, else
    they are collected again.
    """

    kind = "transform"

    def changes(self, plan: Plan) -> Changes:
        """Returns what it will change, add and drop."""
        return Changes()

    def online(self, plan: Plan) -> dict[str, int]:
        """Returns weights whose inputs it leaves to the server to turn, with the size of the Hadamard blocks.

        Other transforms may ask before the plan is checked.
        """
        return {}

    def prepass(self, plan: Plan) -> Needs:
        """Returns the kinds of statistics that it wants of the source model before part 0; `gram` is not among them."""
        return {}

    def prepare(self, plan: Plan, seed: int, prepass: Mapping[int, Statistics]) -> Any:
        """Returns its decisions for the whole model: small, as JSON, kept in the journal. `prepass` is by part."""
        return None

    def before(self, part: PartTensors, state: Any) -> None:
        """Changes a part before anything is observed; called for every part."""
        return

    def after(self, part: PartTensors, statistics: Statistics, state: Any) -> None:
        """Changes a part that was observed."""
        return

    def forwards(self, tokens: int) -> float:
        """Returns 1 where a part is changed after it was observed, and so is observed again."""
        return float(type(self).after is not Transform.after)


@dataclass(frozen=True)
class Assignment:
    """An algorithm with the weights that it works on. None means all weights of the plan.

    key   its name, with a number where a recipe lists it more than once
    """

    algorithm: Algorithm
    weights: frozenset[str] | None = None
    key: str = ""

    @property
    def name(self) -> str:
        return self.algorithm.name

    @property
    def kind(self) -> Kind:
        return self.algorithm.kind

    def takes(self, target: Target) -> bool:
        return self.weights is None or target.name in self.weights

    def needs(self, plan: Plan) -> Needs:
        return self.algorithm.needs(self._part_of(plan))

    def check(self, plan: Plan) -> None:
        self.algorithm.check(self._part_of(plan))

    def memory(self, plan: Plan) -> int:
        return self.algorithm.memory(self._part_of(plan))

    def changes(self, plan: Plan) -> Changes:
        if isinstance(self.algorithm, Transform | Tuner):
            return self.algorithm.changes(self._part_of(plan))
        return Changes()

    def online(self, plan: Plan) -> dict[str, int]:
        return self.algorithm.online(self._part_of(plan)) if isinstance(self.algorithm, Transform) else {}

    def prepass(self, plan: Plan) -> Needs:
        return self.algorithm.prepass(self._part_of(plan)) if isinstance(self.algorithm, Transform) else {}

    def prepare(self, plan: Plan, seed: int, prepass: Mapping[int, Statistics]) -> Any:
        assert isinstance(self.algorithm, Transform)
        return self.algorithm.prepare(self._part_of(plan), seed, prepass)

    def _part_of(self, plan: Plan) -> Plan:
        if self.weights is None:
            return plan
        return replace(plan, targets={name: t for name, t in plan.targets.items() if name in self.weights})
