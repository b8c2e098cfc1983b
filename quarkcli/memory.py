"""Measures the memory of this process, and sets the C allocator so that it gives buffers back."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGE = 8 << 20  # bytes
LARGE_IN_THREADS = 2 << 20  # of a part whose tensors come and go one by one; from here on torch takes large pages
KEPT = 64 << 20  # bytes at the end of the heap that are kept for what comes next
KERNELS = 32
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8  # <malloc.h>
_STATUS = Path("/proc/self/status")
_FIELDS = re.compile(rb"^(VmRSS|VmHWM):\s*(\d+)", re.MULTILINE)
_put_off = False


def ran_out(error: BaseException) -> bool:
    """True for an error that says that memory ran out, of the machine or of a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # torch has no class for it


def peak_rss() -> int:
    """Returns the peak resident bytes of this process.

    Linux keeps `ru_maxrss` over an exec: a run started from a large process would report its parent's. `VmHWM` is
    of this program alone.
    """
    return resident()[1]


def resident() -> tuple[int, int]:
    """Returns the resident bytes of this process, and their peak; the peak twice where the system says no more."""
    found = _FIELDS.findall(_STATUS.read_bytes()) if _STATUS.exists() else []
    known = {name: int(count) * 1024 for name, count in found}
    if known.keys() >= {b"VmRSS", b"VmHWM"}:
        return known[b"VmRSS"], known[b"VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024
    return peak, peak


def peak_gpu(device: str) -> int:
    """Returns the peak bytes allocated on the device; 0 on a CPU."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.max_memory_allocated()


def return_large_buffers(large: int = LARGE) -> None:
    """Makes glibc map every buffer above `large` on its own, so that freeing it gives its pages back.

    Its default threshold grows to 32 MiB with use; the parts of a model, of ever different sizes, then fragment the
    heap, and the peak would follow the number of blocks instead of the largest one. Smaller ones are kept for the next
    operation, up to `KEPT`, until `give_back`: fresh pages cost an elementwise operation five times its own time.
    Other C libraries: nothing to do.

    A mapped buffer costs a page fault for every 4 KiB that is written: torch takes pages of 2 MiB for it if it is told
    so before its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, large)
        mallopt(_M_TRIM_THRESHOLD, KEPT)


def share_heap() -> None:
    """Makes all threads share one heap, before the first of them starts: what one frees, the next one that asks gets.

    Else glibc gives every thread a heap of its own, which keeps what it held at its fullest.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def keep_few_kernels() -> None:
    """Tells oneDNN, before its first product, to keep the code of `KERNELS` sizes of products: half a MB for each.

    It would keep that of 1,024.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def give_back() -> None:
    """Gives the pages of everything that was freed back to the system, wherever it lies on the heap."""
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_libc(name: str) -> Any:
    """Returns a function of glibc; None where there is another C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def collect_later() -> None:
    """Puts garbage collection off until `collect`, in a process of its own: almost all that start-up makes stays."""
    global _put_off
    _put_off = True
    gc.disable()


def collect() -> None:
    """Lets garbage collection begin where `collect_later` put it off; what there is by now is never looked at again."""
    global _put_off
    if _put_off:
        gc.freeze()
        gc.enable()
        atexit.register(_at_the_end)
    _put_off = False


def _at_the_end() -> None:
    """Lets the last collection have everything where Triton is there: it reports what nobody took from it as lost."""
    if "triton" in sys.modules:
        gc.unfreeze()


@contextmanager
def without_collection() -> Iterator[None]:
    """Stops garbage collection while many objects are made that all stay: it would take as long as making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
