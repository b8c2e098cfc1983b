"""Says how fast a device works: from a table of devices, or as it was measured here. Torch-free.

`quark env --measure` measures this machine (`job.probe`) and keeps the result in the user's cache, for `quark plan`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from quarkcli.errors import ConfigError, ResourceError, UsageError, near_misses
from quarkcli.spec import PerChannel, PerGroup, PerTile, TensorSpec

SCHEMA = "quark/rates/1"
FILE = "rates.json"
TABLE = Path(__file__).resolve().parents[1] / "assets" / "devices.yaml"
OTHERS = "other"  # kinds of values that were not measured


@dataclass(frozen=True)
class Rates:
    """Rates of one rank's device, per second.

    name        of the device
    origin      where the figures come from, for people
    products    FLOP of forward passes, in 16 bits
    moments     FLOP of second moments
    plain       FLOP of large float32 products
    factors     FLOP of factors and inverses
    candidates  values times candidates, of searches and loops over columns
    values      values that are quantized and packed, by the kind of their format
    fake        values of activations that are quantized and decoded, by kind
    read, write  bytes of the disk, shared by `node` ranks
    weight      seconds (not a rate) for each weight, whatever its size
    start       seconds before the first part: data-free, and with a model to run
    memory      bytes of the device; None: it works in the host's memory
    link        bytes to and from the device; None: as before
    shared      ranks on one machine share the processors too
    """

    name: str
    origin: str
    products: float
    moments: float
    plain: float
    factors: float
    candidates: float
    read: float
    write: float
    weight: float
    start: tuple[float, float]
    values: Mapping[str, float] = field(default_factory=dict)
    fake: Mapping[str, float] = field(default_factory=dict)
    memory: int | None = None
    link: float | None = None
    node: int = 1
    shared: bool = True

    def quantizing(self, spec: TensorSpec) -> float:
        """Returns values of a weight that are quantized in a second."""
        return _of_kind(self.values, spec)

    def decoding(self, spec: TensorSpec) -> float:
        """Returns values of an activation that are fake-quantized in a second."""
        return _of_kind(self.fake, spec)


def kind(spec: TensorSpec) -> str:
    """Returns the kind of a format as far as its speed goes: `float4 group`, `integer8 channel`."""
    match spec.granularity:
        case PerGroup():
            where = "global group" if spec.is_two_level else "group"
        case PerTile():
            where = "tile"
        case PerChannel():
            where = "channel"
        case _:
            where = "tensor" if spec.is_static or spec.has_tensor_scale else "channel"
    return f"{spec.format.kind}{spec.format.bits} {where}"


def _of_kind(rates: Mapping[str, float], spec: TensorSpec) -> float:
    return rates.get(kind(spec)) or rates[OTHERS]


def names() -> list[str]:
    return list(_table()["gpus"])


def generations() -> dict[str, list[str]]:
    """Returns generation -> its devices."""
    return dict(_table()["generations"])


def generation(name: str) -> str:
    """Returns the generation of a device of the table; one may be named itself. Raises UsageError for another."""
    spelled = _known(name, [*names(), *generations()])
    return next(one for one, devices in generations().items() if spelled == one or spelled in devices)


def memory(name: str) -> int | None:
    """Returns the memory of a device in bytes; None for a generation, whose devices differ."""
    row = _table()["gpus"].get(_spelled(name))
    return int(float(row["memory"])) if row else None


def _spelled(name: str) -> str:
    return name.lower().replace(" ", "")


def _known(name: str, known: list[str]) -> str:
    """Returns a name as the table spells it. Raises UsageError, with the nearest, for one that is none of these."""
    spelled = _spelled(name)
    if spelled not in known:
        close = near_misses(spelled, known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"use one of: {', '.join(known)}"
        raise UsageError(f"unknown device '{name}'", where="--gpu", hint=hint, kind="E-FLAG-VALUE")
    return spelled


def of_gpu(name: str) -> Rates:
    """Returns the rates of a device of the table. Raises UsageError for one that it lacks."""
    table = _table()
    spelled = _known(name, names())
    row = {key: float(value) for key, value in table["gpus"][spelled].items()}
    reached = table["reached"]
    copy = row["copy"] * reached["copy"]
    products = row["bf16"] * reached["bf16"]
    return Rates(
        name=spelled,
        origin="the data sheet, and guessed shares of it",
        products=products,
        moments=products,
        plain=row["f32"] * reached["f32"],
        factors=row["f32"] * reached["factors"],
        candidates=row["copy"] * reached["candidates"] / 4,
        read=reached["read"],
        write=reached["write"],
        weight=reached["weight"],
        start=tuple(reached["start"]),
        values={OTHERS: copy / (2 * reached["passes"])},
        fake={OTHERS: copy / 4},
        memory=int(row["memory"]),
        link=row["link"],
        node=reached["node"],
        shared=False,
    )


def of_this_machine(file: Path | None = None) -> Rates:
    """Returns the rates that were measured here, or those of so many usual cores. `file`: where they were kept."""
    if file is not None:
        return read(file)
    why = "'quark env --measure' measures it"
    try:
        return read(default_file())
    except ConfigError as error:
        if exists(default_file()):
            why = f"{default_file()}: {error.what}; {error.hint}"
    cores = os.cpu_count() or 1
    start = tuple(_table()["core"]["start"])
    row = {key: float(value) for key, value in _table()["core"].items() if key != "start"}
    return Rates(
        name="this machine",
        origin=f"a guess for {cores} usual cores; {why}",
        products=row["bf16"] * cores,
        moments=row["f32"] * cores,
        plain=row["f32"] * cores,
        factors=row["factors"] * cores,
        candidates=row["candidates"] * cores,
        read=row["read"],
        write=row["write"],
        weight=row["weight"],
        start=start,
        values={OTHERS: row["values"] * cores},
        fake={OTHERS: row["values"] * cores},
    )


def default_file() -> Path:
    """Returns the file that `quark env --measure` writes, in the user's cache."""
    home = os.environ.get("QUARK_HOME")
    if home:
        return Path(home) / "cache" / FILE
    cache_folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - never raises
    return Path(cache_folder) / "quark" / FILE


