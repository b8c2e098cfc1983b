"""The candidates of a search, and the groups of weights that get one of them each. Torch-free.

A candidate is a scheme, resolved against the model as a run with it would be, or no quantization at all. Weights that
servers fuse are one group, and so are all experts of a layer; a model that is meant for no server has none of these
ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quarkcli.disk.source import DTYPES
from quarkcli.disk.writer import tensor_bytes
from quarkcli.errors import UsageError
from quarkcli.job.options import Prepared
from quarkcli.plan.fused import Servers, matrix
from quarkcli.plan.model import Plan, Target, is_quantized

KEEP = "bf16"  # the candidate that leaves a weight as the source has it


@dataclass(frozen=True)
class Candidate:
    """One of the schemes that a search chooses among.

    prepared   a run with this scheme alone; None: weights stay as they are
    """

    name: str
    prepared: Prepared | None

    def target(self, name: str, kept: Target) -> Target:
        """Returns a weight as this candidate has it. `kept`: the weight in any plan."""
        return self.prepared.plan.targets[name] if self.prepared is not None else kept


@dataclass(frozen=True)
class Group:
    """Weights that get the same candidate.

    name   of its first weight, or what is common to them
    part   index of their part
    """

    name: str
    part: int
    targets: tuple[Target, ...]

    @property
    def weights(self) -> int:
        """Returns the number of values."""
        return sum(target.numel for target in self.targets)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(target.name for target in self.targets)


def groups(candidates: Iterable[Candidate], servers: Servers) -> tuple[list[Group], list[str]]:
    """Returns the groups that some candidate quantizes, in plan order, and weights that no search can judge.

    Those lie where no token passes in a forward of the text model.
    """
    plans = [candidate.prepared.plan for candidate in candidates if candidate.prepared is not None]
    wanted = {target.name for plan in plans for target in plan.quantized()}
    parts = {part.index: part for part in plans[0].parts}
    found: dict[tuple[int, str], list[Target]] = {}
    unjudged = []
    for target in plans[0].targets.values():
        if target.name not in wanted:
            continue
        if target.is_embedding or parts[target.part].kind not in {"block", "tail"}:
            unjudged.append(target.name)
            continue
        found.setdefault((target.part, _tie(target, servers)), []).append(target)
    return [Group(_named(targets), part, tuple(targets)) for (part, _), targets in found.items()], unjudged


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
    """Returns the bits that a group's weights take, scales included: the figures of the plan."""
    total = 0.0
    for target in group.targets:
        own = candidate.target(target.name, target)
        each = own.weight.bits_per_value(*own.shape) if is_quantized(own) else 8 * DTYPES[own.dtype][0]
        total += each * own.numel
    return round(total)


def stored(group: Group, candidate: Candidate) -> int:
    """Returns the bytes of the tensors that a group becomes in a checkpoint."""
    total = 0
    for target in group.targets:
        own = candidate.target(target.name, target)
        if candidate.prepared is not None and is_quantized(own):
            total += sum(tensor_bytes(info.dtype, info.shape) for info in candidate.prepared.dialect.infos(own))
        else:
            total += tensor_bytes(own.dtype, own.shape)
    return total


def part_of(plan: Plan, names: Iterable[str]) -> Mapping[str, Target]:
    """Returns the targets of a plan with these names."""
    return {name: plan.targets[name] for name in names}


def check(names: Sequence[str]) -> None:
    """Raises UsageError unless there is a choice among these schemes."""
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise UsageError(f"'{twice[0]}' is named twice", where="--schemes")
    if len(names) < 2 or set(names) == {KEEP}:
        raise UsageError(
            f"a search needs two schemes or more to choose among, not {len(names)}",
            where="--schemes",
            hint=f"--schemes nvfp4,fp8; '{KEEP}' stands for leaving a weight as it is",
        )
