"""Runs the tests that need a GPU, within 8 minutes, and keeps the result in docs/gpu.json.

python -m tests.gpu.record [--out FILE] [--seconds 450] [-- pytest arguments]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "docs" / "gpu.json"


def keep(file: Path, key: str, value: dict[str, Any]) -> None:
    """Puts a result into the file; other results stay."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**known, key: value}, indent=1) + "\n", encoding="utf-8")


def run(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Returns counts of passed, failed and skipped tests, and the names of those that failed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={xml}", *arguments]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            return {"in_time": False, "seconds": time.monotonic() - started}
        found = counts(xml.read_text(encoding="utf-8")) if xml.is_file() else {}
    return {"in_time": True, "code": code, "seconds": time.monotonic() - started, **found}


def counts(xml: str) -> dict[str, Any]:
    cases = list(ElementTree.fromstring(xml).iter("testcase"))
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases
              if case.find("failure") is not None or case.find("error") is not None]  # fmt: skip
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=GPU)
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument("arguments", nargs="*", help="of pytest")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not args.arguments:
        raise SystemExit("no CUDA device: the tests would all be skipped")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = run(args.arguments or ["-m", "gpu"], args.seconds)
    keep(args.out, "tests", {"device": device, "torch": torch.__version__, **found})
    raise SystemExit(found.get("code", 1))


if __name__ == "__main__":
    main()
