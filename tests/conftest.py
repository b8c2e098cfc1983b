"""What every session keeps for `tests/test_suite.py`, and what its summary lists."""

from __future__ import annotations

from typing import Any

import pytest

OWN_FAILURE = "fails without quark"  # of a model, in transformers alone; a property of the tests that expect it
COLLECTED = pytest.StashKey[list[pytest.Item]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before -m and -k take some away."""
    config.stash[COLLECTED] = list(items)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The models that transformers cannot run, each once."""
    passed = terminalreporter.getreports("passed")
    found = sorted({value for report in passed for key, value in report.user_properties if key == OWN_FAILURE})
    if found:
        import transformers

        terminalreporter.section(
            f"fail in transformers {transformers.__version__} itself, and in quark with exit code 4"
        )
        for line in found:
            terminalreporter.write_line(line)
