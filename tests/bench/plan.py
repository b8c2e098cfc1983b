"""Seconds of processor time that a plan for DeepSeek-V3's real shapes takes (headers only); the goal is under 5.

python -m tests.bench.plan
"""

from __future__ import annotations

import time
from typing import Any

from tests.plan.test_scale import prepared

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "data-free": ("mxfp4", {}),
    "static inputs": ("nvfp4", {}),
    "patterns with numbers": ("mxfp4", {"exclude": ["*layers.3.*"], "layers": ["*layers.6?.*down_proj=fp8"]}),
}


def main() -> None:
    print("| plan of DeepSeek-V3 | best of 2, s | weights |\n|---|---|---|")
    for name, (scheme, flags) in CASES.items():
        taken = []
        for _ in range(2):
            started = time.process_time()
            _, plan, _, _ = prepared(scheme, **flags)
            taken.append(time.process_time() - started)
        print(f"| {name} | {min(taken):.2f} | {sum(1 for _ in plan.quantized()):,} |", flush=True)


if __name__ == "__main__":
    main()
