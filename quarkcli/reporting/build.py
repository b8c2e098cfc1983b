"""Builds report.json (schema `quark/report/2`) from a plan and the parts that are done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from quarkcli import __version__, memory
from quarkcli.disk import embedded, nonfinite
from quarkcli.errors import some
from quarkcli.plan.model import Plan
from quarkcli.plan.sizes import expert_share
from quarkcli.reporting import counts, tensors
from quarkcli.reporting.alike import folded
from quarkcli.reporting.outcomes import outcomes
from quarkcli.reporting.run import Clock
from quarkcli.reporting.tensors import Records

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData
    from quarkcli.job.options import Prepared

SCHEMA = "quark/report/2"


def begun(prepared: Prepared, data: CalibrationData | None, device: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the report of a run that has finished no part yet: all that its plan says.

    run   see `reporting.run.Clock.facts`
    """
    plan = prepared.plan
    rows = tensors.planned(plan, prepared.dialect, prepared.weights.headers, prepared.layout.tensor_roles)
    return {
        "schema": SCHEMA,
        "quark_version": __version__,
        "state": {"finished": False, "parts": 0, "of": len(plan.parts)},
        "model": _model(prepared),
        "source": prepared.origin.facts(plan) if prepared.origin is not None else None,
        "recipe": {"name": prepared.recipe.name, "file": prepared.recipe.file or None},
        "algorithms": [step.name for step in prepared.steps],
        "advice": [choice.as_dict() for choice in prepared.advice],
        "dialect": {"name": prepared.dialect.name, "reason": prepared.dialect_reason},
        "calibration": _calibration(prepared, data),
        "size": _size(prepared),
        "modules_by_scheme": counts.modules_by_scheme(plan),
        "attention_by_scheme": counts.attention_by_scheme(plan),
        "shared_scales": counts.shared_scales(plan),
        "decided_by": counts.decided_by(plan),
        "experts": _experts(plan),
        "loss": _loss({}),
        "evaluation": None,
        "dead_inputs": _dead_inputs({}),
        "exact": {},
        "skipped": {},
        "outcomes": outcomes([]),
        "kept": plan.kept,
        "kept_reasons": dict(Counter(plan.kept.values()).most_common()),
        "changed": plan.changed,
        "added": [added.name for added in plan.added],
        "dropped": plan.dropped,
        "config_changes": plan.config_changes,
        "online": plan.online,
        "transforms": {},
        "split": counts.split_tensors(plan),
        "tied_head": plan.tied_head,
        "side_files_left_out": [name for names in prepared.side_files.left_out.values() for name in names],
        "warnings": list(dict.fromkeys(prepared.warnings)),
        "checks": [],
        "device": device,
        "threads": prepared.threads,
        "seconds": 0.0,
        "peak_rss_bytes": 0,
        "peak_gpu_bytes": 0,
        "run": dict(run),
        "parts": tensors.parts(plan, rows),
        "sites": [],
        "tensors": rows,
    }


def filled(report: Mapping[str, Any], records: Records) -> dict[str, Any]:
    """Returns a report with what the parts that are done found. `records`: per part, as the journal keeps them."""
    parts = tensors.measured_parts(report["parts"], records)
    done = [row for row in parts if row["done"]]
    of_parts = folded(warning for record in records.values() for warning in record["warnings"])
    found = {
        "state": {"finished": False, "parts": len(done), "of": len(parts)},
        "size": report["size"] | {"output_bytes": sum(row["bytes"] for row in done)},
        "experts": report["experts"]
        | {"calibration_tokens": {k: v for r in records.values() for k, v in r["expert_tokens"].items()}},
        "loss": _loss(records),
        "dead_inputs": _dead_inputs(records),
        "exact": _exact(records),
        "skipped": _skipped(records),
        "outcomes": outcomes(records.values()),
        "transforms": _transforms(records),
        "warnings": list(dict.fromkeys([*report["warnings"], *of_parts])),
        "seconds": round(sum(row["seconds"] for row in done), 2),
        "peak_rss_bytes": max((row["peak_rss_bytes"] for row in done), default=0),
        "peak_gpu_bytes": max((row["peak_gpu_bytes"] for row in done), default=0),
        "parts": parts,
        "sites": tensors.sites(parts, records),
        "tensors": tensors.measured(report["tensors"], records),
    }
    return {**report, **found}


