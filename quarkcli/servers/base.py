"""Defines the contract of servers: what each refuses of a checkpoint, planned or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from quarkcli import dialects
from quarkcli.dialects._kinds import input_kind, kinds_of
from quarkcli.dialects._shared import tiles_fit, unscaled_cache
from quarkcli.dialects.base import Classes, Writer
from quarkcli.plan.model import Plan, QuantizedTarget
from quarkcli.plan.words import how
from quarkcli.servers._kernels import Kernel, Way, fits, way


@dataclass(frozen=True)
class Written:
    """A checkpoint as a server sees it.

    dialect  its name
    config   its `quantization_config`
    plan     what its weights, inputs and caches are
    renamed  a tensor whose name is not the one that the model was published with, empty: there is none
    unnamed  its weights are not in the one file that is found without an index, and there is no index
    """

    dialect: str
    config: Mapping[str, Any]
    plan: Plan
    renamed: str = ""
    unnamed: bool = False

    @property
    def writer(self) -> Writer | None:
        return next((member for member in dialects.writers() if member.name == self.dialect), None)


class Server:
    """A program that loads checkpoints.

    title     its name and the release whose rules these are
    evidence  what is put behind every verdict, such as that the rules were read and never tried
    kernels   how it runs formats, by generation of GPU; the first row that fits holds
    kernels_from  where those rows come from
    models        architectures of config.json that it has classes for; None: it has others, or that was not read
    without       architectures that it was found to have no class for
    """

    name: ClassVar[str]
    title: ClassVar[str]
    evidence: ClassVar[str] = ""
    kernels: ClassVar[tuple[Kernel, ...]] = ()
    kernels_from: ClassVar[str] = ""
    models: ClassVar[frozenset[str] | None] = None
    without: ClassVar[frozenset[str]] = frozenset()

    def unknown(self, written: Written) -> str:
        """Returns why it cannot be said that it loads a checkpoint; empty when it can.

        Servers name modules in ways of their own, which family files tell.
        """
        if not self._knows(written):
            return f"quark does not know what it loads in checkpoint format {written.dialect}"
        if written.plan.guessed:
            return f"quark has no family file for model type '{written.plan.family}', and does not know its class there"
        return ""

    def refusals(self, written: Written) -> list[str]:
        """Returns the reasons it does not load the checkpoint, one sentence each; empty when it does.

        What is unknown counts as a reason where there is no other.
        """
        known = (self._unserved(written.plan) or self._faults(written)) if self._knows(written) else []
        unknown = self.unknown(written)
        return known or ([unknown] if unknown else [])

    def _unserved(self, plan: Plan) -> list[str]:
        """Returns the reason it has no class for the model, or one that does not take these files of the family."""
        name, what = plan.architecture, plan.rewrites.unserved or plan.rewrites.unserved_by.get(self.name, "")
        if name in self.without or (name and self.models is not None and name not in self.models):
            return [f"it has no class for {name}"]
        if what:
            return [f"its class does not know models with {what}"]
        astray = plan.rewrites.unread(self.name)
        return [f"{astray}: its class has no place for it"] if astray else []

    def _knows(self, written: Written) -> bool:
        """True when it is known what it loads in the checkpoint's dialect."""
        raise AssertionError("a server says which dialects it is known to load")

    def _faults(self, written: Written) -> list[str]:
        """Returns the reasons that are known, where its dialect is."""
        raise AssertionError("a server says what it refuses")

    def way(self, kinds: tuple[str, str], generation: str, writer: Writer | None = None) -> Way | None:
        """Returns how it runs formats on a generation, in a dialect; None: not at all."""
        rows = writer.bars.get(self.name, ()) if writer is not None else ()
        for bar in rows:
            if fits(kinds, bar.weight, bar.read) and generation in bar.where.split():
                return None
        return way(self.kernels, kinds, generation)

    def misnamed(self, written: Written) -> list[str]:
        """Returns the reason for which it does not find tensors that have other names than published ones."""
        return [f"{written.renamed}: its class knows only the names of the published files"] if written.renamed else []


