"""Keeps the losses of a search in a file, so that another budget needs no forward pass. Torch-free."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkcli import versions
from quarkcli.disk.writer import atomic_write_json
from quarkcli.errors import ConfigError
from quarkcli.job.finish import resolved_recipe
from quarkcli.search.candidates import Group, Space

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData

SCHEMA = "quark/scores/1"
Losses = dict[tuple[str, str], float]


def fingerprint(space: Space, groups: Sequence[Group], data: CalibrationData) -> str:
    """Returns a digest of all that losses depend on: model, data, candidates, algorithms, groups, versions."""
    base = space.base
    source = base.source
    asked = {
        "config": source.config_text,
        "headers": source.header_digest(),
        "files": {name: list(stamp) for name, stamp in source.stamps.items()},
        "commit": source.commit,
        "candidates": {c.name: resolved_recipe(c.prepared) if c.prepared else None for c in space.candidates},
        "groups": {group.name: [sorted(group.names), group.allowed] for group in groups},
        "data": data.digest,
        "seed": base.seed,
        "moe": base.calibration.moe if base.calibration is not None else None,
        "min_expert_tokens": base.calibration.min_expert_tokens if base.calibration is not None else None,
        "versions": versions.deciding(),
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def read(path: Path, digest: str, groups: Sequence[Group]) -> Losses | None:
    """Returns the losses in a file, of every group for every candidate; None when there is no such file.

    Raises ConfigError for a file that holds something else, or losses of another model, other data or candidates.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found = {(row["group"], row["candidate"]): float(row["loss"]) for row in stored["losses"]}
        known = stored["schema"], stored["fingerprint"]
    except FileNotFoundError:
        return None
    except OSError as error:  # a directory, or a file that may not be read: nothing that should be deleted
        what = f"cannot be read: {error.strerror}"
        raise ConfigError(what, where=str(path), hint="give another --scores", kind="E-SCORES-FILE") from error
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            "this is not a file of scores", where=str(path), hint=_hint(path), kind="E-SCORES-FILE"
        ) from error
    if known != (SCHEMA, digest):
        raise ConfigError(
            "these scores are for another model, other data, schemes or settings",
            where=str(path),
            hint=_hint(path),
            kind="E-SCORES-FILE",
        )
    asked = {(group.name, name) for group in groups for name in group.allowed}
    if not asked <= found.keys() or not all(0 <= loss < math.inf for loss in found.values()):
        raise ConfigError(
            "a loss is missing, or is no number from 0 on", where=str(path), hint=_hint(path), kind="E-SCORES-FILE"
        )
    return found


def write(path: Path, digest: str, losses: Losses, about: dict[str, Any]) -> None:
    rows = [{"group": group, "candidate": name, "loss": loss} for (group, name), loss in losses.items()]
    atomic_write_json(path, {"schema": SCHEMA, "fingerprint": digest, **about, "losses": rows})


def _hint(path: Path) -> str:
    return f"give another --scores, or delete {path.name} to measure again"
