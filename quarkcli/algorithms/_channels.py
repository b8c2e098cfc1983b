"""Holds the channels of one pair: what writes them, what reads them, and what passes through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quarkcli.algorithms.tensors import PartTensors
from quarkcli.family import Pair
from quarkcli.plan.model import QuantizedTarget, Target, is_quantized

if TYPE_CHECKING:
    from quarkcli.forward.statistics import Statistics
    from quarkcli.numerics.sample import Sample


class Channels:
    """The channels that the source of a pair writes and its readers read; a head's may be read several times."""

    def __init__(self, part: PartTensors, pair: Pair, statistics: Statistics) -> None:
        self.part = part
        self.pair = pair
        self.statistics = statistics
        self.count = part.read(f"{pair.source}.weight").numel() if pair.norm else part.targets[pair.source].shape[0]

    @property
    def readers(self) -> list[Target]:
        return [self.part.targets[name] for name in self.pair.readers]

    @property
    def quantized(self) -> list[QuantizedTarget]:
        """Returns the readers that are quantized."""
        return [target for target in self.readers if is_quantized(target)]

    def sites(self) -> Iterator[tuple[str, int | None]]:
        """Yields the activations that the quantized readers read; the common input of experts once."""
        seen: set[str] = set()
        for reader in self.quantized:
            if reader.site is not None and reader.site not in seen:
                seen.add(reader.site)
                yield reader.site, reader.expert[1] if reader.expert and not self.pair.norm else None

    def seen_amax(self) -> Tensor | None:
        """Returns the largest magnitude that passed every channel, float32 [channels]; None without a token."""
        found = (self.statistics.channel_amax(site, expert) for site, expert in self.sites())
        return self._largest([seen for seen in found if seen is not None])

    def column_amax(self) -> Tensor:
        """Returns the largest magnitude of the weights that read every channel, float32 [channels]."""
        found = self._largest([self.part.columns(name).abs().amax(0) for name in self.pair.readers])
        assert found is not None
        return found

    def seen_mean(self, sample: Sample) -> Tensor:
        """Returns the mean magnitude of every channel, float32 [channels]; that of sampled rows where none is known."""
        known = [seen for site, _ in self.sites() if (seen := self.statistics.mean_abs(site)) is not None]
        return self.gathered(known[0] if known else sample.mean(sample.rows.abs())).mean(0)

    def column_rms(self) -> Tensor:
        """Returns the root mean square of the quantized weights that read every channel, float32 [channels]."""
        squares = [self.gathered(self.part.columns(t.name).square().sum(0)).sum(0) for t in self.quantized]
        return (torch.stack(squares).sum(0) / sum(t.shape[0] for t in self.quantized)).sqrt()

    def _largest(self, values: list[Tensor]) -> Tensor | None:
        return torch.stack([self.gathered(own).amax(0) for own in values]).amax(0) if values else None

    def gathered(self, values: Tensor) -> Tensor:
        """Returns values of columns [width] as [repeats, channels]: together what reads one channel."""
        if len(values) == self.count:
            return values[None]
        places = self.spread(torch.arange(self.count, device=values.device), len(values))
        return values[places.argsort(stable=True)].view(self.count, -1).T

    def spread(self, values: Tensor, width: int) -> Tensor:
        """Returns values of channels for the columns of the readers."""
        return self.part.spread(values, width)
