"""A short campaign of file-system faults with every run of the slow tests."""

from __future__ import annotations

import pytest

from tests.fuzz.faults_on_disk import campaign


@pytest.mark.slow
def test_no_fault_of_the_file_system_ends_badly() -> None:
    assert campaign(seed=0, seconds=60) == []
