"""Finds NaN and infinity in calibration activations: an error, or a note, and what reads them goes without data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quarkcli.errors import DataError

UNSEEN_ATTENTION = (
    "use --kv-cache none, or a recipe whose cache has scale.constant_amax: quark cannot see the attention of this model"
)
UNSEEN_LINEAR = "use --exclude for modules that calibration text does not run, or use more --calib-samples"
HINT = (
    "use other --calib-data, or --exclude these modules ('quark quantize' also takes --on-nonfinite skip-algorithm); "
    "check that the original model does not overflow"
)


class Guard:
    """Looks at the activations of one part.

    skip     note them; else they are an error
    warn     takes a sentence about an activation, the first time that it is noted
    skipped  activation -> what was found there first
    """

    def __init__(self, skip: bool = False, warn: Callable[[str], None] | None = None) -> None:
        self.skip = skip
        self.skipped: dict[str, str] = {}
        self._warn = warn

    def is_finite(self, site: str, x: Tensor, what: str) -> bool:
        """False for an activation with NaN or infinity, which is noted. Raises DataError where it is an error.

        what   which batch of which model it is, for messages
        """
        if bool(torch.isfinite(x.sum(dtype=torch.float32))):
            return True
        if self.skip and bool(torch.isfinite(x).all()):  # the sum alone overflows
            return True
        self.fault(site, f"NaN or inf in the calibration activations{what}")
        return False

    def fault(self, site: str, what: str) -> None:
        """Notes an activation that cannot be used. Raises DataError where that is an error."""
        if not self.skip:
            raise DataError(what, where=site, hint=HINT, kind="E-NONFINITE-ACTIVATION")
        self.note(site, what)

    def note(self, site: str, what: str) -> None:
        """Notes an activation that cannot be used, and says so the first time."""
        if site not in self.skipped and self._warn is not None:
            self._warn(f"{site}: {what}; algorithms skip it, and ranges use only its finite values")
        self.skipped.setdefault(site, what)

    def lost(self, site: str, expert: int | None = None) -> str | None:
        """Returns why an activation, or one expert's part of it, is of no use; None where it is."""
        return self.skipped.get(site, self.skipped.get(named(site, expert)))


def named(site: str, expert: int | None) -> str:
    return site if expert is None else f"{site}, expert {expert}"


def finite_rows(x: Tensor) -> Tensor:
    """Returns the rows without NaN and infinity, [n, features]."""
    rows = x.reshape(-1, x.shape[-1])
    return rows[torch.isfinite(rows).all(-1)]
