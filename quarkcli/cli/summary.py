"""Shows the report of a finished run: lines for the terminal, and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quarkcli.cli import output
from quarkcli.plan import advice
from quarkcli.plan.online import sentences
from quarkcli.plan.words import reason
from quarkcli.recipe.advice import AUTO
from quarkcli.reporting import losses, outcomes
from quarkcli.reporting.log import duration

Rows = list[tuple[str, str]]


def lines(
    reports: Mapping[str, Mapping[str, Any]], next_commands: Sequence[str], remarks: Sequence[str] = ()
) -> list[str]:
    """Returns the end of a run: the work, its cost, the kept modules, the commands to run next.

    reports   of each directory that was written, by its path
    remarks   see `job.bulk`
    """
    first = next(iter(reports.values()))
    rows = _advice(first) + _facts(first, reports) + output.listed("kept", [*remarks, *_kept(first)])
    rows += output.listed("checked", [line for report in reports.values() for line in _checks(report, reports)])
    warnings = dict.fromkeys(warning for report in reports.values() for warning in report["warnings"])
    return output.pairs(rows + output.listed("warning", list(warnings)) + output.listed("next", next_commands))


def _checks(report: Mapping[str, Any], reports: Mapping[str, Any]) -> list[str]:
    lead = f"{report['dialect']['name']}: " if len(reports) > 1 else ""
    return [f"{lead}{check}" for check in report["checks"]]


def markdown(report: Mapping[str, Any]) -> str:
    """Returns the whole report as Markdown."""
    text = [f"# {_title(report)}", "", "| | |", "|---|---|"]
    text += [f"| {label} | {value.replace('|', '/')} |" for label, value in _labelled(_rows(report))]
    for title, items in _sections(report).items():
        text += ["", f"## {title}", "", *(f"- {item}" for item in items)]
    return "\n".join(text)


def screen(report: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yields the whole report for a terminal: lines, and whether one is a heading."""
    yield _title(report), True
    for line in output.pairs(_rows(report)):
        yield line, False
    for title, items in _sections(report).items():
        yield "", False
        yield title, True
        for item in items:
            yield f"- {item}", False


def _title(report: Mapping[str, Any]) -> str:
    return f"{report['model']['name']}, {report['recipe']['name']}"


def _rows(report: Mapping[str, Any]) -> Rows:
    model, dialect = report["model"], report["dialect"]
    commit = f" at commit {model['commit']}" if model["commit"] else ""
    return [
        *_state(report["state"]),
        ("model", f"{model['path']}{commit}, family {model['family']}"),
        *output.listed("source", (report.get("source") or {}).get("said", [])),
        ("recipe", report["recipe"]["name"]),
        ("algorithms", ", ".join(report["algorithms"])),
        *_advice(report),
        ("dialect", f"{dialect['name']} ({dialect['reason']})"),
        *output.listed("at run time", sentences(report.get("online") or {})),
        *_specs(report),
        *_facts(report, {"": report}),
    ]


