from __future__ import annotations

from collections.abc import Iterator

import pytest

from .interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    started = Interpreter()
    yield started
    started.close()
