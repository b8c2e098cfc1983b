"""A clock for a busy machine."""

from __future__ import annotations

import resource
import time


def processor_seconds() -> float:
    """Returns seconds of processors, of this process and its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
