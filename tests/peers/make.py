"""Makes the checkpoints of other tools in `tests/data/peers`, each with the interpreter of an environment that has it.

    PYTHONPATH=. ENV/bin/python -m tests.peers.make llmcompressor [NAME ...]

Without names, all of a tool are made. `TOOLS` says what each needs.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import traceback
from pathlib import Path

TOOLS = {
    "llmcompressor": "pip install llmcompressor",
}
DATA = Path(__file__).parents[1] / "data" / "peers"


def main(tool: str, names: list[str]) -> int:
    """Makes the checkpoints of one tool. Returns how many failed."""
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(f"tests.peers.{tool}")
    failed = 0
    for name in names or list(module.CASES):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                module.make(name, Path(scratch), DATA / f"{tool}-{name}")
            except Exception:
                traceback.print_exc()
                print(f"{tool}-{name}: not made", file=sys.stderr)
                failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]) > 0)
