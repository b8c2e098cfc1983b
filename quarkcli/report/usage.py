"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys


def peak_rss() -> int:
    """Peak resident bytes of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu(device: str) -> int:
    """Peak bytes allocated on the device; 0 on a CPU."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.max_memory_allocated()
