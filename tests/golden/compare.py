"""Calibrated runs of two trees on this machine, compared by the hashes of what they wrote: `make golden BASE=<commit>`.

    python -m tests.golden.compare BASE

Matrix products round differently on other machines and releases, so these have no table. BASE is checked out into a
temporary git worktree; both trees run the same command lines. Ends with 1 when a run differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

from quarkcli.disk.embedded import EMBEDDED
from tests.golden import sources
from tests.golden.table import digest, hash_tensors

ROOT = Path(__file__).resolve().parents[2]
ASKED = {
    "gptq int4": ["--scheme", "int4_wo_32", "--algorithm", "gptq"],
    "gptq nvfp4": ["--scheme", "nvfp4", "--algorithm", "gptq"],
    "gptq mxfp4": ["--scheme", "mxfp4", "--algorithm", "gptq"],
    "static fp8": ["--scheme", "fp8"],
    "static nvfp4": ["--scheme", "nvfp4"],
    "kv fp8": ["--scheme", "mxfp4", "--kv-cache", "fp8"],
}
DATA = [
    "--calib-data", "builtin", "--calib-samples", "16", "--calib-seqlen", "64", "--device", "cpu", "--resume", "never",
    "--quiet",
]  # fmt: skip
# Runs command lines in one process; the first argument is where quarkcli has to come from.
PROGRAM = """
import json, sys, quarkcli
from pathlib import Path
assert Path(quarkcli.__file__).is_relative_to(sys.argv[1]), quarkcli.__file__
from quarkcli.cli.main import main
print(json.dumps([main(arguments) for arguments in json.load(sys.stdin)]))
"""
Run = tuple[str, list[str]]
Hashes = dict[str, dict[str, str] | str]


def build_models(folder: Path) -> dict[str, str]:
    vocabulary = json.loads((EMBEDDED / "config.json").read_text())["vocab_size"]
    return {"demo": "demo"} | {
        name: str(sources.build(name, folder / "models" / name, vocabulary)) for name in sources.SOURCES
    }


def runs(models: dict[str, str]) -> list[Run]:
    return [
        (f"{model}, {what}", ["quantize", "--model", source, *asked, *DATA])
        for model, source in models.items()
        for what, asked in ASKED.items()
    ]


def hashes(tree: Path, wanted: Iterable[Run], out: Path) -> Hashes:
    """Run -> hash per tensor and of the config, or the exit code of a run that failed."""
    wanted = list(wanted)
    folders = [out / str(number) for number in range(len(wanted))]
    commands = [[*arguments, "--output", str(folder)] for (_, arguments), folder in zip(wanted, folders, strict=True)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tree)],
        input=json.dumps(commands), stdout=subprocess.PIPE, text=True, check=True, cwd=tree, env=environment,
    )  # fmt: skip
    codes = json.loads(done.stdout.splitlines()[-1])
    return {
        name: _hashes(folder) if code == 0 else f"exit {code}"
        for (name, _), folder, code in zip(wanted, folders, codes, strict=True)
    }


def _hashes(folder: Path) -> dict[str, str]:
    found = {
        name: hash_tensors({name: tensor})
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found | {"quantization_config": digest(config)}


def differences(base: Hashes, here: Hashes) -> Iterator[str]:
    """One line per run that differs, with how much of it."""
    for name in base:
        before, after = base[name], here[name]
        if before == after:
            continue
        if isinstance(before, str) or isinstance(after, str):
            yield f"{name}: {_outcome(before)} -> {_outcome(after)}"
            continue
        other = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        shown = ", ".join(other[:3]) + (" ..." if len(other) > 3 else "")
        yield f"{name}: {len(other)} of {len(before.keys() | after.keys())} differ: {shown}"


def _outcome(row: dict[str, str] | str) -> str:
    return row if isinstance(row, str) else "exit 0"


@contextmanager
def checked_out(base: str, folder: Path) -> Iterator[Path]:
    """A git worktree of a commit, removed afterwards."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), base], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: make golden BASE=<commit>")
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        wanted = runs(build_models(folder))
        with checked_out(sys.argv[1], folder / "base") as tree:
            before = hashes(tree, wanted, folder / "before")
        after = hashes(ROOT, wanted, folder / "after")
    found = list(differences(before, after))
    print("\n".join(found))
    print(f"{len(wanted) - len(found)} of {len(wanted)} calibrated runs equal to those of {sys.argv[1]}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
