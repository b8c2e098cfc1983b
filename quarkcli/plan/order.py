"""Applies the ordered list of entries to a slot: later entries win.

An entry with a cfg replaces all attributes that were given before, one without only switches what is there. A pattern
that ends with an index (`*weight_quantizer.1`) speaks of that stage of a chain: its cfg replaces the stage, and a stage
that is off drops out of the chain. It does not match a slot that is no chain at that point of the list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from quarkcli.errors import ConfigError
from quarkcli.plan.model import Decision
from quarkcli.plan.names import Hits, stage_of
from quarkcli.recipe.attributes import native, to_spec
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.recipe.entries import Entry
from quarkcli.spec import TensorSpec


class State(NamedTuple):
    """A slot at one point of the list.

    source   the entry whose cfg holds
    on       whether anything of it is on
    decided  the last entry that spoke of it
    stages   specs of a chain's stages and whether they are on, once an entry spoke of one of them
    changed  the last entry that replaced one of them
    """

    source: int | None = None
    on: bool = False
    decided: int | None = None
    stages: tuple[tuple[TensorSpec, bool], ...] = ()
    changed: int | None = None


UNTOUCHED = State()


class Order:
    """The ordered list at work. Equal questions are answered by one object.

    restores          entries that bring back what was said before the exclusions
    exclusions_start  index of the first exclusion
    """

    def __init__(self, entries: Sequence[Entry], restores: frozenset[int], exclusions_start: int) -> None:
        self.entries = entries
        self.restores = restores
        self.exclusions_start = exclusions_start
        self.stage = [stage_of(entry.quantizer_path)[1] for entry in entries]
        self._specs: dict[tuple[int, bool], TensorSpec] = {}
        self._equal: dict[TensorSpec, TensorSpec] = {}

    def decision(self, hits: Hits, parent_class: str, *, weight: bool) -> tuple[Decision, tuple[int, ...]]:
        """Returns the outcome for a slot that these entries match by name, and the entries that applied to it.

        weight   a slot of a weight or bias, where attributes may mean something else than on activations
        Raises ConfigError, with the entry's place, for attributes that make no sense.
        """
        state, spoke = UNTOUCHED, []
        for index, after in self.steps(hits, parent_class, weight=weight):
            state = after
            spoke.append(index)
        return Decision(self.spec(state, weight=weight), state.decided, self.attributes(state, weight)), tuple(spoke)

    def steps(self, hits: Hits, parent_class: str, *, weight: bool) -> Iterator[tuple[int, State]]:
        """Yields the entries that speak of the slot, with its state after each."""
        state = before = UNTOUCHED
        for index in hits:
            entry = self.entries[index]
            if entry.parent_class not in (None, parent_class):
                continue
            if index in self.restores:
                state = before._replace(decided=index)
            elif self.stage[index] is not None:
                changed = self._with_stage(state, index, weight)
                if changed is None:
                    continue
                state = changed
            elif entry.cfg is not None:
                state = State(index, entry.enable, index)
            else:
                stages = tuple((spec, entry.enable) for spec, _ in state.stages)
                state = state._replace(on=entry.enable, decided=index, stages=stages)
            if index < self.exclusions_start:
                before = state
            yield index, state

    def spec(self, state: State, *, weight: bool) -> TensorSpec | None:
        """Returns the spec that the slot is quantized with, None when it is off."""
        if not state.on or state.source is None:
            return None
        if not state.stages:
            return self._of(state.source, weight)
        return self._chained(state, [spec for spec, on in state.stages if on], weight)

    def attributes(self, state: State, weight: bool) -> Any:
        """Returns the attributes that a slot has, also where it is off."""
        if state.source is None:
            return None
        if not state.stages:
            return self.entries[state.source].cfg
        return spec_to_yaml(self._chained(state, [spec for spec, _ in state.stages], weight))

    def _with_stage(self, state: State, index: int, weight: bool) -> State | None:
        """Returns the state after an entry about one stage; None when there is no such stage."""
        if state.source is None:
            return None
        entry, number = self.entries[index], self.stage[index]
        whole = self._of(state.source, weight)
        stages = list(state.stages or ((replace(stage, then=None, stored="first"), state.on) for stage in whole.stages))
        if number is None or len(stages) < 2 or number >= len(stages):
            return None
        spec = self._of(index, weight) if entry.cfg is not None else stages[number][0]
        if spec.then is not None:
            raise ConfigError("a stage of a chain cannot be a chain", where=str(entry.origin), kind="E-CHAIN")
        stages[number] = spec, entry.enable
        changed = state.changed if entry.cfg is None else index
        return State(state.source, any(on for _, on in stages), index, tuple(stages), changed)

    def _chained(self, state: State, stages: list[TensorSpec], weight: bool) -> TensorSpec:
        """Returns stages as one spec, stored as the chain they come from.

        Raises ConfigError when they do not go together.
        """
        assert state.source is not None
        first, *rest = stages
        if not rest:
            return self._one(first)
        chain = replace(first, then=rest[0], stored=self._of(state.source, weight).stored)
        try:
            return self._one(native.to_spec(spec_to_yaml(chain)))
        except ConfigError as error:
            place = self.entries[state.source if state.changed is None else state.changed].origin
            raise ConfigError(error.what, where=str(place), hint=error.hint, kind=error.kind or "E-ENTRY") from error

    def _of(self, index: int, weight: bool) -> TensorSpec:
        """Returns the spec of an entry's cfg. Raises ConfigError with its place."""
        key = index, weight
        if key not in self._specs:
            entry = self.entries[index]
            assert entry.cfg is not None
            try:
                self._specs[key] = self._one(to_spec(entry.cfg, weight=weight))
            except ConfigError as error:
                raise ConfigError(
                    error.what,
                    where=error.where or str(entry.origin),
                    hint=error.hint,
                    kind=error.kind or "E-ENTRY",
                ) from error
        return self._specs[key]

    def _one(self, spec: TensorSpec) -> TensorSpec:
        """Returns one object for equal specs."""
        return self._equal.setdefault(spec, spec)
