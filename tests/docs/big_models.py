"""Writes the forecasts of docs/big_models.md: what `quark plan --gpu --ranks` says of large models.

python -m tests.docs.big_models
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from quarkcli.cli import output
from quarkcli.cli.predictview import duration
from quarkcli.job import predict, rates
from quarkcli.job import run as job
from quarkcli.job.options import Options, Prepared
from tests.bench import published

PAGE = Path(__file__).resolve().parents[2] / "docs" / "big_models.md"
BEGIN, END = "<!-- forecasts: begin -->", "<!-- forecasts: end -->"
ROWS = {"calib_samples": 128, "calib_seqlen": 2048}
JOBS: dict[str, dict[str, Any]] = {
    "nvfp4 weights, data-free": {"scheme": "nvfp4_weight_only"},
    "nvfp4, static inputs": {"scheme": "nvfp4", **ROWS},
    "int4 g128, gptq": {"scheme": "int4_wo_128", "algorithm": "gptq", **ROWS},
}
# 2,880 inputs are no multiple of 128.
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt-oss-120b": {"int4 g32, gptq": {"scheme": "int4_wo_32", "algorithm": "gptq", **ROWS}}
}
DEVICES = (("h100", 1), ("h100", 8), ("mi300x", 8))


def prepared(name: str, folder: Path, settings: dict[str, Any]) -> Prepared:
    source = published.source(name, folder)
    with mock.patch.object(job, "open_source", lambda *given: source):
        return job.prepare(Options("", calib_data="builtin" if "calib_samples" in settings else None, **settings))


def jobs(name: str) -> dict[str, dict[str, Any]]:
    replaced = OTHERS.get(name, {})
    kept = {job: settings for job, settings in JOBS.items() if not (replaced and "g128" in job)}
    return kept | replaced


def table(folder: Path, names: Iterable[str] = published.MODELS) -> Iterator[str]:
    yield "| model | job | devices | time | reads | writes | host memory | device memory | disk of a rank |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in names:
        for job_name, settings in jobs(name).items():
            plan = prepared(name, folder, settings)
            for gpu, ranks in DEVICES:
                yield f"| {name} | {job_name} | {ranks} x {gpu} | {_cells(plan, gpu, ranks)} |"


def _cells(plan: Prepared, gpu: str, ranks: int) -> str:
    found = predict.of_plan(plan, rates.of_gpu(gpu), ranks)
    device = max(rank.device or 0 for rank in found.ranks)
    full = "" if found.fits else f" of {output.size(found.rates.memory or 0)}: too small"
    read, written = plan.forecast.source_bytes, sum(rank.written for rank in found.ranks)
    return (
        f"{duration(found.time)} | {output.size(read)} | {output.size(written)} | "
        f"{output.size(max(rank.host for rank in found.ranks))} | {output.size(device)}{full} | "
        f"{output.size(max(rank.disk for rank in found.ranks))}"
    )


def page(text: str, lines: list[str]) -> str:
    """Returns the page with the lines between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = list(table(Path(folder)))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main()
