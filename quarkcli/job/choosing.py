"""Chooses a scheme for a model, a GPU and a server, and says why: for a recipe to start from. Reads headers only.

Each scheme of the table (`recipes/choices.yaml`) is planned for the model itself, so that what is chosen is what the
server loads of this model. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quarkcli import servers
from quarkcli.dialects._kinds import kinds_of
from quarkcli.dialects.base import Writer
from quarkcli.disk import verify
from quarkcli.disk.checkpoint import Checkpoint
from quarkcli.disk.origin import open_weights
from quarkcli.errors import ConfigError, ModelError, QuarkError, UsageError
from quarkcli.events import Listener, silent
from quarkcli.forward.defaults import BUILTIN
from quarkcli.job import rates
from quarkcli.job.options import Options, Prepared
from quarkcli.job.run import open_source, prepare
from quarkcli.plan import advice
from quarkcli.plan.model import Plan
from quarkcli.recipe import catalog
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.advice import AUTO, choices
from quarkcli.recipe.schema import NATIVE, ChoiceRow
from quarkcli.servers import Server, Way

_SAVING = 0.9  # of the bytes of a quantized source: what takes more is not worth another rounding
CACHE = "fp8"  # the cache scheme that is worth its loss nearly always


@dataclass(frozen=True)
class Wish:
    """The GPU, its number and the server.

    memory   bytes of all of them; None: a generation was named, whose devices differ
    """

    gpu: str
    generation: str
    memory: int | None
    tp: int
    server: Server

    @classmethod
    def of(cls, gpu: str, server: str, tp: int) -> Wish:
        """Raises UsageError, with the nearest, for unknown names."""
        memory = rates.memory(gpu)
        return cls(gpu, rates.generation(gpu), memory and memory * tp, tp, servers.named(server))


@dataclass(frozen=True)
class Stored:
    """A source that is quantized already.

    words    how its weights are stored
    refused  why the server does not load it as it is; empty: it does
    way      how the server runs it as it is; None: not at all
    size     bytes of its files
    """

    words: str
    refused: str
    way: Way | None
    size: int

    def said(self, wish: Wish) -> str:
        """Returns it as a sentence, and whether anything need be done."""
        title = wish.server.title
        if self.refused:
            answer = f"{title} does not load it as it is: {self.refused}"
        elif self.way is None:
            answer = f"{title} does not run it on {wish.generation}"
        else:
            answer = f"{title} loads it as it is and runs it {self.way} on {wish.generation}"
        return f"the source is quantized already ({self.words}); {answer}"


@dataclass
class Choice:
    """Holds the choice, and why.

    prepared     the plan with it
    way          how the server runs it
    steps        algorithms as a recipe lists them; `steps_why` from the table of advice
    cache        the scheme of the KV cache or `none`, with `cache_why`
    passed_over  schemes that come before it in the table, with the reason against each
    entries      what a recipe lists where not all that the scheme is for is quantized
    stored       of a source that is quantized already
    """

    row: ChoiceRow
    prepared: Prepared
    way: Way
    steps: list[tuple[str, dict[str, Any]]]
    steps_why: str
    cache: str
    cache_why: str
    passed_over: dict[str, str] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    stored: Stored | None = None


def choose(options: Options, wish: Wish, tell: Listener = silent) -> Choice:
    """Returns the first choice of the table that fits. Raises ModelError where none does, with the reasons.

    options   those about the model; its scheme is chosen
    """
    against: dict[str, str] = {}
    errors: list[QuarkError] = []
    given = replace(options, target=wish.server.name, tp=wish.tp, calib_data=BUILTIN)
    stored = _stored(options, wish, tell)
    for row in choices():
        try:
            return _tried(row, given, wish, against, stored)
        except _Unfit as reason:
            against.setdefault(row.scheme, str(reason))
        except (ModelError, ConfigError, UsageError) as error:
            if row.only is not None and error.kind == "E-PATTERN-NOMATCH":
                continue  # the row is for another kind of model
            against.setdefault(row.scheme, error.what)
            errors.append(error)
    if len({error.what for error in errors}) == 1 and set(against.values()) == {errors[0].what}:
        raise errors[0]  # it is about the model and not about a scheme
    reasons = "\n".join(f"  {name}: {reason}" for name, reason in against.items())
    if stored is not None and stored.way is not None:
        raise ModelError(
            f"{stored.said(wish)}. No scheme that it runs makes it smaller\n{reasons}", where=options.model,
            hint="use it as it is; 'quark quantize --scheme NAME' would quantize it again", kind="E-INIT-NONE",
        )  # fmt: skip
    raise ModelError(
        f"no scheme was found that {wish.server.title} can run for it on {wish.gpu}\n{reasons}", where=options.model,
        hint="try another --server or --gpu; 'quark schemes list' shows every scheme", kind="E-INIT-NONE",
    )  # fmt: skip


class _Unfit(Exception):
    """A row does not fit, for the reason that is its text."""


def _stored(options: Options, wish: Wish, tell: Listener) -> Stored | None:
    """Returns how a source is quantized; None: it is not, or in a way of which every plan says what is wrong."""
    source = open_source(options, tell)
    try:
        weights, origin = open_weights(source)
    except ModelError:
        return None
    if origin is None:
        return None
    assert isinstance(weights, Checkpoint)
    written = verify.as_served(weights, weights.singly)
    refused = next(iter(wish.server.refusals(written)), "")
    way = None if refused else _way(written.plan, written.writer, wish)
    return Stored(f"{origin.method}: {origin.stored()}", refused, way, sum(source.files.values()))


def _tried(row: ChoiceRow, options: Options, wish: Wish, against: dict[str, str], stored: Stored | None) -> Choice:
    """Returns the choice of a row. Raises _Unfit, or the error of the plan, where it does not fit."""
    entries = _entries(row)
    prepared = _planned(row, options, entries)
    way = _way(prepared.plan, prepared.dialect, wish)
    if way not in row.runs:
        how = f"{wish.server.title} runs it {way}" if way else f"{wish.server.title} does not run it"
        raise _Unfit(f"{how} on {wish.generation}")
    total, size = sum(prepared.coverage.total.values()), prepared.forecast.output_bytes
    if total < row.least:
        raise _Unfit(f"it needs {row.least / 1e9:.0f} B parameters or more; a smaller model loses too much")
    if row.room is not None and wish.memory is not None and size > row.room * wish.memory:
        raise _Unfit(f"{size / 1e9:.3g} GB of weights leave too little of {wish.memory / 1e9:.0f} GB for the KV cache")
    if stored is not None and stored.way is not None and size > _SAVING * stored.size:
        raise _Unfit(f"it takes {size / stored.size:.0%} of the bytes of the source, which is quantized already")
    steps = [advice.written(step, prepared.plan) for one in prepared.advice for step in one.steps]
    why = "; ".join(dict.fromkeys(one.why for one in prepared.advice))
    cache, cache_why, prepared = _cache(prepared, options, wish)
    passed = {name: reason for name, reason in against.items() if name != row.scheme}
    return Choice(row, prepared, way, steps, why, cache, cache_why, passed, entries, stored)


def _entries(row: ChoiceRow) -> list[dict[str, Any]]:
    """Returns the entries of a recipe for a row that quantizes some modules alone; none for the others."""
    if row.only is None:
        return []
    found = catalog.document(catalog.find("schemes", row.scheme)).data
    slots = {slot: found[slot] for slot in ("weight", "input", "output", "bias") if found.get(slot)}
    switched = [{"quantizer_path": f"{row.only}.{slot}_quantizer", "cfg": cfg} for slot, cfg in slots.items()]
    return [{"quantizer_path": "*", "enable": False}, *switched]


def _planned(row: ChoiceRow, options: Options, entries: list[dict[str, Any]]) -> Prepared:
    """Returns the plan with the advised algorithms; rounded to nearest where the model cannot run them."""
    given = replace(options, scheme=row.scheme, algorithm=AUTO)
    if entries:
        config = {"schema": NATIVE, "quantize": {"quant_cfg": entries}, "exclusions": "default"}
        given = replace(given, scheme=None, recipe=recipes.from_config(config))
    try:
        return prepare(given)
    except ModelError:
        return prepare(replace(given, algorithm=None))


def _way(plan: Plan, dialect: Writer | None, wish: Wish) -> Way | None:
    """Returns the way in which the server runs the weights of a plan; the slowest, where there are several."""
    order: Sequence[Way | None] = [*servers.MEANING, None]
    found: list[Way | None] = []
    for run in plan.quantized_alike():
        kinds = kinds_of((run[0].weight, run[0].input))
        found.append(wish.server.way(kinds, wish.generation, dialect) if kinds else None)
    return max(found, key=order.index, default=None)


def _cache(prepared: Prepared, options: Options, wish: Wish) -> tuple[str, str, Prepared]:
    """Returns the KV cache's scheme, why, and the plan with it."""
    if wish.server.way(("kv-cache", "fp8_e4m3"), wish.generation, prepared.dialect) is None:
        return "none", f"{wish.server.title} is not known to run a KV cache in 8 bits on {wish.generation}", prepared
    if prepared.calibration is None:
        return (
            "none",
            f"{CACHE} would halve the cache, but its scales need calibration data, and nothing else here does",
            prepared,
        )
    overrides = replace(options.overrides, kv_cache=CACHE)
    try:
        given = replace(prepared.options, overrides=overrides)
        why = f"{CACHE} takes half the bytes per token; its scales need calibration data, as other parts here do"
        return CACHE, why, prepare(given)
    except QuarkError as error:
        return "none", f"{CACHE} does not work for this model: {_about_cache(given, prepared, error).what}", prepared


def _about_cache(given: Options, prepared: Prepared, error: QuarkError) -> QuarkError:
    """Returns what refuses a cache in the checkpoint format that the weights have without it.

    Where that format holds none, another one was tried, and `error` says what that cannot do with the weights.
    """
    try:
        prepare(replace(given, dialect=prepared.dialect.name))
    except QuarkError as own:
        return own
    return error
