"""Environments of their own: `lock` writes constraints.txt, `newest` and `oldest` run the suite on other releases.

Each lies in a temporary folder that goes away with the program, also after a failure. Standard library only: it runs
before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
# Held below the newest release, in the lock.
HELD = (
    "torch==2.13.0",  # the last whose CPU build is small; the newest ones come with gigabytes of CUDA
    "triton==3.7.1",  # what the CUDA builds of that torch ask for by number
    "transformers==5.23.*",  # the last on which every family runs: Llama 4's own forward fails on 5.24
)
# Tests on other releases keep this torch: 2.9, the oldest allowed, is to be had as a CUDA build of gigabytes only.
TORCH = HELD[0]
MARKERS = {"triton": "sys_platform == 'linux'"}
HEADER = """\
# The releases that `make setup` installs, direct and indirect, written by `make lock`. pyproject.toml holds the
# supported ranges; `make test-latest` tries their ends.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["lock", "newest", "oldest"])
    what = parser.parse_args().what
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder goes away then, too
    with tempfile.TemporaryDirectory(prefix="quark-releases-") as folder:
        python = environment(Path(folder), {"lock": HELD, "newest": (TORCH,), "oldest": oldest()}[what])
        frozen = freeze(python)
        if what == "lock":
            LOCK.write_text(HEADER + "".join(f"{line}\n" for line in frozen), encoding="utf-8")
            return 0
        print(f"{what} releases, Python {sys.version.split()[0]}:", *frozen, sep="\n  ", flush=True)
        suite = [python, "-m", "pytest", "-m", "not gpu and not slow", "-n", "2"]
        return subprocess.run(suite, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def environment(folder: Path, pins: tuple[str, ...]) -> str:
    """The Python of a new environment in `folder` with quark, its development tools and these releases."""
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    python = str(folder / "env" / "bin" / "python")
    (folder / "pins.txt").write_text("".join(f"{pin}\n" for pin in pins))
    # Not -q, which hides which two releases are in conflict.
    install = [python, "-m", "pip", "install", "--progress-bar", "off", "-c", folder / "pins.txt", "--upgrade"]
    for wanted in (["pip"], ["torch"], ["-e", f"{ROOT}[dev]"]):
        subprocess.run([*install, *wanted], check=True)
    return python


def freeze(python: str) -> list[str]:
    """What is installed but quark itself, as lines of a constraints file that name no machine and no build."""
    command = [python, "-m", "pip", "list", "--format=freeze", "--exclude-editable"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return [locked(line) for line in sorted(listed, key=lambda line: line.lower().split("=="))]


def locked(line: str) -> str:
    """`torch==2.13.0+cpu` without the build, and with the platforms that have it."""
    name, _, version = line.partition("==")
    marker = MARKERS.get(name)
    return f"{name}=={version.split('+')[0]}" + (f" ; {marker}" if marker else "")


def oldest() -> tuple[str, ...]:
    """The lower bound of every direct dependency as a pin; torch stays."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    bounds = [found for text in direct if (found := re.match(r"([\w-]+)>=([\w.]+)", text))]
    return (*(f"{name}=={version}" for name, version in (bound.groups() for bound in bounds) if name != "torch"), TORCH)


if __name__ == "__main__":
    sys.exit(main())
