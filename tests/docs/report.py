"""Writes quarkcli/assets/report.schema.json: python -m tests.docs.report."""

from __future__ import annotations

import json
from pathlib import Path

from quarkcli.documents.report import json_schema

PATH = Path(__file__).resolve().parents[2] / "quarkcli" / "assets" / "report.schema.json"

if __name__ == "__main__":
    PATH.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