def _sections(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the lists of a report by their titles, those that are empty left out."""
    loss = report["loss"]
    worst = {key: [f"{k}: {e:.4g}" for k, e in losses.worst(loss[f"{key}_errors"], 10)] for key in ("output", "weight")}
    found = {
        "Rules that decided": _rules(report["decided_by"]),
        "Kept in the original precision": _kept(report),
        "Fused tensors written as several": [f"{k}: {v} weights" for k, v in report["split"].items()],
        "Largest output errors of blocks": worst["output"],
        "Largest weight errors": worst["weight"],
        "Warnings": report["warnings"],
        "Checks": report["checks"],
    }
    return {title: texts for title, texts in found.items() if texts}


def _state(state: Mapping[str, Any]) -> Rows:
    """Returns how far a run is that has not finished."""
    return (
        []
        if state["finished"]
        else [("state", f"unfinished: {state['parts']} of {state['of']} parts of the model are done")]
    )


def _rules(decided: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        f"{origin}: " + ", ".join(f"{count} quantizers {state}" for state, count in counts.items() if count)
        for origin, counts in decided.items()
    ]


def _specs(report: Mapping[str, Any]) -> Rows:
    """Returns what was quantized in the words of specs; the table of a run says it in plain ones."""
    return [
        *output.listed("modules", [f"{count} x {what}" for what, count in report["modules_by_scheme"].items()]),
        *output.listed("cache", [f"{count} x {what}" for what, count in report["attention_by_scheme"].items()]),
        *output.listed("shared", [f"{count} x one scale: {group}" for group, count in report["shared_scales"].items()]),
    ]


def _facts(report: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Returns rows of a report. `reports`: those of the same run in other dialects as well, by their directories."""
    size = report["size"]
    total = sum(size["bytes_by_dtype"].values()) or 1
    shares = ", ".join(f"{dtype} {_share(count / total)}" for dtype, count in size["bytes_by_dtype"].items() if count)
    gpu = f", GPU {output.size(report['peak_gpu_bytes'])}" if report["peak_gpu_bytes"] else ""
    return [
        *output.listed("size", [_size(one, path if len(reports) > 1 else "") for path, one in reports.items()]),
        ("bits", f"{size['effective_bits']:.2f} per quantized weight, scales included"),
        *([("bytes", shares)] if len(reports) == 1 else []),
        *_experts(report["experts"]),
        *_calibration(report["calibration"]),
        *losses.rows(report),
        *_exact(report.get("exact") or {}),
        *output.listed("solved", outcomes.sentences(report["outcomes"]) if report.get("outcomes") else []),
        ("peak", f"RAM {output.size(report['peak_rss_bytes'])}{gpu}"),
        ("time", f"{_time(report['seconds'])} on {report['device']}{_threads(report)}"),
    ]


def _share(part: float) -> str:
    return f"{part:.1%}" if part >= 0.0005 else "under 0.1%"


def _size(report: Mapping[str, Any], path: str) -> str:
    size = report["size"]
    if not report["state"]["finished"]:
        source, planned, done = (output.size(size[f"{which}_bytes"]) for which in ("source", "planned", "output"))
        return f"{source} -> {planned} planned; {done} written so far"
    share = size["output_bytes"] / size["source_bytes"] if size["source_bytes"] else 0.0
    text = f"{output.size(size['source_bytes'])} -> {output.size(size['output_bytes'])} ({share:.0%})"
    return f"{text} in {path}" if path else text


def _advice(report: Mapping[str, Any]) -> Rows:
    """Returns what the algorithm `auto` stood for. Reports of earlier versions do not say."""
    return output.listed(f"{AUTO} chose", [advice.text(choice) for choice in report.get("advice") or ()])


def _threads(report: Mapping[str, Any]) -> str:
    """Returns the threads of a run on a CPU. Reports of earlier versions do not say."""
    count = report.get("threads") if report["device"] == "cpu" else None
    return f", {count} thread{'s' if count > 1 else ''}" if count else ""


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _experts(experts: Mapping[str, Any]) -> Rows:
    share = experts["share_quantized"]
    return [("experts", f"{share:.1%} of {experts['parameters']:,} parameters quantized")] if share is not None else []


def _calibration(settings: Mapping[str, Any] | None) -> Rows:
    if settings is None:
        return [("data", "none needed")]
    return [("data", f"{settings['rows']} rows of {settings['seqlen']} tokens from {settings['source']}")]


def _exact(blocks: Mapping[str, int]) -> Rows:
    """Returns how many weights kept every value, being codes times powers of two. Earlier reports do not say."""
    if not blocks:
        return []
    rounded = [count for count in blocks.values() if count]
    kept = f"{len(blocks) - len(rounded)} of {len(blocks)} weights keep every value: they are codes times powers of two"
    return [("exact", kept + (f"; {sum(rounded)} blocks of the others are rounded" if rounded else ""))]


def _kept(report: Mapping[str, Any]) -> list[str]:
    return [f"{count} x {reason(text)}" for text, count in report["kept_reasons"].items()]


def _labelled(rows: Rows) -> Rows:
    """Returns every row with its label, for a table in which rows stand alone."""
    out: Rows = []
    for label, text in rows:
        out.append((label or out[-1][0], text))
    return out
