"""The settings of two runs are held against each other, and the hint says what helps."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from quarkcli.disk.state import compare
from quarkcli.errors import ConfigError
from quarkcli.job.fingerprint import fingerprint
from tests import runs


def test_a_model_that_was_copied_anew_can_have_its_old_dates_again(tmp_path: Path) -> None:
    """Its content may be the same, and hours of work wait."""
    source = runs.build("llama", tmp_path / "source")
    file = source / "model.safetensors"
    before = fingerprint(runs.prepare(source, scheme="mxfp4"), None, "cpu")
    os.utime(file, ns=(0, 1_700_000_000_000_000_007))
    now = fingerprint(runs.prepare(source, scheme="mxfp4"), None, "cpu")
    with pytest.raises(ConfigError, match=r"model\.files\.model\.safetensors\.date: ") as caught:
        compare(tmp_path / "out.partial", before, now)
    assert "run touch -d OLD FILE" in caught.value.hint
    date = before["model"]["files"]["model.safetensors"]["date"]
    subprocess.run(["touch", "-d", date, file], check=True)
    compare(tmp_path / "out.partial", before, fingerprint(runs.prepare(source, scheme="mxfp4"), None, "cpu"))


def test_other_settings_are_not_a_matter_of_dates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        compare(tmp_path, {"a.date": "@1", "b": 1}, {"a.date": "@2", "b": 2})
    assert "use the old settings" in caught.value.hint and "touch" not in caught.value.hint
