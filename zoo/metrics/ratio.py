"""The base of figures that are a sum over a count."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Ratio(Metric):
    """A sum over a number, added up over batches and processes.

    Attributes:
        total: Sum of the figures.
        count: How many they are.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Tensor, asked: Tensor) -> None:
        """Take in the values that are asked for."""
        self.total += values[asked].sum()
        self.count += asked.sum()

    def compute(self) -> Tensor:
        """Return the mean; NaN if there was nothing."""
        return (self.total / self.count).float()
