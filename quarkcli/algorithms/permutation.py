"""Sorts channels by their size, so that outliers share the scale of few blocks. It costs nothing when serving.

A permutation commutes with norms and their weights: nothing is folded, and a head that is the embedding stays so. The
channels of the residual stream have one order in the whole model, decided from a pass over the source; those inside an
MLP or an expert, and values inside their heads, one for each block. Queries and keys keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms._stream import by_part, check_residual, copies, held_by, streams
from quarkcli.algorithms.base import Needs, Transform
from quarkcli.errors import ConfigError
from quarkcli.family import Channels, Values
from quarkcli.plan.model import Changes, Part, Plan, Target
from quarkcli.spec import PerGroup, PerTile, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.algorithms.tensors import PartTensors
    from quarkcli.forward.statistics import Statistics

SIZES = {"mean": "mean_abs", "max": "channel_absmax"}


class Permutation(Transform):
    """Parameters.

    residual   the channels of the residual stream
    inner      the channels inside MLPs and experts, where the family file names them
    values     the values of attention inside their heads, where the family file names them
    size       what they are sorted by: the mean or the largest magnitude
    """

    name = "permutation"
    parameters: ClassVar[Mapping[str, Any]] = {"residual": True, "inner": True, "values": True, "size": "max"}

    def __init__(self, residual: bool, inner: bool, values: bool, size: str) -> None:
        for key, value in (("residual", residual), ("inner", inner), ("values", values)):
            if not isinstance(value, bool):
                raise ConfigError(f"permutation: {key} is true or false, not {value!r}", kind="E-ALGORITHM-PARAMETER")
        if size not in SIZES:
            raise ConfigError(f"permutation: size is mean or max, not {size!r}", kind="E-ALGORITHM-PARAMETER")
        if not (residual or inner or values):
            raise ConfigError(
                "permutation has nothing to do: residual, inner and values are all off",
                hint="write residual: true, or leave permutation out",
                kind="E-ALGORITHM-IDLE",
            )
        self.residual, self.inner, self.values, self.size = residual, inner, values, size

    # -- the plan -------------------------------------------------------------------------------------------------

    def check(self, plan: Plan) -> None:
        if not any(_grouped(target.weight) or _grouped(target.input) for target in plan.quantized()):
            raise ConfigError(
                "permutation changes nothing: no weight and no layer input has a scale for a group of channels",
                where="algorithm",
                hint="leave permutation out, or use a scheme with groups, such as nvfp4 or int4_wo_128",
                kind="E-ALGORITHM-IDLE",
            )
        if self.residual:
            check_residual(plan)
        elif not any(self._inside(plan)):
            what = "channels" if self.inner and self.values else "channels of MLPs" if self.inner else "values of heads"
            keys = [key for key, on in (("'channels'", self.inner), ("'heads'", self.values)) if on]
            off = [f"{key}: true" for key in ("inner", "values", "residual") if not getattr(self, key)]
            raise ConfigError(
                f"permutation has nothing to do: the model family '{plan.family}' names no {what} that can change "
                "places",
                hint=f"name them with {' and '.join(keys)} in the family file, or write {' or '.join(off)}",
                kind="E-ALGORITHM-FAMILY",
            )

    def needs(self, plan: Plan) -> Needs:
        targets = plan.targets
        readers = (found.readers[0] if isinstance(found, Channels) else found.reader for _, found in self._inside(plan))
        return {site: {"samples"} for name in readers if (site := targets[name].site) is not None}

    def prepass(self, plan: Plan) -> Needs:
        if not self.residual:
            return {}
        return {site: {SIZES[self.size]} for sites in _stream_sites(plan).values() for site in sites}

    def changes(self, plan: Plan) -> Changes:
        modules: set[str] = set()
        tensors: set[str] = set()
        for _, residual in streams(plan) if self.residual else ():
            modules |= {*residual.columns, *residual.rows}
            tensors |= set(residual.vectors)
        for _, found in self._inside(plan):
            if isinstance(found, Channels):
                modules |= {*found.writers, *found.readers}
            else:
                modules |= {found.writer, found.reader}
        return Changes(frozenset(tensors | held_by(plan, modules)))

    def memory(self, plan: Plan) -> int:
        return copies(plan, self.changes(plan))

    def _inside(self, plan: Plan) -> Iterator[tuple[Part, Channels | Values]]:
        """Yields the channels inside blocks that are to change places."""
        for part, weights in by_part(plan):
            if part.block is None:
                continue
            for channels in plan.rewrites.channels(part.name, weights) if self.inner else ():
                yield part, channels
            values = plan.rewrites.values(part.name, weights) if self.values else None
            if values is not None:
                yield part, values

    # -- the work -------------------------------------------------------------------------------------------------

    def prepare(self, plan: Plan, seed: int, prepass: Mapping[int, Statistics]) -> Any:
        """Returns the order of the residual stream's channels, the largest first."""
        if not self.residual:
            return None
        total: Tensor | None = None
        for part, sites in _stream_sites(plan).items():
            for site in sites:
                seen = prepass[part].mean_abs(site) if self.size == "mean" else prepass[part].channel_amax(site)
                if seen is not None:
                    own = (seen / seen.mean()).double().cpu()
                    total = own if total is None else total + own
        assert total is not None, "no calibration token reached the model"
        return {"order": total.sort(descending=True, stable=True).indices.tolist()}

    def before(self, part: PartTensors, state: Any) -> None:
        import torch

        if self.residual:
            part.reorder(torch.tensor(state["order"], device=part.device))

    def after(self, part: PartTensors, statistics: Statistics, state: Any) -> None:
        unseen = []
        for channels in part.channels if self.inner else ():
            reader = part.targets[channels.readers[0]]
            seen = self._sizes(statistics, reader)
            if seen is not None:
                part.reorder_channels(channels, seen.sort(descending=True, stable=True).indices)
            else:
                unseen.append(reader.name)
        values = part.values if self.values else None
        part.note(inner=bool(part.channels) and self.inner, values=values is not None, unseen=unseen)
        seen = self._sizes(statistics, part.targets[values.reader]) if values is not None else None
        if values is not None and seen is not None:
            sizes = seen.view(values.groups, -1, values.head).mean(1)
            order = sizes.sort(dim=1, descending=True, stable=True).indices

            def turn(x: Tensor) -> Tensor:
                return x.gather(-1, order.expand_as(x))

            part.turn_values(values, turn)

    def _sizes(self, statistics: Statistics, reader: Target) -> Tensor | None:
        """Returns the size of every channel of what a weight reads; None where no token reached it."""
        if reader.site is None:
            return None
        sample = statistics.samples(reader.site, reader.expert[1] if reader.expert else None)
        if sample is None:
            return None
        return sample.mean(sample.rows.abs()) if self.size == "mean" else sample.rows.abs().amax(0)


def _stream_sites(plan: Plan) -> dict[int, list[str]]:
    """Returns the activations of each block that are the residual stream behind a norm, by part."""
    found: dict[int, list[str]] = {}
    for part, residual in streams(plan):
        if part.block is not None:
            sites = (plan.targets[name].site for name in residual.columns)
            found[part.index] = list(dict.fromkeys(site for site in sites if site is not None))
    return found


ALGORITHM = Permutation


def _grouped(spec: TensorSpec | None) -> bool:
    """True when some scale is for a few of the channels that a weight reads, so that their order matters."""
    stages = spec.stages if spec is not None else ()
    return any(isinstance(stage.granularity, PerGroup | PerTile) for stage in stages)
