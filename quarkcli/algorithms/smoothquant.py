"""SmoothQuant (arXiv 2211.10438): moves the size of activations into the weights that read them.

Channel j is multiplied by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) in all weights that read it and divided where it
comes from; at alpha .5 both are then equally large. A channel that calibration never moved stays as it is.

scaling_layers   which channels: names of norms and linears, or AMD Quark's rows; default: norms, and the linear whose
                 output is the input of the down projection
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms._scaling import ChannelScaling, Rows
from quarkcli.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.algorithms._channels import Channels


class SmoothQuant(ChannelScaling):
    """alpha: share of the activations' size that moves; scale_clamp_min: the smallest factor."""

    name = "smoothquant"
    kinds = frozenset({"channel_absmax"})
    roles = frozenset({"up", "expert_up"})
    parameters: ClassVar[Mapping[str, Any]] = {"alpha": 0.5, "scale_clamp_min": 1e-3, "scaling_layers": None}

    def __init__(self, alpha: float, scale_clamp_min: float, scaling_layers: Rows) -> None:
        super().__init__(scaling_layers)
        for name, value, least, most in (("alpha", alpha, 0, 1), ("scale_clamp_min", scale_clamp_min, 1e-12, 1)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise ConfigError(
                    f"smoothquant {name} must lie between {least} and {most}, not {value!r}",
                    kind="E-ALGORITHM-PARAMETER",
                )
        self.alpha = float(alpha)
        self.clamp_min = float(scale_clamp_min)

    def factors(self, channels: Channels) -> tuple[Tensor | None, dict[str, Any]]:
        from quarkcli.numerics.smooth import smooth_factors

        seen = channels.seen_amax()
        if seen is None:
            return None, {"reason": "no calibration token"}
        return smooth_factors(seen, channels.column_amax(), self.alpha, self.clamp_min), {"alpha": self.alpha}


ALGORITHM = SmoothQuant
