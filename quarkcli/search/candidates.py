"""Lists the candidates of a search, and the groups of weights that get one of them each. Torch-free.

A candidate is a scheme, resolved against the model as a run with it would be, or no quantization at all. Weights that
servers fuse are one group, and so are all experts of a layer; a model that is meant for no server has none of these
ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quarkcli.disk.headers import DTYPES
from quarkcli.disk.writer import tensor_bytes
from quarkcli.errors import ConfigError, UsageError
from quarkcli.job import asked
from quarkcli.job.options import Prepared
from quarkcli.plan.fused import Servers, matrix
from quarkcli.plan.model import QuantizedTarget, Target, is_quantized
from quarkcli.recipe.auto_quantize import Rule
from quarkcli.recipe.entries import SETTING
from quarkcli.recipe.match import matches

KEEP = "bf16"  # the candidate that leaves a weight as the source has it


@dataclass(frozen=True)
class Candidate:
    """One of the schemes that a search chooses among.

    prepared   a run with this scheme alone; None: weights stay as they are
    """

    name: str
    prepared: Prepared | None

    def quantized(self, name: str) -> QuantizedTarget | None:
        """Returns a weight as this candidate quantizes it; None where it stays as it is."""
        target = self.prepared.plan.targets[name] if self.prepared is not None else None
        return target if target is not None and is_quantized(target) else None


@dataclass(frozen=True)
class Group:
    """Weights that get the same candidate.

    name     of its first weight, or what is common to them
    part     index of their part
    allowed  names of the candidates that it may get
    share    of its weights that count in the budget
    """

    name: str
    part: int
    targets: tuple[Target, ...]
    allowed: tuple[str, ...]
    share: float = 1.0

    @property
    def weights(self) -> int:
        """Returns the number of values."""
        return sum(target.numel for target in self.targets)

    @property
    def counted(self) -> float:
        """Returns the number of values that count in the budget."""
        return self.weights * self.share

    @property
    def names(self) -> frozenset[str]:
        return frozenset(target.name for target in self.targets)


@dataclass(frozen=True)
class Space:
    """The candidates of a search and the rules for them.

    rules         the first that matches a weight's module says which candidates it may get
    uncounted     patterns on modules that do not count in the budget
    expert_share  share of routed experts that counts
    notes         what a file asks for without effect here
    """

    candidates: tuple[Candidate, ...]
    rules: Sequence[Rule]
    uncounted: Sequence[str] = ()
    expert_share: float = 1.0
    notes: Sequence[str] = ()

    @property
    def runs(self) -> list[Prepared]:
        return [candidate.prepared for candidate in self.candidates if candidate.prepared is not None]

    @property
    def base(self) -> Prepared:
        """Returns a run to take the model and the data from."""
        return self.runs[0]

    def named(self, name: str) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.name == name)


def groups(space: Space, servers: Servers) -> tuple[list[Group], list[str]]:
    """Returns the groups that some candidate quantizes, in plan order, and weights that no search can judge.

    Those lie where no token passes in a forward of the text model. Raises ConfigError for weights that servers fuse
    and a rule tells apart.
    """
    plans = [run.plan for run in space.runs]
    wanted = {target.name for plan in plans for target in plan.quantized()}
    kinds = {part.index: part.kind for part in plans[0].parts}
    found: dict[tuple[int, str], list[Target]] = {}
    unjudged = []
    for target in plans[0].targets.values():
        if target.name not in wanted:
            continue
        if target.is_embedding or kinds[target.part] not in {"block", "tail"}:
            unjudged.append(target.name)
            continue
        found.setdefault((target.part, _tie(target, servers)), []).append(target)
    return [_group(space, part, tuple(targets)) for (part, _), targets in found.items()], unjudged


def _group(space: Space, part: int, targets: tuple[Target, ...]) -> Group:
    rules = {_rule(space, target) for target in targets}
    if len(rules) > 1:
        raise ConfigError(
            "servers multiply these weights together, but the search gives them different formats to choose among",
            where=", ".join(target.name for target in targets[:4]),
            hint="name all of them in one search space, or none",
            kind="E-SEARCH",
        )
    rule = space.rules[rules.pop()]
    allowed = (*rule.formats, *((KEEP,) if rule.keep else ()))
    share = space.expert_share if targets[0].expert is not None else 1.0
    if any(matches(pattern, [target.name for target in targets]) for pattern in space.uncounted):
        share = 0.0
    return Group(_named(targets), part, targets, allowed, share)


def _rule(space: Space, target: Target) -> int:
    """Returns the index of the rule for a weight. The last rule is for all."""
    names = (target.name, *target.aliases)
    return next(i for i, rule in enumerate(space.rules) if any(matches(pattern, names) for pattern in rule.patterns))


def _tie(target: Target, servers: Servers) -> str:
    if servers == "none":
        return target.name
    return target.expert[0] if target.expert is not None else matrix(target)


def _named(targets: Sequence[Target]) -> str:
    """Returns a name for a group: `layers.0.self_attn.q_proj+k_proj+v_proj`, or the place of its experts."""
    first = targets[0]
    if len(targets) == 1:
        return first.name
    if first.expert is not None:
        return first.expert[0]
    stem = first.name.rpartition(".")[0]
    if all(target.name.rpartition(".")[0] == stem for target in targets):
        return f"{stem}.{'+'.join(target.name.rpartition('.')[2] for target in targets)}"
    return first.name


# --- sizes ------------------------------------------------------------------------------------------------------------


def bits(group: Group, candidate: Candidate) -> int:
    """Returns the bits that a group counts for in the budget, scales included: the figures of the plan."""
    total = 0.0
    for target in group.targets:
        own = candidate.quantized(target.name)
        each = own.weight.bits_per_value(*own.shape) if own is not None else 8 * DTYPES[target.dtype][0]
        total += each * target.numel
    return round(total * group.share)


def stored(group: Group, candidate: Candidate) -> int:
    """Returns the bytes of the tensors that a group becomes in a checkpoint."""
    total = 0
    for target in group.targets:
        own = candidate.quantized(target.name)
        if candidate.prepared is not None and own is not None:
            total += sum(tensor_bytes(info.dtype, info.shape) for info in candidate.prepared.dialect.infos(own))
        else:
            total += tensor_bytes(target.dtype, target.shape)
    return total


def check_settings(settings: Sequence[str]) -> None:
    """Raises UsageError for a value of `--set` that is not one of an algorithm: no recipe of quark's is read."""
    of_recipe, _ = asked.of_recipe_and_steps(settings)
    if of_recipe:
        what = "a search has no recipe to change, and --set changes only values of its algorithms"
        hint = "use the flags, such as --calib-samples 64"
        raise UsageError(what, where=f"{SETTING}{of_recipe[0]}", hint=hint, kind="E-SEARCH-FLAGS")


def check(names: Sequence[str]) -> None:
    """Raises UsageError unless there is a choice among these schemes."""
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise UsageError(f"'{twice[0]}' is named twice", where="--schemes", kind="E-SEARCH-FLAGS")
    if len(names) < 2 or set(names) == {KEEP}:
        raise UsageError(
            f"a search needs two schemes or more to choose among, not {len(names)}",
            where="--schemes",
            hint=f"use --schemes nvfp4,fp8, for example; '{KEEP}' leaves a weight as it is",
            kind="E-SEARCH-FLAGS",
        )
