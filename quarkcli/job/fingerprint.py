"""Gathers the facts that must be equal before an interrupted run may continue."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from quarkcli import versions
from quarkcli.disk.state import DATE
from quarkcli.job import finish
from quarkcli.job.options import Prepared

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData


def fingerprint(prepared: Prepared, data: CalibrationData | None, device: str) -> dict[str, Any]:
    """Returns everything that must be equal for an interrupted run to be continued."""
    source, settings = prepared.source, prepared.calibration
    recipe = finish.as_recipe(prepared)
    if prepared.others:
        recipe["export"]["dialect"] = [one.dialect.name for one in prepared.every]
    return {
        "model": {
            "config": hashlib.sha256(source.config_text.encode()).hexdigest(),
            "headers": source.header_digest(),
            # those of a commit are what they are, wherever they lie
            "files": source.files if source.commit else {name: _stamp(*stamp) for name, stamp in source.stamps.items()},
            "commit": source.commit,
        },
        "recipe": recipe,
        "data": {
            "digest": data.digest if data is not None else None,
            "seed": prepared.seed if prepared.is_random else None,
            "moe": settings.moe if settings is not None else None,
            "bos": data.prefix if data is not None else None,
        },
        "versions": versions.deciding(),
        "device": device,
    }


def _stamp(size: int, modified: int) -> dict[str, Any]:
    """Returns size and date of a weight file; the date as `touch -d` takes it."""
    return {"bytes": size, DATE: f"@{modified // 10**9}.{modified % 10**9:09}"}
