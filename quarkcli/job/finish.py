"""Does steps 9 and 10: config, index, side files, resolved recipe; verification, report, card, manifest; the name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quarkcli.dialects.base import CONFIG_FILE, Writer
from quarkcli.disk import manifest, ties, verify
from quarkcli.disk import unfinished as under_way
from quarkcli.disk.journal import Journal
from quarkcli.disk.outputs import OURS, PAGE, RECIPE, REPORT, SOURCE_CARD
from quarkcli.disk.place import dispose, earlier
from quarkcli.disk.side_files import SideFiles
from quarkcli.disk.source import Source
from quarkcli.disk.writer import (
    atomic_write_json,
    atomic_write_text,
    disk_errors,
    partial_path,
    publish,
    remove_staging,
    resolved,
    sync_folder,
    write_index,
)
from quarkcli.errors import AccessError, HubError, ResourceError
from quarkcli.events import Listener, Message, Working
from quarkcli.family import TIED, quantization, text_config, without_quantization
from quarkcli.job.options import Calibration, Prepared
from quarkcli.plan import advice
from quarkcli.plan.model import Part, Plan
from quarkcli.recipe.attributes.written import spec_to_yaml
from quarkcli.reporting import build, text
from quarkcli.reporting.card import card
from quarkcli.reporting.page import page
from quarkcli.reporting.run import Clock

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData


def begin_report(prepared: Prepared, data: CalibrationData | None, partial: Path, clock: Clock, device: str) -> None:
    """Writes what `quark report` tells of a run under way; `data`: None before it is read."""
    if data is None and under_way.is_unfinished(partial):
        return  # of the run that this one may go on with
    report = build.begun(prepared, data, device, clock.facts(prepared.options.command))
    under_way.keep(partial, prepared.folder, json.dumps(report))


def write_config(prepared: Prepared, partial: Path, records: dict[str, dict[str, Any]], tell: Listener) -> None:
    """Step 9: writes everything beside the weights; safe to repeat after an interruption."""
    describe(prepared.dialect, prepared.plan, prepared.source, prepared.side_files, partial, records)
    if prepared.plan.untied:
        head, embedding = prepared.plan.doubled_head or ("", "")
        what = f"config.json says that {head} is {embedding}, and the files hold other values for it"
        tell(Message(f"{what}; quark writes {TIED}: false, so that servers read both", "warning"))
    atomic_write_text(partial / RECIPE, resolved_recipe(prepared))


def describe(
    dialect: Writer,
    plan: Plan,
    source: Source,
    beside: SideFiles,
    partial: Path,
    records: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes config, index, side files, and what the dialect says of the checkpoint.

    plan      gets `untied`, which only the values of head and embedding can tell; config.json and reports follow it
    records   files of every part
    """
    plan.untied = _is_untied(plan, source)
    described = dialect.files(plan)
    keys = described.pop(CONFIG_FILE, {})
    atomic_write_text(partial / CONFIG_FILE, with_keys(source.config_text, keys, plan.config_changes))
    for name, content in described.items():
        atomic_write_json(partial / name, content)
    files = [file for record in records.values() for file in record["files"]]
    weight_map = {tensor: file["file"] for file in files for tensor in file["tensors"]}
    write_index(partial, weight_map, sum(size for file in files for size in file["tensors"].values()))
    _copy_side_files(beside, partial, described)
    (partial / OURS).mkdir(exist_ok=True)


def _is_untied(plan: Plan, source: Source) -> bool:
    """True where config.json says that head and embedding are one, and the source holds two that differ."""
    if plan.doubled_head is None:
        return False
    if not all(name in source.headers for name in plan.doubled_head):
        return True  # quark decodes one of them, and stores both
    return not ties.same_values(source, *plan.doubled_head)


