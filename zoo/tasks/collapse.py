"""Representational collapse: tagging, and how far the last token's repetition moves the model.

Barbero et al. 2024 ("Transformers need glasses!", arXiv 2406.04267): softmax attention averages,
so that the longer a sequence x_1 .. x_n, the closer the final representations of its last position
and of the last position of x_1 .. x_n x_n, until a model cannot tell the two apart. CoG attention
(2024, arXiv 2411.07176) measures this gap.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.tasks.base import Batch, Figures, mean
from zoo.tasks.registry import task
from zoo.tasks.tagging import TaggingFigures, TokenTagging


@torch.no_grad()
def representation_gap(model: nn.Module, tokens: Tensor) -> Tensor:
    """Relative change of the final representation when the last token is repeated.

    |h(x x_n) - h(x)| / |h(x)| with h the representation at the last position, as the output layer
    reads it. The model is causal: one pass over x x_n holds both.

    Args:
        model: Causal model with a method `hidden` from (B, N) to (B, N, C), as `decoder_lm`.
        tokens: Sequences x, (B, N), N at least 1.

    Returns:
        (B,) in float32.

    Raises:
        ZooError: The model has no `hidden`, or the sequences are empty.
    """
    hidden = getattr(model, "hidden", None)
    if not callable(hidden):
        raise ZooError(
            f"{type(model).__name__} has no method hidden(tokens), which the representation gap "
            "is measured by; allowed: models that have it, such as decoder_lm"
        )
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ZooError(f"tokens of shape {tuple(tokens.shape)} must be (batch, at least 1)")
    x, repeated = hidden(torch.cat([tokens, tokens[:, -1:]], 1))[:, -2:].float().unbind(1)
    return (repeated - x).norm(dim=-1) / x.norm(dim=-1)


class CollapseFigures(TaggingFigures):
    """The figures of tagging and the mean representation gap."""

    def __init__(self) -> None:
        super().__init__()
        self.gap = mean()

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Take in logits (B, T, V), targets (B, T) and gaps (B,)."""
        super().update(logits, batch)
        self.gap.update(batch["gap"])

    def compute(self) -> dict[str, Tensor]:
        """Return accuracy, exact, representation_gap and loss."""
        found = super().compute()
        return {name: found[name] for name in ("accuracy", "exact")} | {
            "representation_gap": self.gap.compute(),
            "loss": found["loss"],
        }


@task("collapse")
class CollapseProbe(TokenTagging):
    """Predict the target of every marked position, and measure the representation gap.

    x is every sequence of a split without its last token, so that none gets longer than the data.

    Args:
        model: From tokens (B, T) to logits (B, T, V), with a method `hidden`.
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
    """

    names = ("accuracy", "exact", "representation_gap", "loss")

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return CollapseFigures()

    def take(self, index: int, batch: Batch) -> None:
        """Take a batch into the figures of a split.

        Args:
            index: Number of the split, 0 for validation.
            batch: The batch.
        """
        gap = representation_gap(self.model, batch["tokens"][:, :-1])
        super().take(index, batch | {"gap": gap})
