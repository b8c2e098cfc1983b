"""report.json (schema `quark/report/2`) and the model card."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quarkcli import __version__, memory
from quarkcli.disk import nonfinite
from quarkcli.errors import some
from quarkcli.plan.model import Plan
from quarkcli.plan.online import sentences
from quarkcli.plan.sizes import expert_share
from quarkcli.recipe.match import starred
from quarkcli.report import losses
from quarkcli.report.alike import folded
from quarkcli.report.outcomes import outcomes

if TYPE_CHECKING:
    from quarkcli.dialects.base import Writer
    from quarkcli.forward.data import CalibrationData
    from quarkcli.job.options import Prepared

SCHEMA = "quark/report/2"
_FRONT = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_LICENCE = ("license", "license_name", "license_link")
_NO_BREAKS = 1 << 20  # the width up to which YAML keeps a text on its line


def build(
    prepared: Prepared,
    data: CalibrationData | None,
    records: dict[str, dict[str, Any]],
    checks: list[str],
    seconds: float,
    device: str,
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns the report of a finished run.

    records      per part, as the journal keeps them
    evaluation   see `job.judging.measured`
    """
    plan = prepared.plan
    of_parts = folded(warning for record in records.values() for warning in record["warnings"])
    return {
        "schema": SCHEMA,
        "quark_version": __version__,
        "model": _model(prepared),
        "source": prepared.origin.facts(plan) if prepared.origin is not None else None,
        "recipe": {"name": prepared.recipe.name, "file": prepared.recipe.file or None},
        "algorithms": [step.name for step in prepared.steps],
        "advice": [choice.as_dict() for choice in prepared.advice],
        "dialect": {"name": prepared.dialect.name, "reason": prepared.dialect_reason},
        "calibration": _calibration(prepared, data),
        "size": _size(prepared, records),
        "modules_by_scheme": modules_by_scheme(plan),
        "attention_by_scheme": attention_by_scheme(plan),
        "shared_scales": shared_scales(plan),
        "decided_by": decided_by(plan),
        "experts": _experts(plan, records),
        "loss": _loss(records),
        "evaluation": evaluation,
        "dead_inputs": _dead_inputs(records),
        "exact": _exact(records),
        "skipped": _skipped(records),
        "outcomes": outcomes(records.values()),
        "kept": plan.kept,
        "kept_reasons": dict(Counter(plan.kept.values()).most_common()),
        "changed": plan.changed,
        "added": [added.name for added in plan.added],
        "dropped": plan.dropped,
        "config_changes": plan.config_changes,
        "online": plan.online,
        "transforms": _transforms(records),
        "split": split_tensors(plan),
        "tied_head": plan.tied_head,
        "side_files_left_out": [name for names in prepared.side_files.left_out.values() for name in names],
        "warnings": list(dict.fromkeys([*prepared.warnings, *of_parts])),
        "checks": checks,
        "device": device,
        "threads": prepared.threads,
        "seconds": round(seconds, 2),
        "peak_rss_bytes": memory.peak_rss(),
        "peak_gpu_bytes": memory.peak_gpu(device),
    }


def _size(prepared: Prepared, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "source_bytes": prepared.forecast.source_bytes,
        "output_bytes": sum(file["size"] for r in records.values() for file in r["files"]),
        "effective_bits": round(prepared.forecast.effective_bits, 4),
        "bytes_by_dtype": prepared.forecast.dtypes,
    }


