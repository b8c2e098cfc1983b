"""Chooses the device of a job, and how much of its memory the job may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from quarkcli.errors import ResourceError, UsageError
from quarkcli.job.forecast import Forecast, device_floor


def device(asked: str) -> str:
    """Returns `cpu` or `cuda`. Raises UsageError for another word and ResourceError when there is no GPU."""
    if asked not in {"auto", "cpu", "cuda"}:
        raise UsageError(
            f"unknown device '{asked}'", where="--device", hint="use auto, cpu or cuda", kind="E-FLAG-VALUE"
        )
    if asked == "cpu":
        return "cpu"
    if has_gpu():
        return "cuda"
    if asked == "cuda":
        raise ResourceError(
            "no CUDA device is available", where="--device cuda", hint="use --device cpu", kind="E-DEVICE-NONE"
        )
    return "cpu"


def has_gpu() -> bool:
    """True where torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def on_cpu(asked: str) -> bool:
    """True where `--device` leads to the CPU, here."""
    return asked == "cpu" or not has_gpu()


def check(device: str, size: Forecast, most: int | None) -> None:
    """Refuses a job whose largest block does not fit the device, or what `--max-gpu-mem` allows of it."""
    if device == "cpu":
        return
    import torch

    total = torch.cuda.mem_get_info()[1]
    have, need = min(total, most or total), device_floor(size)
    if need > have:
        raise ResourceError(
            f"the largest block needs about {need:,} bytes of GPU memory, and {have:,} are there",
            where="--max-gpu-mem" if have < total else "",
            hint="use a larger --max-gpu-mem, --device cpu, or a scheme without calibration",
            kind="E-MEMORY",
        )


@contextmanager
def limit(device: str, most: int | None) -> Iterator[None]:
    """Lets the process take so many bytes of the device inside; beyond, it is out of memory."""
    if device == "cpu" or most is None:
        yield
        return
    import torch

    torch.cuda.set_per_process_memory_fraction(min(1.0, most / torch.cuda.mem_get_info()[1]))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
