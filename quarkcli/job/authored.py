"""Lets the model write its calibration rows (`--calib-data self`), if the whole model fits into memory.

The rows are kept beside the output, and a run that goes on with what an interrupted one left takes those.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkcli import family, versions
from quarkcli.disk.source import Source
from quarkcli.disk.weights import WeightSource
from quarkcli.disk.writer import atomic_write_text, tensor_bytes
from quarkcli.errors import ResourceError
from quarkcli.events import Listener, Working
from quarkcli.family import HeaderLike
from quarkcli.forward.defaults import SELF
from quarkcli.job import device as devices
from quarkcli.job.forecast import RUNTIME_BYTES, Forecast
from quarkcli.job.options import Calibration, Options

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData
    from quarkcli.model.tokenizer import Tokenizer

FILE = "quark/self.json"
SCHEMA = "quark/self/1"
_BATCH = 32  # rows that are written together: another number would write other rows
_SCORES = 16  # bytes per entry of the vocabulary and row: scores in float32, and what sampling makes of them


@dataclass
class Author:
    """A model that writes its calibration rows.

    kept   file of rows that an earlier run wrote; rows of another model or other settings are not taken
    """

    source: Source
    weights: WeightSource
    transposed_experts: Collection[str]
    options: Options
    kept: Path | None = None

    def rows(self, settings: Calibration, tokenizer: Tokenizer, held: int, tell: Listener) -> CalibrationData:
        """Returns rows as settings say, and `held` further tokens. Raises ResourceError, ModelError, DataError."""
        from quarkcli.forward import data

        prefix = tokenizer.prefix(settings.bos)
        more = -(-held // settings.seqlen)
        written = self._earlier(self._key(settings, prefix, more))
        if written is None:
            openings = _openings(tokenizer, settings.samples + more, settings.seed)
            starts = [[*prefix, first] for first in openings]
            written = self._written(starts, settings, devices.device(self.options.device), tell)
        return data.of_rows(written[: settings.samples], written[settings.samples :], SELF, prefix)

    def _key(self, settings: Calibration, prefix: list[int], held: int) -> dict[str, Any]:
        """Returns all that decides which rows are written."""
        return {
            "model": self.source.header_digest(),
            "files": {name: list(stamp) for name, stamp in self.source.stamps.items()},
            "rows": settings.samples, "held": held, "seqlen": settings.seqlen, "seed": settings.seed, "prefix": prefix,
            "device": devices.device(self.options.device), **versions.deciding(),
        }  # fmt: skip

    def _written(self, starts: list[list[int]], settings: Calibration, device: str, tell: Listener) -> list[list[int]]:
        from quarkcli.model import writing
        from quarkcli.model.runner import Runner

        self._check_room(device, settings.seqlen)
        tell(Working("loading the whole model so that it can write text"))
        runner = Runner(
            self.source.whole_folder(), self.weights.headers, device=device, transposed_experts=self.transposed_experts,
            trust_remote_code=self.options.trust_remote_code,
        )  # fmt: skip
        writing.load(runner, self.weights.read_many)
        found = writing.write(runner, starts, settings.seqlen, settings.seed, _BATCH, lambda what: tell(Working(what)))
        rows: list[list[int]] = found.tolist()
        return rows

    def _check_room(self, device: str, length: int) -> None:
        """Raises ResourceError where the whole model has no room."""
        need = whole(self.source.config, self.weights.headers, length)
        most = self.options.max_cpu_mem if device == "cpu" else self.options.max_gpu_mem
        room = min(filter(None, (_free(device), most)), default=None)
        if room is not None and need > room:
            raise too_large(need, room)

    def _earlier(self, key: dict[str, Any]) -> list[list[int]] | None:
        """Returns the rows that an earlier run wrote with this key."""
        try:
            found = json.loads(self.kept.read_text(encoding="utf-8")) if self.kept is not None else None
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("key") != json.loads(json.dumps(key)):
            return None
        return [row["tokens"] for row in (*found["rows"], *found["held"])]

    def keep(self, data: CalibrationData, settings: Calibration, tokenizer: Tokenizer, folder: Path) -> None:
        """Writes the rows beside an output: their tokens, and their text, so that the file is calibration data too."""
        rows = data.tokens.tolist()
        held = data.held.tolist() if data.held is not None else []
        shown: Mapping[str, Any] = {
            "schema": SCHEMA, "key": self._key(settings, data.prefix, len(held)),
            "rows": [_row(row, tokenizer) for row in rows], "held": [_row(row, tokenizer) for row in held],
        }  # fmt: skip
        (folder / FILE).parent.mkdir(exist_ok=True)
        atomic_write_text(folder / FILE, json.dumps(shown, ensure_ascii=False) + "\n")


def whole(config: Mapping[str, Any], headers: Mapping[str, HeaderLike], length: int) -> int:
    """Returns the bytes of a model that writes rows of `length` tokens.

    All its weights, the keys and values and the scores of a batch, and the program with its libraries.
    """
    weights = sum(tensor_bytes(header.dtype, header.shape) for header in headers.values())
    heads, width = family.kv_heads(config), family.head_size(config)
    kept = heads * width if heads and width else family.hidden_size(config) or 0
    cache = 2 * (family.block_count(config) or 0) * kept * length * _BATCH * 2
    scores = _BATCH * _SCORES * (family.vocabulary(config) or 0)
    return weights + cache + scores + RUNTIME_BYTES[True]


def too_large(need: int, room: int) -> ResourceError:
    """Returns the error for a model that has no room as a whole."""
    return ResourceError(
        f"the model can write its own text only if all of it fits into memory: it needs about {need:,} bytes, and "
        f"{room:,} are free",
        where="--calib-data self",
        hint="use --calib-data FILE, or --calib-data builtin",
        kind="E-MEMORY",
    )


def with_whole(
    size: Forecast, options: Options, settings: Calibration | None, source: Source, headers: Mapping[str, HeaderLike]
) -> Forecast:
    """Returns the sizes of a plan with those of the whole model, where it writes its own rows."""
    if settings is None or settings.source != SELF:
        return size
    need = whole(source.config, headers, settings.seqlen)
    return replace(
        size, whole_bytes=need, memory_bytes=max(size.memory_bytes, need if devices.on_cpu(options.device) else 0)
    )


def _row(tokens: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    return {"text": tokenizer.decode(tokens), "tokens": tokens}


def _openings(tokenizer: Tokenizer, count: int, seed: int) -> list[int]:
    """Returns the first tokens of rows: ordinary ones, all different while there are enough."""
    ordinary = tokenizer.ordinary()
    choice = random.Random(seed)
    found: list[int] = []
    while len(found) < count:
        found += choice.sample(ordinary, min(len(ordinary), count - len(found)))
    return found


def _free(device: str) -> int | None:
    """Returns the free memory of a device; None where nobody knows."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") + _cached()
    except (ValueError, OSError):
        return None


def _cached() -> int:
    """Returns the memory that files take and that would be given back."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return 0
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return 1024 * int(rows.get("Cached", "0 kB").split()[0])
