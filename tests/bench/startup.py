"""Time of `quark --help` and the list commands, as whole processes, next to `python -c pass`.

python -m tests.bench.startup
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

QUARK = [sys.executable, "-c", "from quarkcli.cli.main import run; run()"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "quark --help": [*QUARK, "--help"],
    "quark recipes list": [*QUARK, "recipes", "list"],
    "quark schemes list": [*QUARK, "schemes", "list"],
    "quark plan --model demo --scheme mxfp4": [*QUARK, "plan", "--model", "demo", "--scheme", "mxfp4"],
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    print("| command | median s | best s |\n|---|---|---|")
    for name, command in COMMANDS.items():
        seconds(command)  # warm the page cache
        runs = [seconds(command) for _ in range(5)]
        print(f"| `{name}` | {statistics.median(runs):.2f} | {min(runs):.2f} |", flush=True)


if __name__ == "__main__":
    main()
