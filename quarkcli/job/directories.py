"""Runs a job in several dialects: one walk and one journal, and a checkpoint for each in a folder of the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from quarkcli import dialects, servers
from quarkcli.dialects.base import Writer
from quarkcli.disk import outputs
from quarkcli.disk.writer import atomic_write_json, disk_errors
from quarkcli.errors import ConfigError, QuarkError
from quarkcli.events import Listener, Message
from quarkcli.job import preflight, splitting
from quarkcli.job.forecast import Forecast
from quarkcli.job.options import Options, Prepared
from quarkcli.plan.model import Plan

SCHEMA = "quark/reports/1"


def degrees(
    plan: Plan, writers: Sequence[Writer], config: Mapping[str, Any], options: Options, needs: Mapping[str, set[str]]
) -> list[list[int]]:
    """Returns what `splitting.degrees` finds for each dialect, having asked the servers. Raises ModelError for one."""
    found = []
    for dialect in writers:
        with _naming(dialect, len(writers) > 1):
            servers.check_plan(plan, dialect, options.target)
            found.append(splitting.degrees(plan, dialect, config, options.tp))
        preflight.check_reader(dialect, needs)
    return found


def joined(plan: Plan, writers: Sequence[Writer]) -> dict[str, frozenset[str]]:
    """Returns what one scale of a cache is for (see `Plan.joined`), which must be the same in all dialects.

    Raises ConfigError: other scales are another plan.
    """
    first, *others = [{name: writer.joined(module) for name, module in plan.attention.items()} for writer in writers]
    for writer, other in zip(writers[1:], others, strict=True):
        if other != first:
            name = next(name for name in first if first[name] != other[name])
            one, own = (writers[0], writer) if first[name] else (writer, writers[0])
            raise ConfigError(
                f"these need two plans: format {one.name} has one scale for all outputs of "
                f"{plan.attention[name].k_proj}, and format {own.name} has one each for k and v",
                where=name,
                hint="write the checkpoint formats in separate runs",
                kind="E-DIALECT-CANNOT",
            )
    return {name: kinds for name, kinds in first.items() if kinds}


@contextmanager
def _naming(dialect: Writer, several: bool) -> Iterator[None]:
    """Names the dialect in an error, where it is one of several."""
    try:
        yield
    except QuarkError as error:
        if several:
            error.what = f"format {dialect.name}: {error.what}"
        raise


def complete(prepared: Prepared, writers: Sequence[Writer], parallel: Sequence[list[int]]) -> Prepared:
    """Returns what is known of a job, of which the first dialect is known, with what follows from all of them."""
    plan, several = prepared.plan, len(writers) > 1
    every = [
        replace(
            prepared,
            dialect=dialect,
            dialect_reason=dialects.reason(dialect, plan, auto=prepared.asked == dialects.AUTO),
            forecast=prepared.forecast if number == 0 else _forecast(prepared, dialect),
            tensor_parallel=parallel[number],
            warnings=[*dialects.warnings(dialect, plan), *prepared.warnings],
            folder=dialect.name if several else "",
        )
        for number, dialect in enumerate(writers)
    ]
    every[0].others = every[1:]
    return every[0]


def _forecast(prepared: Prepared, dialect: Writer) -> Forecast:
    source, headers = prepared.source, prepared.weights.headers
    return preflight.forecast_of(prepared.plan, dialect, source, headers, prepared.calibration, prepared.steps)


def together(prepared: Prepared) -> Forecast:
    """Returns the sizes of all directories: each takes its files, and memory for a part of them."""
    first = prepared.forecast
    more = [other.forecast for other in prepared.others]
    packed = sum(int(size.largest_part * min(1.0, size.output_bytes / max(1, size.source_bytes))) for size in more)
    written = sum(size.output_bytes for size in more)
    return replace(
        first,
        output_bytes=first.output_bytes + written,
        memory_bytes=first.memory_bytes + packed,
        disk_bytes=first.disk_bytes + written,
    )


def make(prepared: Prepared, partial: Path) -> None:
    """Makes the folders of several checkpoints."""
    for one in prepared.every:
        with disk_errors(partial / one.folder):
            (partial / one.folder).mkdir(exist_ok=True)


def list_them(prepared: Prepared, partial: Path) -> None:
    """Writes the list of several checkpoints, which are complete."""
    if prepared.others:
        atomic_write_json(partial / outputs.LIST, outputs.listing([one.folder for one in prepared.every]))


def note_apart(prepared: Prepared, records: Mapping[str, Mapping[str, Any]], tell: Listener) -> None:
    """Notes where later parts were calibrated with weights that one of the further dialects decodes a little apart."""
    for one in prepared.others:
        count = sum(record["apart"].get(one.dialect.name, 0) for record in records.values())
        if count:
            what = f"format {one.dialect.name}: the scales of {count} weights differ in their last bit from those of "
            text = f"{what}{prepared.dialect.name}, with which the following blocks were calibrated"
            one.warnings.append(text)
            tell(Message(text, "warning"))


def reports(prepared: Prepared, made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what `report` put together: the report of each directory, by its path."""
    own = made["dialects"] if prepared.others else {prepared.folder: made}
    return {str(one.checkpoint): own[one.folder] for one in prepared.every}


def report(prepared: Prepared, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the report of a job: of several dialects, one of each."""
    if len(reports) == 1:
        return reports[0]
    return {"schema": SCHEMA, "dialects": {one.folder: own for one, own in zip(prepared.every, reports, strict=True)}}