def with_keys(config_text: str, keys: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> str:
    """Returns the source's config.json in its own order, with `keys` added; what it said of its quantization goes.

    keys      entries of a dialect at the top: `quantization_config`
    changes   keys that transforms set, where the config has them: at the top and in the text model's part
    """
    config = json.loads(config_text)
    if quantization(config):
        rest = without_quantization(config)
        config = {key: rest.get(key) for key in config if key in rest or key in keys}
    for key, value in (changes or {}).items():
        inner = text_config(config)
        if isinstance(inner, dict) and key in inner:
            inner[key] = value
        if key in config or key not in inner:
            config[key] = value
    config |= keys
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _copy_side_files(found: SideFiles, partial: Path, written: Collection[str]) -> None:
    """Copies the files beside the source's weights. `written`: files of the dialect, which stay as they are."""
    with disk_errors(partial):
        for relative, origin in found.copied.items():
            if relative.as_posix() in written:
                continue
            target = partial / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, target)
        if found.readme is not None:
            (partial / OURS).mkdir(exist_ok=True)
            shutil.copyfile(found.readme, partial / SOURCE_CARD)


def resolved_recipe(prepared: Prepared) -> str:
    """Returns the ordered entries of this run as a native recipe; running it again repeats the job."""
    return yaml.dump(as_recipe(prepared), sort_keys=False, allow_unicode=True, width=120, Dumper=_Dumper)


def as_recipe(prepared: Prepared) -> dict[str, Any]:
    """Returns what `resolved_recipe` writes."""
    plan, settings = prepared.plan, prepared.calibration
    recipe: dict[str, Any] = {
        "schema": "quark/recipe/1",
        "metadata": {"name": prepared.recipe.name, "description": f"resolved from {prepared.recipe.name}"},
        "exclusions": "none",
        "quantize": {"quant_cfg": _entries(plan)},
        "export": {"dialect": prepared.dialect.name},
    }
    if plan.share is not None:
        recipe["share"] = [row.as_dict() for row in plan.share]
    if plan.own_expert_inputs:
        recipe["expert_inputs"] = "own"
    chosen = [advice.written(step, plan) for step in plan.algorithms] if prepared.advice else prepared.recipe.algorithms
    if chosen:
        recipe["quantize"]["algorithm"] = [{"method": name, **params} for name, params in chosen]
    if settings is not None:
        recipe["calibration"] = _calibration(settings)
    elif prepared.is_random and prepared.seed:
        recipe["calibration"] = {"seed": prepared.seed}
    return recipe


def _calibration(settings: Calibration) -> dict[str, Any]:
    """Returns the settings that make a run choose the same rows again.

    A default number of rows stays a default, which may fall short.
    """
    rows = {"samples": settings.samples} if settings.asked else {}
    more: dict[str, Any] = {"column": settings.column} if settings.column is not None else {}
    more |= {} if settings.min_expert_tokens == 1 else {"min_expert_tokens": settings.min_expert_tokens}
    fixed = {"seqlen": settings.seqlen, "seed": settings.seed, "moe": settings.moe, "bos": settings.bos}
    return {"data": settings.source, **rows, **more, **fixed}


class _Dumper(yaml.SafeDumper):
    """A YAML dumper without aliases: every entry stands for itself."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """Writes bytes of a path that are no text as people see them: YAML refuses half a surrogate pair."""
    return dumper.represent_str(value.encode("utf-8", "backslashreplace").decode())


_Dumper.add_representer(str, _text)


def _entries(plan: Plan) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for index, entry in enumerate(plan.entries):
        if index in plan.restores:  # what comes back depends on the slot, so every one stands for itself
            back = [(slot, decision.spec) for slot, decision in plan.slots() if decision.entry == index]
            rows += [{"quantizer_path": slot, "cfg": spec_to_yaml(s), "required": False} for slot, s in back if s]
            continue
        row: dict[str, Any] = {"quantizer_path": entry.quantizer_path}
        if entry.parent_class is not None:
            row["parent_class"] = entry.parent_class
        if entry.cfg is not None:
            row["cfg"] = entry.cfg
        rows.append({**row, "enable": entry.enable, "required": False})
    return rows


def verify_and_report(
    prepared: Prepared,
    data: CalibrationData | None,
    records: dict[str, dict[str, Any]],
    partial: Path,
    clock: Clock,
    device: str,
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Does step 10 without the renaming. Raises CheckError for files that are not as planned.

    evaluation   what the files score beside their source; None: that was not measured
    """
    checks = ["the written files were not read back: --no-verify"]
    if prepared.options.verify:
        checks = verify.against_plan(partial, prepared.plan, prepared.dialect, prepared.weights.headers)
    report = build.build(prepared, data, records, checks, clock, device, evaluation)
    atomic_write_text(partial / REPORT, text.written(report))
    atomic_write_text(partial / PAGE, page(report))
    atomic_write_text(partial / "README.md", card(prepared, report))
    write_manifest(source_facts(prepared.source), partial, records)
    return report


