"""`quark env`: shows versions, devices, memory and disk, for bug reports."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from quarkcli import versions
from quarkcli.cli import apps, output
from quarkcli.cli.flags import Device, Json
from quarkcli.errors import UsageError

SCHEMA = "quark/env/1"
EXAMPLES = apps.examples("quark env", "quark env --measure")
Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Measure how fast this machine quantizes, so that 'quark plan' can forecast times. Takes minutes.",
    ),
]
_PACKAGES = (
    "quarkcli", "torch", "transformers", "triton", "safetensors", "huggingface_hub", "datasets", "numpy", "pydantic",
    "typer", "rich", "compressed-tensors", "vllm",
)  # fmt: skip


def env(*, measure: Measure = False, device: Device = "auto", json: Json = False) -> None:
    """Show versions and devices for a bug report.

    Also shows memory, disk, and whether there is a hub token (never its value).
    """
    output.start(json=json)
    if measure:
        _measure(device)
    elif device != "auto":
        raise UsageError(
            f"--device {device} works only with --measure",
            hint="add --measure, or leave it out",
            kind="E-FLAG-CONFLICT",
        )
    found = _facts()
    if json:
        output.json_data({"schema": SCHEMA, **found})
        return
    rows = [("python", found["python"]), ("platform", found["platform"]), ("cpus", str(found["cpus"]))]
    rows += [(name, version or "not installed") for name, version in found["packages"].items()]
    rows += [("devices", "; ".join(_device(device) for device in found["devices"]) or "cpu only")]
    memory, disk = found["memory"], found["disk"]
    rows += [("memory", f"{_size(memory['available'])} available of {_size(memory['total'])}")]
    rows += [("disk", f"{_size(disk['free'])} free at {disk['path']}")]
    rows += [("hub cache", f"{_size(found['hub_cache']['free'])} free at {found['hub_cache']['path']}")]
    rows += [("hub token", "present" if found["hub_token"] else "absent")]
    rows += [("user folder", found["user_folder"]), ("rates", _rates(found["rates"]))]
    width = max(len(label) for label, _ in rows) + 2
    for label, text in rows:
        output.data(f"{label:<{width}}{text}")


def _facts() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    from quarkcli.disk.writer import free_bytes
    from quarkcli.job import rates
    from quarkcli.recipe import catalog

    place, known = rates.default_file(), rates.of_this_machine()
    here, cache = Path.cwd(), Path(constants.HF_HUB_CACHE)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: versions.installed(name) for name in _PACKAGES},
        "devices": _devices(),
        "memory": _memory(),
        "disk": {"path": str(here), "free": shutil.disk_usage(here).free},
        "hub_cache": {"path": str(cache), "free": free_bytes(cache)},
        "hub_token": get_token() is not None,
        "user_folder": str(catalog.user_folder()),
        "rates": {"origin": known.origin, "path": str(place) if rates.exists(place) else None},
    }


def _measure(device: str) -> None:
    from quarkcli.cli.progress import Progress
    from quarkcli.job import device as devices
    from quarkcli.job import probe, rates

    with Progress("lines") as progress:
        found = probe.measure(devices.device(device), tell=progress)
    rates.write(found, rates.default_file())


def _rates(found: dict[str, str | None]) -> str:
    return f"{found['origin']}" + (f", in {found['path']}" if found["path"] else "")


def _devices() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": row.name, "memory": row.total_memory, "capability": f"{row.major}.{row.minor}"} for row in found
    ]  # fmt: skip


def _memory() -> dict[str, int | None]:
    """Returns bytes of RAM; `available` as Linux estimates it, None elsewhere."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return {"total": None, "available": None}
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return {"total": total, "available": available}


def _size(count: int | None) -> str:
    return output.size(count) if count is not None else "unknown"


def _device(device: dict[str, Any]) -> str:
    return f"{device['name']}, {_size(device['memory'])}, compute capability {device['capability']}"
