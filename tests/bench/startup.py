"""Processor time of `quark --help` and the list commands, as whole processes, over `python -c pass` of the same round.

python -m tests.bench.startup [--must]    with --must: fails where a command takes longer than it may
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

ROUNDS = 7
BARE = [sys.executable, "-c", "pass"]
QUARK = [sys.executable, "-c", "from quarkcli.cli.main import run; run()"]
# Command -> seconds that it may take over a bare Python.
MUST = {
    "--help": 0.15,
    "quantize --help": 0.15,
    "recipes list": 0.25,
    "schemes list": 0.25,
    "models list": 0.25,
    "algorithms list": 0.25,
}
OTHERS = ("plan --model demo --scheme mxfp4",)


def seconds(command: list[str]) -> tuple[float, float]:
    """Returns processor time and wall time of a process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - started


def main() -> None:
    commands = {name: [*QUARK, *name.split()] for name in (*MUST, *OTHERS)}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(ROUNDS + 1):
        for name, command in commands.items():
            bare, used = seconds(BARE), seconds(command)
            if number:  # the first round warms the page cache
                taken[name].append((used[0] - bare[0], used[1] - bare[1]))
    print("| command | processor s over bare Python, median | wall s over it, median | must |\n|---|---|---|---|")
    late = []
    for name, pairs in taken.items():
        used, wall = (statistics.median(values) for values in zip(*pairs, strict=True))
        must = MUST.get(name)
        print(f"| `quark {name}` | {used:.3f} | {wall:.3f} | {must or '-'} |")
        late += [name] if must is not None and used > must else []
    if late and "--must" in sys.argv[1:]:
        sys.exit(f"too slow: {', '.join(late)}")


if __name__ == "__main__":
    main()
