"""Does what transforms that scale channels share: it finds the channels, and notes the decision for each.

The output of a norm or linear is divided by factors and the columns of all weights that read it are multiplied, so that
the function stays. Which channels those are comes from the family file (`Plan.rewrites`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms._stream import by_part
from quarkcli.algorithms.base import SAMPLED_ROWS, Needs, Transform
from quarkcli.errors import ConfigError, did_you_mean, near_misses
from quarkcli.family import Pair, expert_bias
from quarkcli.plan.model import Changes, Part, Plan, Target
from quarkcli.recipe.match import starred

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.algorithms._channels import Channels
    from quarkcli.algorithms.tensors import PartTensors
    from quarkcli.forward.statistics import Statistics

MEANS = frozenset({"alpha", "ratio", "share"})
Rows = list[str | dict[str, Any]] | None


class ChannelScaling(Transform):
    """A transform that chooses a factor for every channel of a pair.

    kinds        statistics that it needs of what the readers read
    roles        roles of the linears that it works on beside norms when a recipe names no sources; None: all
    norms_first  first what norms write, as long as the errors of all rows count alike; else first what linears write,
                 so that the largest weights of columns are final
    rows         `scaling_layers` of a recipe: names of sources, or AMD Quark's rows with `prev_op`
    """

    kinds: ClassVar[frozenset[str]]
    roles: ClassVar[frozenset[str] | None] = None
    norms_first: ClassVar[bool] = False

    def __init__(self, scaling_layers: Rows) -> None:
        if scaling_layers is not None and (not isinstance(scaling_layers, list) or not scaling_layers):
            raise ConfigError(
                f"{self.name} scaling_layers must be a list of names", where="algorithm", kind="E-ALGORITHM-PARAMETER"
            )
        self.rows = [_source(row, self.name) for row in scaling_layers] if scaling_layers else None
        rows = [row for row in scaling_layers or () if isinstance(row, dict)]
        self.readers = [str(reader) for row in rows for reader in row.get("layers") or ()]

    # -- declarations ---------------------------------------------------------------------------------------------

    def needs(self, plan: Plan) -> Needs:
        found: Needs = {}
        for part, pair in self.pairs(plan):
            for reader in quantized(plan.targets, pair):
                if reader.site is not None:
                    found.setdefault(reader.site, set()).update(self.kinds_of(plan, part, pair))
        return found

    def kinds_of(self, plan: Plan, part: Part, pair: Pair) -> frozenset[str]:
        """Returns the kinds of statistics that it needs for one pair."""
        return self.kinds

    def check(self, plan: Plan) -> None:
        known = [(part, pair) for part, pair in pairs_of(plan) if quantized(plan.targets, pair)]
        sources = list(dict.fromkeys(below(part, pair.source) for part, pair in known))
        if not known:
            raise ConfigError(
                f"{self.name} has nothing to scale: the model family '{plan.family}' names no channels that a "
                "quantized weight reads",
                where="algorithm",
                hint=_to_add(plan),
                kind="E-ALGORITHM-IDLE",
            )
        for row in self.rows or ():
            if not any(fits(row, source) for source in sources):
                raise ConfigError(
                    f"{self.name} scaling_layers: the model family '{plan.family}' has no channels to scale in '{row}'",
                    where="algorithm",
                    hint=did_you_mean(row, sources, f"use one of {', '.join(sources)}"),
                    kind="E-ALGORITHM-FAMILY",
                )

        for reader in self.readers:
            if not any(f".{name}".endswith(f".{reader}") for name in plan.targets):
                count = reader.count(".") + 1
                close = near_misses(reader, dict.fromkeys(".".join(name.split(".")[-count:]) for name in plan.targets))
                raise ConfigError(
                    f"{self.name} scaling_layers: no block has a layer '{reader}'",
                    where="algorithm",
                    hint=f"did you mean {', '.join(map(repr, close))}?" if close else "see 'quark plan --modules'",
                    kind="E-ALGORITHM-FAMILY",
                )

    def changes(self, plan: Plan) -> Changes:
        names: set[str] = set()
        for part, pair in self.pairs(plan):
            names |= _tensors(plan.targets, pair, frozenset(part.tensors))
        return Changes(frozenset(names))

    def memory(self, plan: Plan) -> int:
        """Returns the bytes of a block's sampled rows, and of the changed tensors in float32."""
        rows: dict[int, int] = {}
        for name in self.needs(plan):
            site = plan.sites[name]
            rows[site.part] = rows.get(site.part, 0) + 4 * SAMPLED_ROWS * plan.targets[site.members[0]].shape[1]
        changed = self.changes(plan).tensors
        for target in plan.targets.values():
            if target.view.tensor in changed:
                rows[target.part] = rows.get(target.part, 0) + 4 * target.numel
        return max(rows.values(), default=0)

    def pairs(self, plan: Plan) -> Iterator[tuple[Part, Pair]]:
        """Yields the pairs of all blocks that it works on: those that a quantized weight reads."""
        for part, pair in pairs_of(plan):
            if self.takes(part, pair, plan.targets):
                yield part, pair

    def takes(self, part: Part, pair: Pair, targets: Mapping[str, Target]) -> bool:
        if not quantized(targets, pair):
            return False
        if self.rows is None:
            return pair.norm or self.roles is None or targets[pair.source].role in self.roles
        return any(fits(row, below(part, pair.source)) for row in self.rows)

    # -- work -----------------------------------------------------------------------------------------------------

    def after(self, part: PartTensors, statistics: Statistics, state: Any) -> None:
        from quarkcli.algorithms._channels import Channels

        notes: dict[str, list[dict[str, Any]]] = {}
        for pair in sorted(part.pairs, key=lambda pair: pair.norm is not self.norms_first):
            if not self.takes(part.part, pair, part.targets):
                continue
            factors, facts = self.factors(Channels(part, pair, statistics))
            notes.setdefault(starred(below(part.part, pair.source)), []).append({"scaled": factors is not None} | facts)
            if factors is not None:
                part.scale(pair, factors.reciprocal())
        for source, own in notes.items():
            part.note(source=source, **together(own))

    def factors(self, channels: Channels) -> tuple[Tensor | None, dict[str, Any]]:
        """Returns what the readers' columns are multiplied by, float32 [channels], and facts for the report.

        None for the factors: the pair stays as it is.
        """
        raise AssertionError("a transform that scales channels must choose factors")


