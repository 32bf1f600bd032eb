"""Regression: numbers to predict at some positions of a sequence."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanSquaredError, R2Score

from zoo.tasks.base import Batch, Figures, Task
from zoo.tasks.registry import task


def marked(targets: Tensor) -> Tensor:
    """Return which positions of targets (B, T, K) are asked for: those without a NaN, (B, T)."""
    return ~targets.isnan().any(-1)


class RegressionFigures(Figures):
    """Mean squared error, and the share of the variance explained, over all numbers asked for.

    r2 = 1 - sum (y - p)^2 / sum (y - mean of all y)^2: 1 is perfect, 0 the best constant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mse, self.r2 = MeanSquaredError(), R2Score()

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Take in predictions (B, T, K); targets (B, T, K) are NaN where nothing is asked."""
        asked = marked(batch["targets"])
        predicted, wanted = logits[asked].float().flatten(), batch["targets"][asked].flatten()
        self.mse.update(predicted, wanted)
        self.r2.update(predicted, wanted)

    def compute(self) -> dict[str, Tensor]:
        """Return mse, r2 and loss, which is the mse."""
        mse = self.mse.compute()
        return {"mse": mse, "r2": self.r2.compute(), "loss": mse}


@task("regression")
class Regression(Task):
    """Predict the numbers of every marked position.

    Args:
        model: From tokens (B, T) to numbers (B, T, K).
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
    """

    names = ("mse", "r2", "loss")

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return RegressionFigures()

    def logits(self, batch: Batch) -> Tensor:
        """Return (B, T, K)."""
        return self.model(batch["tokens"])

    def targets(self, batch: Batch) -> Tensor:
        """Return the number of marked targets."""
        return marked(batch["targets"]).sum()

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean squared error over the marked positions."""
        asked = marked(batch["targets"])
        return F.mse_loss(logits[asked].float(), batch["targets"][asked])
