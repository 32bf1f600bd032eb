"""Language modelling: predict the next token at every position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from zoo.datasets.base import IGNORE
from zoo.tasks.base import Batch, Figures, Task, mean
from zoo.tasks.optim import Optim
from zoo.tasks.registry import task


class LanguageFigures(Figures):
    """Loss, bits per byte and perplexity, over all tokens of a split.

    Args:
        bytes_per_token: Bytes of text that a token stands for on average.
    """

    def __init__(self, bytes_per_token: float) -> None:
        super().__init__()
        self.bytes_per_token = bytes_per_token
        self.loss = mean()
        self.perplexity = Perplexity(ignore_index=IGNORE)

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Take in logits (B, T, V) for targets (B, T)."""
        logits, targets = logits.float(), batch["targets"]
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        self.loss.update(losses[targets.flatten() != IGNORE])
        self.perplexity.update(logits, targets)

    def compute(self) -> dict[str, Tensor]:
        """Return loss (nats per token), bits_per_byte and perplexity."""
        loss = self.loss.compute()
        return {
            "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
            "perplexity": self.perplexity.compute(),
            "loss": loss,
        }


@task("language")
class LanguageModelling(Task):
    """Predict the next token at every position.

    Args:
        model: From tokens (B, T) to logits (B, T, V).
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
        bytes_per_token: Bytes of text that a token stands for on average.
    """

    names = ("bits_per_byte", "perplexity", "loss")

    def __init__(
        self,
        model: nn.Module,
        optim: Optim,
        *,
        max_steps: int,
        test_names: Sequence[str],
        bytes_per_token: float = 1.0,
    ) -> None:
        self.bytes_per_token = bytes_per_token
        super().__init__(model, optim, max_steps=max_steps, test_names=test_names)

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return LanguageFigures(self.bytes_per_token)

    def logits(self, batch: Batch) -> Tensor:
        """Return (B, T, V)."""
        return self.model(batch["tokens"])

    def targets(self, batch: Batch) -> Tensor:
        """Return the number of marked targets."""
        return (batch["targets"] != IGNORE).sum()

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy in nats per token."""
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch["targets"].flatten(), ignore_index=IGNORE
        )
