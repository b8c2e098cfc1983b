"""Does the work of a Python call apart from what the caller's program has set for torch, and from other calls."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_TURN = threading.RLock()  # the default dtype and what transformers patches belong to the whole process


@contextmanager
def apart() -> Iterator[None]:
    """Gives torch the settings of a fresh process inside; the caller's come back. Calls of other threads wait.

    A notebook has `set_grad_enabled(False)`, a default device or dtype, autocast or TF32. Under them tuners fail, and
    products round otherwise. Where nobody has imported torch, there is nothing to give.
    """
    with _TURN, ExitStack() as stack:
        torch = sys.modules.get("torch")
        if torch is not None:
            _enter(torch, stack)
        yield


def _enter(torch: Any, stack: ExitStack) -> None:
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float32)
    if torch.get_default_device().type != "cpu":
        stack.enter_context(torch.device("cpu"))
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    for setting in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        if setting.fp32_precision in ("tf32", "bf16"):
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
            setting.fp32_precision = "ieee"
