"""Steps 9 and 10: config, index, side files, resolved recipe; verification, report, card, manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quarkcli import verify
from quarkcli.options import Calibration, Prepared
from quarkcli.plan.model import Plan
from quarkcli.report import build
from quarkcli.spec import spec_to_yaml
from quarkcli.writer import MANIFEST, atomic_write_json, atomic_write_text, disk_errors, write_index

if TYPE_CHECKING:
    from quarkcli.calibration.data import CalibrationData

LOG = "quark/quark.log"


def write_config(prepared: Prepared, partial: Path, records: dict[str, dict[str, Any]]) -> None:
    """Step 9. Everything beside the weights; safe to repeat after an interruption."""
    config = prepared.dialect.config(prepared.plan)
    atomic_write_text(partial / "config.json", with_key(prepared.source.config_text, config))
    atomic_write_json(partial / "quantization_config.json", config)
    files = [file for record in records.values() for file in record["files"]]
    weight_map = {tensor: file["file"] for file in files for tensor in file["tensors"]}
    write_index(partial, weight_map, sum(size for file in files for size in file["tensors"].values()))
    _copy_side_files(prepared, partial)
    (partial / "quark").mkdir(exist_ok=True)
    atomic_write_text(partial / "quark" / "recipe.yaml", resolved_recipe(prepared))


def with_key(config_text: str, quantization: dict[str, Any]) -> str:
    """The source's config.json in its own order, with `quantization_config` added or replaced."""
    config = json.loads(config_text)
    config["quantization_config"] = quantization
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _copy_side_files(prepared: Prepared, partial: Path) -> None:
    source = prepared.source
    with disk_errors(partial):
        for relative in source.side_files():
            if relative.parts[0] == "quark" or relative.name == "quantization_config.json":
                continue
            target = partial / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / relative, target)
        if source.readme is not None:
            (partial / "quark").mkdir(exist_ok=True)
            shutil.copyfile(source.readme, partial / "quark" / "source_README.md")


def resolved_recipe(prepared: Prepared) -> str:
    """The ordered entries of this run as a native recipe; running it again repeats the job."""
    plan, settings = prepared.plan, prepared.calibration
    recipe: dict[str, Any] = {
        "schema": "quark/recipe/1",
        "metadata": {"name": prepared.recipe.name, "description": f"resolved from {prepared.recipe.name}"},
        "exclusions": "none",
        "quantize": {"quant_cfg": _entries(plan)},
        "export": {"dialect": prepared.dialect.name},
    }
    if plan.share is not None:
        recipe["share"] = [{"slots": list(row.slots)} for row in plan.share]
    if prepared.recipe.algorithms:
        recipe["quantize"]["algorithm"] = [{"method": name, **params} for name, params in prepared.recipe.algorithms]
    if settings is not None:
        recipe["calibration"] = _calibration(settings)
    return yaml.dump(recipe, sort_keys=False, allow_unicode=True, width=120, Dumper=_Dumper)


def _calibration(settings: Calibration) -> dict[str, Any]:
    """What repeats the choice of rows; a default number of rows stays a default, which may fall short."""
    rows = {"samples": settings.samples} if settings.asked else {}
    column = {"column": settings.column} if settings.column is not None else {}
    fixed = {"seqlen": settings.seqlen, "seed": settings.seed, "moe": settings.moe, "bos": settings.bos}
    return {"data": settings.source, **rows, **column, **fixed}


class _Dumper(yaml.SafeDumper):
    """No aliases: every entry stands for itself."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


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
    seconds: float,
    device: str,
) -> dict[str, Any]:
    """Step 10 without the renaming. Raises CheckError when the written files are not what the plan says."""
    checks = verify.against_plan(partial, prepared.plan, prepared.dialect, prepared.source.headers)
    report = build.build(prepared, data, records, checks, seconds, device)
    atomic_write_json(partial / "quark" / "report.json", report)
    atomic_write_text(partial / "README.md", build.card(prepared, report))
    _write_manifest(prepared, partial, records)
    return report


def _write_manifest(prepared: Prepared, partial: Path, records: dict[str, dict[str, Any]]) -> None:
    """sha256 of every file but the manifest itself and the log; shards were hashed when they were written."""
    known = {file["file"]: file["sha256"] for record in records.values() for file in record["files"]}
    hashes = {}
    for path in sorted(partial.rglob("*")):
        name = path.relative_to(partial).as_posix()
        if path.is_file() and name not in {MANIFEST, LOG} and not name.startswith("state/"):
            hashes[name] = known.get(name) or hashlib.sha256(path.read_bytes()).hexdigest()
    source = prepared.source
    manifest = {
        "schema": "quark/manifest/1",
        "source": {
            "name": source.name,
            "hub_id": source.hub_id,
            "commit": source.commit,
            "headers": source.header_digest(),
        },
        "files": hashes,
    }
    atomic_write_json(partial / MANIFEST, manifest)
