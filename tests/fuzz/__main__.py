"""`python -m tests.fuzz --seed N --seconds S`; one case again: `--seed N --first NUMBER --count 1`."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz import faults_on_disk
from tests.fuzz.campaign import campaign
from tests.fuzz.cases import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--only", choices=KINDS, default="", help="cases of one kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=10**9)
    given = parser.parse_args()
    disk = not given.only and given.count > 10**6
    problems, counts = campaign(
        given.seed, given.seconds * (0.8 if disk else 1), given.only, given.first, given.count
    )  # fmt: skip
    for kind in KINDS:
        codes = {code: count for (name, code), count in sorted(counts.items()) if name == kind}
        if codes:
            print(f"{kind:20} " + ", ".join(f"exit {code}: {count}" for code, count in codes.items()))
    if disk:
        found = faults_on_disk.campaign(given.seed, given.seconds * 0.2)
        print("\n".join([*found, f"faults of the file system: {len(found)} problems"]))
        problems += found
    print(f"seed {given.seed}: {sum(counts.values())} cases, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
