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

# What a tool's environment needs; releases are those of the last time, in every `peer.json`.
TOOLS = {
    "llmcompressor": "pip install llmcompressor==0.14.0",
    "modelopt": "pip install nvidia-modelopt==0.47.0 transformers accelerate",
    "amdquark": "pip install amd-quark==0.13 torch transformers accelerate scipy onnx evaluate ...",
    "autoawq": "pip install --no-deps autoawq==0.2.9, beside torch and transformers 5",
    "published": "nothing: the project itself",
    "gptqmodel": "pip install --no-deps gptqmodel==7.7.0, then what it asks for, beside torch and transformers 5",
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
