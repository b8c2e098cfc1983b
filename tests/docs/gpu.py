"""Writes what a GPU did into docs/benchmarks.md, from docs/gpu.json; without that file, the page says so.

python -m tests.docs.gpu
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gpu.record import GPU

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
GOALS = {"copy": 0.8, "floor": 3, "must": 6}
NONE = (
    "Nothing has been run on a GPU yet, because none was at hand. `make test-gpu` and `make bench-gpu` take at most 8 "
    "minutes each\non one device and write `docs/gpu.json`, from which this section is made. On a CPU a test runs the "
    "same script at small sizes,\nunder Triton's interpreter."
)  # fmt: skip


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yields the section for what docs/gpu.json holds."""
    bench, tests = found.get("bench"), found.get("tests")
    if tests is not None:
        yield _tests(tests)
        yield ""
    if bench is None:
        return
    yield f"{bench['device']}, torch {bench['torch']}, commit {bench['commit']}, {bench['date']}."
    if bench["small"]:
        yield "Sizes that measure nothing: the figures only show that the script runs."
    if bench["left_out"]:
        yield f"There was no time for: {', '.join(bench['left_out'])}."
    for name, error in bench["errors"].items():
        yield f"Failed: {name}: {error}"
    if "bandwidth" in bench:
        yield from _kernels(bench)
    jobs = {name: bench[name] for name in ("data_free", "gptq") if name in bench}
    if jobs:
        yield from _jobs(jobs)


def _tests(found: dict[str, Any]) -> str:
    if not found["in_time"]:
        return f"Tests on {found['device']}: not done after {found['seconds']:.0f} s."
    failed = f"; failed: {', '.join(found['failed'])}" if found.get("failed") else ""
    counts = f"{found.get('passed', 0)} passed, {found.get('skipped', 0)} skipped{failed}"
    return f"Tests on {found['device']} (torch {found['torch']}): {counts}, in {found['seconds']:.0f} s."


def _kernels(bench: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"A copy moves {bench['bandwidth']['copy'] / 1e9:.2f} GB/s. Shares of it (goal {GOALS['copy']:.0%}):"
    yield ""
    yield "| kernel | bits of the reference | quantize and pack | decode | fake |"
    yield "|---|---|---|---|---|"
    for name, shares in bench["bandwidth"]["shares"].items():
        equal = {True: "equal", False: "**not equal**", None: "-"}[bench.get("equal", {}).get(name)]
        yield f"| {name} | {equal} | " + " | ".join(f"{shares[k]:.0%}" for k in ("quantize", "decode", "fake")) + " |"


def _jobs(jobs: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield ""
    yield "| job | seconds | GB/s | seconds per block | of the floor | device memory | forecast |"
    yield "|---|---|---|---|---|---|---|"
    for name, job in jobs.items():
        what = {"data_free": "nvfp4 weights, data-free", "gptq": "int4 g128, gptq, 32 x 2048"}[name]
        rate = f"{job['rate'] / 1e9:.3f}" if job.get("rate") else "-"
        block = f"{job['block_seconds']:.2f}" if job["block_seconds"] is not None else "-"
        times = job.get("times_the_floor")
        of_floor = f"{times:.1f} (goal {GOALS['floor']}, must {GOALS['must']})" if times is not None else "-"
        whole = f"{job['seconds']:.1f}" + ("" if job["whole"] else ", not done")
        memory = f"{job['peak_device'] / 1e9:.2f} GB | {job['forecast_device'] / 1e9:.2f} GB"
        yield f"| {what} | {whole} | {rate} | {block} | {of_floor} | {memory} |"


def page(text: str, file: Path) -> str:
    """Returns the page with its section anew."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    body = "\n".join(lines(found)).strip() or NONE
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{body}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), GPU), encoding="utf-8")


if __name__ == "__main__":
    main()