def unfinished(plan: Plan, journal: Journal, tell: Listener) -> list[Part]:
    """Returns the parts that the journal does not have, or that are damaged on the disk."""
    if journal.finished:
        tell(Message(f"reading the files of {len(journal.finished)} finished parts of the model once to check them"))
    tell(Working("comparing finished parts of the model with the journal"))
    lost = journal.verify()
    if lost:
        what = f"these files have changed and are made again: {', '.join(lost)}"
        tell(Message(f"{len(lost)} finished parts of the model are damaged or follow a damaged one; {what}", "warning"))
    journal.keep()
    todo = [part for part in plan.parts if part.name not in journal.finished]
    if len(todo) < len(plan.parts):
        place = f"continuing at {todo[0].name}" if todo else "continuing with the final steps"
        tell(
            Message(
                f"resuming: {len(plan.parts) - len(todo)} of {len(plan.parts)} parts of the model are done; {place}"
            )
        )
    return todo


def source_facts(source: Source) -> dict[str, Any]:
    """Returns what a manifest says of the model that a checkpoint was made from."""
    return {
        "name": source.name,
        "hub_id": source.hub_id,
        "commit": source.commit,
        "headers": source.header_digest(),
    }


def write_manifest(facts: Mapping[str, Any], partial: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the sha256 of every file but the manifest itself and the log.

    Shards were hashed when they were written. `facts`: see `source_facts`.
    """
    remove_staging(partial)
    manifest.write(partial, facts, {file["file"]: file["sha256"] for r in records.values() for file in r["files"]})


def hand_over(
    journal: Journal,
    partial: Path,
    output: Path,
    overwrite: bool,
    tell: Listener,
    named: Callable[[], None] = lambda: None,
) -> None:
    """Gives a finished directory its name, and tidies up beside it. `named`: called as soon as it bears it."""
    journal.set_aside()
    publish(partial, output, overwrite, journal.announce)
    named()
    _tidy(journal, output, tell)


@contextmanager
def begun() -> Iterator[None]:
    """Turns missing files into disk errors: they were there when the work began, so no name is wrong."""
    try:
        yield
    except HubError:
        raise
    except AccessError as error:
        raise ResourceError(error.what, where=error.where, hint=error.hint, kind="E-DISK-WRITE") from error


def _tidy(journal: Journal, output: Path, tell: Listener) -> None:
    """Tidies up after the renaming. The checkpoint stands: a failure now, or a signal, is no more than a warning."""
    try:
        sync_folder(partial_path(output).parent)
        for path in sorted({*earlier(resolved(output))} - {*map(Path, journal.replaced)}):
            tell(Message(f"an earlier run moved {path} aside; delete it if nobody needs it"))
        for old in journal.replaced:
            for line in dispose(Path(old), output):
                tell(Message(line, "warning", always=True))
        journal.discard_state()
    except BaseException as error:
        what = str(error) or type(error).__name__
        tell(
            Message(
                f"the checkpoint is complete, but some temporary files beside it were not deleted: {what}",
                "warning",
                always=True,
            )
        )
