"""Does what gptq, gptaq and qronos share: they round a weight column by column.

Scales are fixed first, then codes are found column by column, the columns not yet rounded making up for the error;
then both are refined. Damping, the strength of what a member aims for, and the fallback to nearest are chosen on
calibration tokens that are held out of the second moment (one row in eight), since a solver always wins on the tokens
it was fitted to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms import _parameters
from quarkcli.algorithms.base import Effort, Moment, Needs, Outcome, Problem, Solver
from quarkcli.algorithms.rtn import RoundToNearest
from quarkcli.errors import ConfigError
from quarkcli.numerics.rows import cpu_rows
from quarkcli.numerics.signs import may_be_negative
from quarkcli.plan.model import Plan, QuantizedTarget
from quarkcli.spec import PerGroup, TensorSpec

if TYPE_CHECKING:
    from quarkcli.numerics.quantize import QParams, Quantized
    from quarkcli.numerics.settle import Aim, Choices, Settled, Steps
    from quarkcli.numerics.solve import Factor

FEW_BITS = 4  # weights of as many bits or less are refined unless something else is asked for
SWEEPS = 2
MOST_SWEEPS = 10
HELD_OUT = 8
DAMP = 0.01
TOGETHER = 256 * 2**20  # bytes that problems which are solved together may take, unless one alone takes more
TOKENS = 2048  # that are folded into a moment at once, see `forward.moments.CHUNK`
ALIVE = 4  # sums of lanes of a moment at most, see `forward.lanes.Tree`
# What a forecast of time counts on: factors for a damping that is chosen, scales that are tried for a group, and
# activations of a block after the first.
TRIED, SEARCHED, STAGES = 3, 32, 3
DAMP_FP4 = 0.05  # where nothing can be held out, and 4-bit floats meet quantized inputs


class ColumnSolver(Solver):
    """Rounds column by column.

    damp             ridge as a share of the mean diagonal, or auto: chosen on held-out tokens
    act_order        true: columns of the largest activations first; group: sorted inside groups; false: as they stand
    scale_search     scales of groups are searched by the output they lose, before the loop
    refine           sweeps of scale refit and coordinate descent after the loop; auto: 2 for 4 bits and less; or off
    holdout          8: one calibration row in eight is held out; 0: none, and nothing is chosen
    signed           scales of symmetric integers may be negative: on, off, or auto
    balance          a token that occurs n times in calibration counts n^-balance in the second moments, from 0 to 1; 0:
                     all count alike
    true_sequential  the block runs again for every activation in it, see `Solver.staged`
    """

    parameters: ClassVar[Mapping[str, Any]] = {
        "damp": "auto", "act_order": True, "scale_search": True, "refine": "auto", "holdout": HELD_OUT, "signed": "off",
        "balance": 0, "true_sequential": False,
    }  # fmt: skip
    strengths: ClassVar[tuple[float, ...]] = (0.0,)

    def __init__(
        self,
        damp: float | str,
        act_order: bool | str,
        scale_search: bool,
        refine: int | str,
        holdout: int,
        signed: Any,
        balance: float,
        true_sequential: bool,
    ) -> None:
        name = self.name
        self.damp = _parameters.auto_share(f"{name} damp", damp)
        self.act_order = _parameters.one_of(f"{name} act_order", act_order, (True, False, "group"))
        self.scale_search = _parameters.one_of(f"{name} scale_search", scale_search, (True, False))
        self.refine = _sweeps(f"{name} refine", refine)
        self.holdout = _parameters.one_of(f"{name} holdout", holdout, (0, HELD_OUT))
        self.balance = _parameters.part(f"{name} balance", balance)
        self.staged = _parameters.one_of(f"{name} true_sequential", true_sequential, (True, False))
        self.signed = _parameters.one_of(f"{name} signed", _parameters.on_off(signed), ("on", "off", "auto"))

    def needs(self, plan: Plan) -> Needs:
        kinds = {"gram", "gram_val"} if self.holdout else {"gram"}
        return {target.site: set(kinds) for target in plan.quantized() if target.site is not None}

    def check(self, plan: Plan) -> None:
        """Refuses negative scales where a server reads scales as unsigned, and settings that change nothing."""
        if self.act_order == "group" and not any(map(_in_groups, plan.quantized())):
            what = f"{self.name} act_order: group changes nothing: no weight has more than one group of columns"
            hint = "write act_order: true, or use a scheme with groups, such as int4_wo_128"
            raise ConfigError(what, where="algorithm", hint=hint, kind="E-ALGORITHM-IDLE")
        if self.signed != "on":
            return
        self._check_signs(plan)
        for target in plan.quantized():
            if _integer(target) and target.input is not None:
                raise ConfigError(
                    f"{self.name} signed: on gives {target.name} negative scales, and integer kernels read scales "
                    "as unsigned",
                    where="algorithm",
                    hint="write signed: auto, which leaves such weights out, or use a scheme with inputs in 16 bits",
                    kind="E-ALGORITHM-FORMAT",
                )

    def _check_signs(self, plan: Plan) -> None:
        """Refuses `signed: on` where it would change nothing."""
        if not self.scale_search:
            why, hint = "scale_search is off, and only the search tries them", "write scale_search: true"
        elif not any(may_be_negative(target.weight) for target in plan.quantized()):
            why = "only scales of symmetric integers may be negative, and no weight has such"
            hint = "leave signed out, or use a scheme such as int4_wo_128"
        else:
            return
        what = f"{self.name} signed: on changes nothing: {why}"
        raise ConfigError(what, where="algorithm", hint=hint, kind="E-ALGORITHM-IDLE")

    def memory(self, plan: Plan) -> int:
        """Returns the bytes of what it sees of a block while that runs, or of one problem, whichever is more."""
        widths = _widths(plan)
        observed = sum(map(self._observed, widths)) + 4 * TOKENS * max(widths, default=0)
        return max([observed, *(min(n, self.at_once(shape)) * self._solved(shape) for shape, n in _problems(plan))])

    def _observed(self, width: int) -> int:
        """Returns the bytes of the moments of an activation while lanes come in; of each, half is kept."""
        return 2 * ALIVE * 4 * (width * width * 5 // 8)

    def _solved(self, shape: tuple[int, int]) -> int:
        """Returns the bytes that a problem takes: both moments, and its rows in a few forms.

        A second factor is there while dampings are tried, and none when the last rows are refined.
        """
        rows, width = shape
        at_once = min(rows, cpu_rows(width))
        square, some = width * width, at_once * width
        return 4 * max(4 * square + 5 * some, (2 if rows == at_once else 3) * square + 8 * some)

    def effort(self, shape: tuple[int, int], spec: TensorSpec) -> Effort:
        """Returns the work of usually three factors, of a loop over columns, and of two products for each sweep."""
        rows, width = shape
        attempts = TRIED if self.damp is None and self.holdout else 1
        products = rows * width**2 * (2 + 4 * self._sweeps(spec))
        tried = 1 + (SEARCHED if self.scale_search else 0)
        return Effort(2 / 3 * width**3 * attempts, products, rows * width * tried)

    def forwards(self, tokens: int) -> float:
        return STAGES * len(self.streams) if self.staged else 0.0

    def aiming(self, problem: Problem) -> Callable[[Factor, float], Aim]:
        """Returns what the loop steers for, of a factor and a strength; the weights unless a member says otherwise."""
        from quarkcli.numerics.settle import Aim

        return lambda factor, strength: Aim()

    def solve(self, problem: Problem) -> list[Quantized] | None:
        return self.solve_many([problem])[0]

    def solve_many(self, problems: Sequence[Problem]) -> list[list[Quantized] | None]:
        from quarkcli.numerics.settle import together

        found = together([self._steps(problem) for problem in problems])
        return [self._chosen(problem, settled) for problem, settled in zip(problems, found, strict=True)]

    def at_once(self, shape: tuple[int, int]) -> int:
        return max(1, TOGETHER // self._solved(shape))

    def _chosen(self, problem: Problem, found: Settled | None) -> list[Quantized] | None:
        moment = problem.moment
        assert moment is not None
        if found is not None:
            problem.report(_outcome(self.name, found))
        elif not self._dead(moment):
            return None
        return found.quantized if found is not None else RoundToNearest().solve(problem)

    def _dead(self, moment: Moment) -> bool:
        """Returns whether no input ever moved, so that there is nothing to solve."""
        from quarkcli.numerics.solve import dead_inputs

        return bool(dead_inputs(moment.gram).all())

    def _steps(self, problem: Problem) -> Steps[Settled | None]:
        """Takes the steps of one problem's solution, see `settle.steps`."""
        from quarkcli.numerics.settle import Objective, steps
        from quarkcli.numerics.task import Task

        moment = problem.moment
        assert moment is not None
        if self._dead(moment):
            return None
        held = Objective(moment.gram_val, moment.cross_val) if moment.gram_val is not None else None
        moment.cross_val = None  # the objective needs it for a few rows only
        task = Task(problem.weights, self._scales(problem), problem.spec)
        choices = self._choices(problem, held is not None)
        found = yield from steps(task, moment.gram, choices, self.aiming(problem), held)
        return found

    def _scales(self, problem: Problem) -> list[QParams]:
        from quarkcli.numerics.fit import column_importance, fitted
        from quarkcli.numerics.quantize import make_qparams

        assert problem.moment is not None
        pairs = zip(problem.weights, problem.amax, strict=True)
        if not self.scale_search:
            return [make_qparams(weight, problem.spec, amax=amax) for weight, amax in pairs]
        importance = column_importance(problem.moment.gram)
        return [fitted(w, problem.spec, amax, importance, signed=self._signs(problem)) for w, amax in pairs]

    def _signs(self, problem: Problem) -> bool:
        """Returns whether scales of a problem may be negative."""
        if self.signed == "off":
            return False
        return all(target.input is None for target in problem.targets)

    def _sweeps(self, spec: TensorSpec) -> int:
        if self.refine is not None:
            return self.refine
        return SWEEPS if spec.codes.format.bits <= FEW_BITS else 0

    def _choices(self, problem: Problem, held: bool) -> Choices:
        from quarkcli.numerics.settle import DAMPS, Choices

        sweeps = self._sweeps(problem.spec)
        damps: tuple[float, ...] = (self.damp,) if self.damp is not None else DAMPS
        if self.damp is None and not held:
            fp4 = problem.spec.codes.element == "fp4_e2m1" and any(t.input is not None for t in problem.targets)
            damps = (DAMP_FP4 if fp4 else DAMP,)
        assert problem.moment is not None
        return Choices(damps, self.strengths, sweeps, self.act_order, problem.moment.tokens)


