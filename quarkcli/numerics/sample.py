"""Rows of an activation that stand for all of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """Sampled rows, and how many tokens each stands for.

    rows     float32 [n, features]
    weights  float32 [n], their mean is 1
    """

    rows: Tensor
    weights: Tensor

    @classmethod
    def alike(cls, rows: Tensor) -> Sample:
        """Returns rows that all stand for as many tokens."""
        return cls(rows, torch.ones(len(rows), device=rows.device))

    def times(self, factors: Tensor) -> Sample:
        """Returns the rows as they are once the channels are multiplied by factors, float32 [features]."""
        return self._replace(rows=self.rows * factors)

    def mean(self, values: Tensor) -> Tensor:
        """Returns the mean over tokens of what the rows have, float32 [n, ...]."""
        found: Tensor = (self.weights / len(self.weights)) @ values
        return found

    def balanced(self) -> Tensor:
        """Returns the rows times the root of their weights: squares summed over them are those summed over tokens."""
        return self.rows * self.weights.sqrt().unsqueeze(1)