def build(
    prepared: Prepared,
    data: CalibrationData | None,
    records: Records,
    checks: list[str],
    clock: Clock,
    device: str,
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns the report of a finished run.

    records      per part, as the journal keeps them
    evaluation   see `job.judging.measured`
    """
    report = filled(begun(prepared, data, device, clock.facts(prepared.options.command)), records)
    state = {"state": report["state"] | {"finished": True}, "evaluation": evaluation, "checks": checks}
    memories = {"peak_rss_bytes": memory.peak_rss(), "peak_gpu_bytes": memory.peak_gpu(device)}
    return {**report, **state, "seconds": round(clock.seconds(), 2), **memories}


def _size(prepared: Prepared) -> dict[str, Any]:
    return {
        "source_bytes": prepared.forecast.source_bytes,
        "output_bytes": 0,
        "planned_bytes": prepared.forecast.output_bytes,
        "effective_bits": round(prepared.forecast.effective_bits, 4),
        "bytes_by_dtype": prepared.forecast.dtypes,
    }


def _experts(plan: Plan) -> dict[str, Any]:
    quantized, experts = expert_share(plan)
    return {
        "parameters": experts,
        "quantized_parameters": quantized,
        "share_quantized": quantized / experts if experts else None,
        "calibration_tokens": {},
    }


def _model(prepared: Prepared) -> dict[str, Any]:
    source = prepared.source
    return {
        "name": source.name,
        "path": embedded.place(source),
        "commit": source.commit,
        "family": prepared.plan.family,
        "architectures": source.config.get("architectures"),
    }


def _transforms(records: Records) -> dict[str, dict[str, Any]]:
    """Returns what each transform decided: transform -> part -> its notes."""
    found: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        for key, notes in record["transforms"].items():
            found.setdefault(key, {})[name] = notes
    return found


def _exact(records: Records) -> dict[str, int]:
    """Returns the weights whose values their format holds, being codes times powers of two -> blocks of it rounded."""
    return {name: count for record in records.values() for name, count in record.get("exact", {}).items()}


def _skipped(records: Records) -> dict[str, str]:
    """Returns what algorithms passed over, with what was not finite there."""
    return {what: why for record in records.values() for what, why in record.get("skipped", {}).items()}


def _dead_inputs(records: Records) -> dict[str, Any]:
    """Returns what calibration never moved: inputs of solved weights by weight, and activations with a static scale."""
    weights = {name: count for record in records.values() for name, count in record["dead_inputs"].items()}
    return {"weights": weights, "activations": [key for record in records.values() for key in record["silent"]]}


def part_warnings(records: Records) -> list[str]:
    """Returns warnings about all parts together: inputs that calibration never moved, values that are no numbers."""
    dead = _dead_inputs(records)
    weights, activations = dead["weights"], dead["activations"]
    found = []
    if weights:
        found.append(
            f"{sum(weights.values()):,} inputs of {len(weights)} weights were always zero in calibration "
            f"({some(weights, 3)}); their weights are rounded to nearest"
        )
    if activations:
        found.append(
            f"{len(activations)} activations with a static scale were always zero in calibration "
            f"({some(activations, 3)}); other text may exceed their range"
        )
    kinds = ([name for r in records.values() for name in r[kind]] for kind in ("nonfinite", "nonfinite_others"))
    return found + nonfinite.warnings(*kinds)


def _loss(records: Records) -> dict[str, Any]:
    weight_errors = {name: e for record in records.values() for name, e in record["weight_errors"].items()}
    errors = {name: e for name, record in records.items() if (e := record["output_error"]) is not None}
    return {
        "mean_output_error": fmean(errors.values()) if errors else None,
        "output_errors": errors,
        "mean_weight_error": fmean(weight_errors.values()) if weight_errors else None,
        "weight_errors": weight_errors,
        "tuning": {name: record["tuning"] for name, record in records.items() if record.get("tuning")},
    }


def _calibration(prepared: Prepared, data: CalibrationData | None) -> dict[str, Any] | None:
    if data is None or prepared.calibration is None:
        return None
    return {
        "source": data.source,
        "rows": len(data.tokens),
        "seqlen": data.tokens.shape[1],
        "tokens": data.token_count,
        "skipped": data.skipped,
        "digest": data.digest,
        "seed": prepared.calibration.seed,
        "moe": prepared.calibration.moe,
        "min_expert_tokens": prepared.calibration.min_expert_tokens,
        "chat_template": str(prepared.options.chat_template) if prepared.options.chat_template else None,
        "bos": {"asked": prepared.calibration.bos, "tokens": data.prefix},
    }