def _widths(plan: Plan) -> list[int]:
    """Returns the widths of the activations of the block that has the widest; moments of experts are made alone."""
    found: dict[int, list[int]] = {}
    for site in plan.sites.values():
        # A step that works on some weights alone has a plan of these.
        members = [plan.targets[name] for name in site.members if name in plan.targets]
        if site.kind == "linear" and members and isinstance(members[0], QuantizedTarget):
            found.setdefault(site.part, []).append(members[0].shape[1])
    return max(found.values(), key=lambda widths: sum(width * width for width in widths), default=[])


def _problems(plan: Plan) -> Iterable[tuple[tuple[int, int], int]]:
    """Yields rows and width of every problem, and how many experts of a layer have such a one."""
    rows: dict[tuple[str, int | None], tuple[int, int]] = {}
    for target in plan.quantized():
        key = target.site or target.name, target.expert[1] if target.expert is not None else None
        rows[key] = rows.get(key, (0, 0))[0] + target.shape[0], target.shape[1]
    counts = Counter(site for site, _ in rows)
    return {(shape, counts[site]) for (site, _), shape in rows.items()}


def _outcome(name: str, found: Settled) -> Outcome:
    return Outcome(
        name, found.before, found.after, found.held_before, found.held_after, found.damp, found.attempts,
        found.strength, found.sweeps, found.nearest,
    )  # fmt: skip


def _integer(target: QuantizedTarget) -> bool:
    from quarkcli.spec import ELEMENTS

    return ELEMENTS[target.weight.element].kind == "integer" and target.weight.symmetric


def _in_groups(target: QuantizedTarget) -> bool:
    """Returns whether there are groups of columns to be sorted inside; tiles are none."""
    granularity = target.weight.granularity
    return isinstance(granularity, PerGroup) and granularity.size < target.shape[1]


def _sweeps(name: str, value: Any) -> int | None:
    if value == _parameters.AUTO:
        return None
    if value == "off" or value is False:  # YAML reads off as false
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_SWEEPS:
        raise ConfigError(
            f"{name} must be auto, off or a number of sweeps up to {MOST_SWEEPS}, not {value!r}",
            where="algorithm",
            kind="E-ALGORITHM-PARAMETER",
        )
    return value