def _experts(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    quantized, experts = expert_share(plan)
    return {
        "parameters": experts,
        "quantized_parameters": quantized,
        "share_quantized": quantized / experts if experts else None,
        "calibration_tokens": {k: v for r in records.values() for k, v in r["expert_tokens"].items()},
    }


def _model(prepared: Prepared) -> dict[str, Any]:
    source = prepared.source
    return {
        "name": source.name,
        "path": str(source.folder) if source.hub_id is None else source.hub_id,
        "commit": source.commit,
        "family": prepared.plan.family,
        "architectures": source.config.get("architectures"),
    }


def _transforms(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns what each transform decided: transform -> part -> its notes."""
    found: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        for key, notes in record["transforms"].items():
            found.setdefault(key, {})[name] = notes
    return found


def _exact(records: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Returns the weights whose values their format holds, being codes times powers of two -> blocks of it rounded."""
    return {name: count for record in records.values() for name, count in record.get("exact", {}).items()}


def _skipped(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns what algorithms passed over, with what was not finite there."""
    return {what: why for record in records.values() for what, why in record.get("skipped", {}).items()}


def _dead_inputs(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what calibration never moved: inputs of solved weights by weight, and activations with a static scale."""
    weights = {name: count for record in records.values() for name, count in record["dead_inputs"].items()}
    return {"weights": weights, "activations": [key for record in records.values() for key in record["silent"]]}


def part_warnings(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns warnings about all parts together: inputs that calibration never moved, values that are no numbers."""
    dead = _dead_inputs(records)
    weights, activations = dead["weights"], dead["activations"]
    found = []
    if weights:
        found.append(
            f"{sum(weights.values()):,} inputs of {len(weights)} weights were zero in all of calibration "
            f"({some(weights, 3)}); their weights are rounded to nearest"
        )
    if activations:
        found.append(
            f"{len(activations)} activations with a static scale were zero in all of calibration "
            f"({some(activations, 3)}); other text may saturate them"
        )
    kinds = ([name for r in records.values() for name in r[kind]] for kind in ("nonfinite", "nonfinite_others"))
    return found + nonfinite.warnings(*kinds)


def _loss(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    weight_errors = {name: e for record in records.values() for name, e in record["weight_errors"].items()}
    errors = {name: e for name, record in records.items() if (e := record["output_error"]) is not None}
    return {
        "mean_output_error": sum(errors.values()) / len(errors) if errors else None,
        "output_errors": errors,
        "mean_weight_error": sum(weight_errors.values()) / len(weight_errors) if weight_errors else None,
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


def modules_by_scheme(plan: Plan) -> dict[str, int]:
    """Returns the count of weights per decision.

    A decision is `weight spec | input spec`, then output and bias if there are some, or `kept`.
    """
    counts: Counter[str] = Counter()
    for target in plan.targets.values():
        if target.weight is None:
            counts["kept"] += 1
            continue
        activation = target.input.describe() if target.input else "unquantized"
        more = "".join(
            f" | {kind} {spec.describe()}"
            for kind, spec in (("outputs", target.output), ("biases", target.bias_spec))
            if spec is not None
        )
        counts[f"weights {target.weight.describe()} | inputs {activation}{more}"] += 1
    return dict(counts.most_common())


def attention_by_scheme(plan: Plan) -> dict[str, int]:
    """Returns the count of enabled attention slots per spec."""
    counts: Counter[str] = Counter()
    for module in plan.attention.values():
        for kind, decision in module.slots.items():
            if decision.spec is not None:
                counts[f"{kind} {decision.spec.describe()}"] += 1
    return dict(counts.most_common())


def shared_scales(plan: Plan) -> dict[str, int]:
    """Returns the count of scale groups by name, `*` for the numbers in it: weights there share per-tensor scales."""
    return dict(Counter(starred(name) for name in plan.shared()))


def decided_by(plan: Plan) -> dict[str, dict[str, int]]:
    """Returns the effect of each rule: origin of an entry -> slots it switched on and off, being the last to match."""
    found: dict[int, dict[str, int]] = {}
    for _, decision in plan.slots():
        if decision.entry is not None:
            counts = found.setdefault(decision.entry, {"on": 0, "off": 0})
            counts["off" if decision.spec is None else "on"] += 1
    out: dict[str, dict[str, int]] = {}
    for index in sorted(found):
        counts = out.setdefault(str(plan.entries[index].origin), {"on": 0, "off": 0})
        for state, count in found[index].items():
            counts[state] += count
    return out


def split_tensors(plan: Plan) -> dict[str, int]:
    """Returns the source tensors that were written as several: fused experts -> count of weights."""
    counts: Counter[str] = Counter(
        target.view.tensor for target in plan.targets.values() if target.view.expert is not None
    )
    return {tensor: count for tensor, count in counts.items() if tensor not in plan.kept}


def card(prepared: Prepared, report: dict[str, Any]) -> str:
    """Returns README.md of the checkpoint: its contents, the way it was made and the way to serve it."""
    source = prepared.source
    base = source.hub_id or source.name
    calibration = report["calibration"]
    commit = f" at commit `{source.commit}`" if source.commit else ""
    front = {
        "base_model": base,
        "base_model_relation": "quantized",
        **licence(prepared.side_files.readme),
        "tags": ["quark", prepared.recipe.name, prepared.dialect.name],
    }
    lines = [
        "---",
        *yaml.safe_dump(front, sort_keys=False, allow_unicode=base.isprintable(), width=_NO_BREAKS).splitlines(),
        "---",
        "",
        f"# {source.name}, {prepared.recipe.name}",
        "",
        f"Quantized from `{base}`{commit} by quark {__version__}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| source | {text} |" for text in (report["source"] or {}).get("said", [])),
        f"| recipe | {prepared.recipe.name} |",
        f"| algorithms | {', '.join(report['algorithms'])} |",
        f"| dialect | {prepared.dialect.name} ({prepared.dialect_reason}) |",
        *(f"| while it runs | {text} |" for text in sentences(prepared.plan.online)),
        f"| effective bits per quantized weight | {report['size']['effective_bits']} |",
        f"| size | {report['size']['source_bytes']:,} -> {report['size']['output_bytes']:,} bytes |",
        *(f"| {label} | {text} |" for label, text in losses.rows(report)),
        f"| calibration | {calibration['source']}, {calibration['rows']} x {calibration['seqlen']} tokens |"
        if calibration
        else "| calibration | none needed |",
        "",
        "The resolved recipe, the report and the hashes of all files are in `quark/`.",
        "The licence of the source model applies.",
        "",
    ]
    if "vllm" in prepared.dialect.loaders(prepared.plan):
        lines += ["```", "vllm serve .", "```", ""]
    return "\n".join(map(_one_line, lines))


def licence(card: Path | None) -> dict[str, str]:
    """Returns what the front matter of a model card says of the licence; {} without one."""
    text = card.read_text(encoding="utf-8", errors="replace") if card is not None else ""
    found = _FRONT.match(text)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, RecursionError, ValueError):
        front = None
    front = front if isinstance(front, dict) else {}
    return {key: value for key in _LICENCE if isinstance(value := front.get(key), str)}


def card_of_conversion(
    facts: Mapping[str, Any], name: str, before: str, dialect: Writer, plan: Plan, card: Path | None
) -> str:
    """Returns README.md of a checkpoint that was converted.

    facts   what its manifest says of the model
    card    its own README.md
    """
    base = str(facts.get("hub_id") or facts.get("name") or name)
    front = {
        "base_model": base,
        "base_model_relation": "quantized",
        **licence(card),
        "tags": list(dict.fromkeys(["quark", dialect.name])),
    }
    schemes = (f"| {count} modules | {what.replace(' | ', '; ')} |" for what, count in modules_by_scheme(plan).items())
    lines = [
        "---",
        *yaml.safe_dump(front, sort_keys=False, allow_unicode=base.isprintable(), width=_NO_BREAKS).splitlines(),
        "---",
        "",
        f"# {name}, {dialect.name}",
        "",
        f"Quantized from `{base}`; converted from dialect {before} to {dialect.name} by quark {__version__}.",
        "Codes and scales are as they were.",
        "",
        "| | |",
        "|---|---|",
        *schemes,
        "",
        "The hashes of all files are in `quark/`, and the card of the checkpoint that was converted.",
        "The licence of the source model applies.",
        "",
    ]
    if "vllm" in dialect.loaders(plan):
        lines += ["```", "vllm serve .", "```", ""]
    return "\n".join(map(_one_line, lines))


def _one_line(text: str) -> str:
    """Returns a name on one line.

    A name from anywhere must not end the line that it stands in, nor steer a terminal.
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)