def _to_add(plan: Plan) -> str:
    """Returns what the family file lacks, in its words, by what the weights of a block read together."""
    blocks = {part.index: part for part in plan.parts if part.block is not None}
    sites = [site for site in plan.sites.values() if site.kind == "linear" and site.part in blocks]
    site = max(sites, key=lambda site: len(site.members), default=None)
    if site is None:
        return "leave the algorithm out, or add 'scaling' rows (source, readers) to the family file"
    readers = ", ".join(below(blocks[site.part], member) for member in site.members)
    return (
        f"leave the algorithm out, or add 'scaling: [{{source: <norm before them>, readers: [{readers}]}}]' to the "
        "family file, for every norm or linear layer"
    )


def pairs_of(plan: Plan) -> Iterator[tuple[Part, Pair]]:
    """Yields the pairs of every block, from the names alone."""
    for part, weights in by_part(plan):
        if part.block is not None:
            vectors = set(part.tensors) - {target.view.tensor for target in weights.values()}
            yield from ((part, pair) for pair in plan.rewrites.pairs(part.name, weights, vectors))


def quantized(targets: Mapping[str, Target], pair: Pair) -> list[Target]:
    """Returns the readers of a pair that are quantized."""
    return [target for target in map(targets.__getitem__, pair.readers) if target.weight is not None]


def below(part: Part, name: str) -> str:
    """Returns a module's name below its block."""
    return name.removeprefix(f"{part.name}.")


def fits(row: str, source: str) -> bool:
    """True when a name or pattern means a source: `up_proj` and `mlp.up_proj` both mean `mlp.up_proj`."""
    return fnmatchcase(source, row) or fnmatchcase(source, f"*.{row}")


def together(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one note for those of many experts: sums of costs, means of other numbers, counts of the rest."""
    if len(notes) == 1:
        return notes[0]
    found: dict[str, Any] = {"pairs": len(notes)}
    for key in dict.fromkeys(key for note in notes for key in note):
        values = [note[key] for note in notes if key in note]
        if isinstance(values[0], bool):
            found[key] = sum(values)
        elif isinstance(values[0], str):
            found[key] = dict(Counter(values))
        else:
            found[key] = sum(values) / (len(values) if key in MEANS else 1)
    return found


def _source(row: Any, name: str) -> str:
    source = row.get("prev_op") if isinstance(row, dict) else row
    if not isinstance(source, str) or not source:
        raise ConfigError(
            f"{name} scaling_layers has {row!r}, which names no source",
            where="algorithm",
            hint="use the name of a norm or linear layer, or a row with 'prev_op'",
            kind="E-ALGORITHM-PARAMETER",
        )
    return source


def _tensors(targets: Mapping[str, Target], pair: Pair, present: frozenset[str]) -> set[str]:
    """Returns the file tensors that scaling a pair changes."""
    found = {targets[name].view.tensor for name in pair.weights}
    if pair.norm:
        found |= {f"{pair.source}.weight", f"{pair.source}.bias"} & present
    else:
        source = targets[pair.source]
        found |= {source.bias or "", expert_bias(source) or ""} & present
    return found
