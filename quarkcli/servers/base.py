"""The contract of servers: what each refuses of a checkpoint, planned or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from quarkcli import dialects
from quarkcli.dialects.base import Writer
from quarkcli.plan.model import Plan, QuantizedTarget
from quarkcli.servers._kernels import Kernel


@dataclass(frozen=True)
class Written:
    """A checkpoint as a server sees it.

    dialect  its name
    config   its `quantization_config`
    plan     what its weights, inputs and caches are
    renamed  a tensor whose name is not the one that the model was published with, empty: there is none
    """

    dialect: str
    config: Mapping[str, Any]
    plan: Plan
    renamed: str = ""

    @property
    def writer(self) -> Writer | None:
        return next((member for member in dialects.writers() if member.name == self.dialect), None)


class Server:
    """A program that loads checkpoints.

    title     its name and the release whose rules these are
    evidence  what is put behind every verdict, such as that the rules were read and never tried
    kernels   how it runs formats, by generation of GPU; the first row that fits holds
    kernels_from  where those rows come from
    """

    name: ClassVar[str]
    title: ClassVar[str]
    evidence: ClassVar[str] = ""
    kernels: ClassVar[tuple[Kernel, ...]] = ()
    kernels_from: ClassVar[str] = ""

    def unknown(self, written: Written) -> str:
        """Returns why nothing can be said of a checkpoint; empty when something can."""
        return ""

    def refusals(self, written: Written) -> list[str]:
        """Returns the reasons it does not load the checkpoint, one sentence each; empty when it does.

        What is unknown counts as a reason.
        """
        raise AssertionError("a server says what it refuses")

    def misnamed(self, written: Written) -> list[str]:
        """Returns the reason for which it does not find tensors that have other names than published ones."""
        return [f"{written.renamed}: its class knows the names of the published files alone"] if written.renamed else []


class Loader(Server):
    """A server of which every dialect says itself what it loads (`Writer.loaders`, `Writer.config_faults`)."""

    def unknown(self, written: Written) -> str:
        return "" if written.writer else f"no rules are known of what it loads in dialect {written.dialect}"

    def refusals(self, written: Written) -> list[str]:
        writer = written.writer
        if writer is None:
            return [self.unknown(written)]
        faults = writer.config_faults(written.config, self.name, written.plan)
        return [*self.misnamed(written), *faults, *self._plan_faults(writer, written.plan)]

    def _plan_faults(self, writer: Writer, plan: Plan) -> list[str]:
        if self.name in writer.loaders(plan):
            return []
        reasons = [
            f"{what(run[0])} ({run[0].name}{f' and {len(run) - 1} more' if len(run) > 1 else ''})"
            for run in plan.quantized_alike()
            if self.name not in writer.loaders(alone(plan, run))
        ]
        together = f"the modules together, or the cache, are not what it loads in dialect {writer.name}"
        return reasons or [writer.cache_fault(plan, self.name) or together]


def what(target: QuantizedTarget) -> str:
    """Returns the scheme of a weight in words."""
    source = target.input.describe() if target.input is not None else "whole inputs"
    of = "experts" if target.expert is not None else target.role
    return f"{of}: {target.weight.describe()} with {source}"


def alone(plan: Plan, run: list[QuantizedTarget]) -> Plan:
    """Returns a plan of these targets and nothing else, to see whether it is they that a server does not load."""
    attention = {name: replace(module, slots={}) for name, module in plan.attention.items()}
    return replace(plan, targets={target.name: target for target in run}, attention=attention, changes={})