class Loader(Server):
    """A server of which every dialect says itself what it loads (`Writer.loaders`, `Writer.config_faults`)."""

    def _knows(self, written: Written) -> bool:
        return written.writer is not None

    def _faults(self, written: Written) -> list[str]:
        writer = written.writer
        assert writer is not None
        faults = writer.config_faults(written.config, self.name, written.plan)
        return [*self.misnamed(written), *faults, *self._plan_faults(writer, written.plan)]

    def _plan_faults(self, writer: Writer, plan: Plan) -> list[str]:
        if self.name in writer.loaders(plan):
            return []
        reasons = [
            f"{what(run[0])} ({_named(run)})"
            for run in plan.quantized_alike()
            if self.name not in writer.loaders(alone(plan, run))
        ]
        reasons = reasons or self._fused_faults(writer, plan)
        together = f"it does not load these modules together, or this cache, in checkpoint format {writer.name}"
        return reasons or [writer.cache_fault(plan, self.name) or together]

    def _fused_faults(self, writer: Writer, plan: Plan) -> list[str]:
        """Returns which fused modules it does not load, each of which it loads alone; one sentence for groups alike."""
        groups: dict[str, list[QuantizedTarget]] = {}
        for target in plan.quantized():
            groups.setdefault(target.group, []).append(target)
        alike: dict[Any, list[list[QuantizedTarget]]] = {}
        for members in groups.values():
            kind = tuple((t.role, t.expert is None, t.shape, t.weight, t.input) for t in members)
            alike.setdefault(kind, []).append(members)
        faults = []
        for first, *more in alike.values():
            part = alone(plan, first)
            if self.name in writer.loaders(part):
                continue
            why = how(first[0]) if tiles_fit(part) else "a tile of scales ends within one of them"
            named = _named([members[0] for members in (first, *more)])
            faults.append(f"it does not load {', '.join(t.role for t in first)} together: {why} ({named})")
        return faults


class Read(Server):
    """A server of which only the source was read: every dialect says what its classes take (`Writer.classes`)."""

    evidence = " (read, not run)"

    def _classes(self, written: Written) -> Classes | None:
        return written.writer.classes.get(self.name) if written.writer is not None else None

    def _knows(self, written: Written) -> bool:
        return self._classes(written) is not None

    def _faults(self, written: Written) -> list[str]:
        rules = self._classes(written)
        assert rules is not None
        found = self.misnamed(written)
        for run in written.plan.quantized_alike():
            reason = _reason(run[0], rules)
            if reason is not None:
                found.append(f"{reason} ({_named(run)})")
        if written.plan.disagreeing():
            found.append("weights that it multiplies together have more than one scheme")
        if written.plan.online:
            found.append("it does not rotate inputs while the model runs")
        return [*found, *_attention(written.plan), *rules.faults(written.plan, written.config)]


def _named(targets: list[QuantizedTarget]) -> str:
    """Returns the first name, and how many more there are."""
    return targets[0].name + (f" and {len(targets) - 1} more" if len(targets) > 1 else "")


def _reason(target: QuantizedTarget, rules: Classes) -> str | None:
    if target.output is not None or target.bias_spec is not None:
        return "no class for quantized outputs or biases"
    if target.role in ("embedding", "router") or (target.role == "head" and not rules.heads):
        return f"no class for a quantized {target.role}"
    known = rules.linears if target.expert is None else rules.experts
    return None if kinds_of((target.weight, target.input)) in known else f"no class for {what(target)}"


def _attention(plan: Plan) -> list[str]:
    """Returns the reasons it does not take quantized attention: it knows a cache in 8-bit floats by its scales."""
    specs = [(one.name, kind, spec) for one in plan.attention.values() for kind, spec in one.specs.items()]
    others = [f"{name}: no scale for attention {kind}" for name, kind, _ in specs if kind not in ("k", "v")]
    caches = [
        f"{name}: a cache of {spec.describe()}"
        for name, kind, spec in specs
        if kind in ("k", "v") and input_kind(spec) != "fp8 static"
    ]
    unscaled = ["its class has no place for scales of the cache"] if unscaled_cache(plan) else []
    return [*others[:1], *caches[:1], *unscaled]


def what(target: QuantizedTarget) -> str:
    """Returns the scheme of a weight in words."""
    of = "experts" if target.expert is not None else target.role
    return f"{of}: {how(target)}{'' if target.input is not None else '; inputs in 16 bits'}"


def alone(plan: Plan, run: list[QuantizedTarget]) -> Plan:
    """Returns a plan of these targets and nothing else, to see whether it is they that a server does not load."""
    attention = {name: replace(module, slots={}) for name, module in plan.attention.items()}
    return replace(plan, targets={target.name: target for target in run}, attention=attention, changes={})
