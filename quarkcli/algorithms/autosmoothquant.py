"""AutoSmoothQuant: SmoothQuant with its own exponent for each pair, the one with the least loss.

Candidates are max|X_j|^a / max|W_j|^(1 - a) for a = 0 ... 1 and AMD Quark's max|X_j|^r, which leaves the weights out.
They are judged by the outputs of all weights that read the channels, weights and inputs quantized, on sampled rows; one
that is not better than 1 everywhere on held-out rows is not taken.

compute_scale_loss   MSE, RMSE or MAE: mean square, its root, or mean magnitude of what outputs lose
scaling_layers       as in smoothquant; default: all channels that the model family names
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quarkcli.algorithms._scaling import Rows
from quarkcli.algorithms._searching import SearchedScaling
from quarkcli.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from quarkcli.algorithms._channels import Channels
    from quarkcli.numerics.sample import Sample

_POWERS = {"MSE": 2, "RMSE": 2, "MAE": 1}  # the root changes no choice


class AutoSmoothQuant(SearchedScaling):
    """n_grid: number of steps of the exponent between 0 and 1."""

    name = "autosmoothquant"
    kinds = frozenset({"samples", "channel_absmax"})
    parameters: ClassVar[Mapping[str, Any]] = {"n_grid": 20, "compute_scale_loss": "MSE", "scaling_layers": None}

    def __init__(self, n_grid: int, compute_scale_loss: str, scaling_layers: Rows) -> None:
        super().__init__(scaling_layers, n_grid)
        if compute_scale_loss not in _POWERS:
            raise ConfigError(
                f"autosmoothquant compute_scale_loss must be {', '.join(_POWERS)}, not {compute_scale_loss!r}",
                kind="E-ALGORITHM-PARAMETER",
            )
        self.power = _POWERS[compute_scale_loss]  # type: ignore[misc]

    def candidates(self, channels: Channels, sample: Sample) -> dict[str, Callable[[float], Tensor]]:
        from quarkcli.numerics.smooth import scaled_factors, smooth_factors

        seen, columns = channels.seen_amax(), channels.column_amax()
        if seen is None:
            seen = channels.gathered(sample.rows.abs().amax(0)).amax(0)
        return {
            "both": lambda ratio: smooth_factors(seen, columns, ratio),
            "activations": lambda ratio: scaled_factors(seen, None, ratio),
        }


ALGORITHM = AutoSmoothQuant
