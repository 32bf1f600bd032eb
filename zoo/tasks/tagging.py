"""Token tagging: a label at some positions of a sequence, as in recall and copying tasks."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from zoo.datasets.base import IGNORE
from zoo.tasks.base import Batch, Figures, Task, mean
from zoo.tasks.registry import task


class TaggingFigures(Figures):
    """Accuracy over all marked positions, share of examples without an error, and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.exact, self.loss = mean(), mean(), mean()

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Take in logits (B, T, V); targets (B, T) are -100 where nothing is asked."""
        targets = batch["targets"]
        marked = targets != IGNORE
        right = logits.argmax(-1) == targets
        self.accuracy.update(right[marked].float())
        self.exact.update((right | ~marked).all(1).float())
        losses = F.cross_entropy(logits[marked].float(), targets[marked], reduction="none")
        self.loss.update(losses)

    def compute(self) -> dict[str, Tensor]:
        """Return accuracy, exact and loss."""
        return {
            "accuracy": self.accuracy.compute(),
            "exact": self.exact.compute(),
            "loss": self.loss.compute(),
        }


@task("tagging")
class TokenTagging(Task):
    """Predict the target of every marked position.

    Args:
        model: From tokens (B, T) to logits (B, T, V).
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
    """

    names: ClassVar[tuple[str, ...]] = ("accuracy", "exact", "loss")

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return TaggingFigures()

    def logits(self, batch: Batch) -> Tensor:
        """Return (B, T, V)."""
        return self.model(batch["tokens"])

    def targets(self, batch: Batch) -> Tensor:
        """Return the number of marked targets."""
        return (batch["targets"] != IGNORE).sum()

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the marked positions."""
        targets = batch["targets"]
        marked = targets != IGNORE
        # Picking the few marked positions first is cheaper than a softmax over all of them.
        return F.cross_entropy(logits[marked].float(), targets[marked])
