"""The peak that reports carry is of this program alone."""

import gc
import subprocess
import sys

import numpy as np
import pytest

from quarkcli import memory

PEAK = "from quarkcli import memory; print(memory.peak_rss())"
GROW = "import numpy; a = numpy.ones(40_000_000);"  # 320 MB


def _peak(code: str) -> int:
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_peak_rss_follows_what_is_held() -> None:
    alone = _peak(PEAK)
    assert 2**22 < alone < 2**28
    assert 320e6 < _peak(GROW + PEAK) < alone + 450e6
    assert _peak(GROW + "del a;" + PEAK) > 320e6  # a peak stays one


def test_peak_rss_does_not_count_the_process_that_started_it() -> None:
    held = np.ones(40_000_000)
    assert _peak(PEAK) < held.nbytes


def test_collection_is_put_off_by_a_process_of_its_own_and_by_nobody_else() -> None:
    frozen = gc.get_freeze_count()
    memory.collect()  # nobody put it off
    assert gc.isenabled() and gc.get_freeze_count() == frozen
    memory.collect_later()
    try:
        assert not gc.isenabled()
        memory.collect()
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is on Linux alone")
def test_a_process_that_had_triton_ends_without_a_word() -> None:
    code = "from quarkcli import memory; memory.collect_later(); import triton.language; memory.collect()"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout + made.stderr == ""
