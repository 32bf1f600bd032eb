"""Image classification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from zoo.tasks.base import Batch, Figures, Task, mean
from zoo.tasks.registry import task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ClassificationFigures(Figures):
    """Accuracy and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.loss = mean(), mean()

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Take in logits (B, classes) for labels (B,)."""
        label = batch["label"]
        self.accuracy.update((logits.argmax(-1) == label).float())
        self.loss.update(F.cross_entropy(logits.float(), label, reduction="none"))

    def compute(self) -> dict[str, Tensor]:
        """Return accuracy and loss."""
        return {"accuracy": self.accuracy.compute(), "loss": self.loss.compute()}


@task("classification")
class ImageClassification(Task):
    """Name the class of an image.

    Args:
        model: From images (B, C, H, W) to logits (B, classes).
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
    """

    names = ("accuracy", "loss")

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return ClassificationFigures()

    def logits(self, batch: Batch) -> Tensor:
        """Return (B, classes)."""
        return self.model(batch["image"])

    def pictures(self, batch: Batch) -> dict[str, Figure]:
        """Draw the gates of modules on feature maps, where the model has any."""
        from zoo.pictures.figures import feature_modules, gate_figure

        if not feature_modules(self.model):
            return {}
        return {"gates": gate_figure(self.model, batch["image"], title="gates over the input")}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(logits.float(), batch["label"])