def exists(file: Path) -> bool:
    """Returns whether there is such a file; in a container, a home may belong to nobody."""
    try:
        return file.is_file()
    except OSError:
        return False


def write(rates: Rates, file: Path) -> None:
    """Writes rates to a file. Raises ResourceError where that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"schema": SCHEMA, **asdict(rates)}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        hint = "set QUARK_HOME to a folder that you can write to"
        raise ResourceError(
            f"cannot be written: {error.strerror}", where=str(file), hint=hint, kind="E-DISK-WRITE"
        ) from error


def read(file: Path) -> Rates:
    """Returns the rates of a file that `write` made. Raises ConfigError for another."""
    hint = "run 'quark env --measure' to write a new one"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(
            f"measured rates cannot be read: {why}", where=str(file), hint=hint, kind="E-RATES-FILE"
        ) from error
    known = {one.name for one in fields(Rates)}
    if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA or set(found) != known:
        raise ConfigError(
            f"is not a file of measured rates ({SCHEMA})", where=str(file), hint=hint, kind="E-RATES-FILE"
        )
    wrong = [key for key, value in found.items() if not _is_sound(key, value)]
    if wrong:
        raise ConfigError(
            f"{wrong[0]} must be positive, not {found[wrong[0]]!r}", where=str(file), hint=hint, kind="E-RATES-FILE"
        )
    return Rates(**{**found, "start": tuple(found["start"])})


def _is_sound(key: str, value: Any) -> bool:
    """Returns whether a value of the file is one that rates can have there."""
    if key in ("name", "origin"):
        return isinstance(value, str)
    if key == "shared":
        return isinstance(value, bool)
    if key in ("memory", "link") and value is None:
        return True
    if key in ("values", "fake"):
        return isinstance(value, dict) and OTHERS in value and all(map(_is_positive, value.values()))
    if key == "start":
        return isinstance(value, list) and len(value) == 2 and all(map(_is_positive, value))
    return _is_positive(value) and (key != "node" or isinstance(value, int))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return found
