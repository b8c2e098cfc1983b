"""Seconds of processor time that a plan for DeepSeek-V3's real shapes takes (headers only); the goal is under 5.

python -m tests.bench.plan
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from quarkcli.job import run as job
from quarkcli.job.options import Options
from quarkcli.plan.model import Plan
from tests.plan.test_scale import prepared, published

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "data-free": ("mxfp4", {}),
    "static inputs": ("nvfp4", {}),
    "patterns with numbers": ("mxfp4", {"exclude": ["*layers.3.*"], "layers": ["*layers.6?.*down_proj=fp8"]}),
}
# The whole of step 1 to 4 on the files as they were published, in fp8 with scales: 91,991 tensors.
PUBLISHED = {"fp8 source, data-free": "mxfp4", "fp8 source, static inputs": "nvfp4"}


def main() -> None:
    print("| plan of DeepSeek-V3 | best of 2, s | weights |\n|---|---|---|")
    for name, (scheme, flags) in CASES.items():
        _row(name, lambda scheme=scheme, flags=flags: prepared(scheme, **flags)[1])
    source = published(Path.cwd())
    for name, scheme in PUBLISHED.items():
        with mock.patch.object(job, "open_source", lambda *given: source):
            _row(name, lambda scheme=scheme: job.prepare(Options("", scheme=scheme, calib_data="builtin")).plan)


def _row(name: str, make: Callable[[], Plan]) -> None:
    taken = []
    for _ in range(2):
        started = time.process_time()
        plan = make()
        taken.append(time.process_time() - started)
    print(f"| {name} | {min(taken):.2f} | {sum(1 for _ in plan.quantized()):,} |", flush=True)


if __name__ == "__main__":
    main()
