"""Set prediction: vectors in any order, matched to the true ones before they are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from zoo.errors import ZooError
from zoo.tasks._set_metrics import THRESHOLDS, SetError, SetPrecision, fill, set_errors
from zoo.tasks.base import Batch, Figures, Task, mean
from zoo.tasks.optim import Optim
from zoo.tasks.registry import task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SetFigures(Figures):
    """Squared error after matching, which is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.mse: Metric = SetError("mse")

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Take in predictions (B, K, P) for targets (B, M, P)."""
        self.mse.update(logits.float(), batch["targets"])

    def compute(self) -> dict[str, Tensor]:
        """Return mse and loss, the same."""
        mse = self.mse.compute()
        return {"mse": mse, "loss": mse}


@task("sets")
class SetReconstruction(Task):
    """Say the vectors of a set, in any order; the loss is the squared error after matching.

    Args:
        model: From sets (B, N, D) to vectors (B, K, P).
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
        coordinates: Coordinates of a target, all of it.
        classes: No classes.
        flagged: No flag.
    """

    names: Sequence[str] = ("mse", "loss")  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        optim: Optim,
        *,
        max_steps: int,
        test_names: Sequence[str],
        coordinates: int,
        classes: Sequence[int] = (),
        flagged: bool = False,
    ) -> None:
        self.coordinates, self.classes = coordinates, tuple(classes)
        self.check(flagged)
        super().__init__(model, optim, max_steps=max_steps, test_names=test_names)

    def check(self, flagged: bool) -> None:
        """Refuse targets of another layout.

        Raises:
            ZooError: They hold more than coordinates.
        """
        if self.classes or flagged:
            raise ZooError("task 'sets' is for coordinates alone; task 'properties' has classes")

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return SetFigures()

    def logits(self, batch: Batch) -> Tensor:
        """Return (B, K, P)."""
        return self.model(batch["image"] if "image" in batch else batch["points"])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean squared error after matching."""
        return set_errors(logits.float(), batch["targets"], "mse").mean()

    def pictures(self, batch: Batch) -> dict[str, Figure]:
        """Draw the first two coordinates of true and predicted sets."""
        return {"sets": draw_sets(self.logits(batch), batch)}


class PropertyFigures(Figures):
    """Average precision by distance, and the Huber loss after matching."""

    def __init__(self, coordinates: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.precision: Metric = SetPrecision(coordinates, classes)
        self.loss = mean()

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Take in predictions (B, K, P) for targets (B, M, P)."""
        wanted = fill(batch["targets"], logits.shape[1])
        self.precision.update(logits.float(), wanted)
        self.loss.update(set_errors(logits.float(), wanted, "huber"))

    def compute(self) -> dict[str, Tensor]:
        """Return the precisions and loss."""
        return {**self.precision.compute(), "loss": self.loss.compute()}


@task("properties")
class PropertyPrediction(SetReconstruction):
    """Say what is in a scene: position, size, shape and colour of every object.

    Figures: ap_inf, ap_1, ap_0.5, ap_0.25 and ap_0.125, the average precision of predictions that
    name all classes and lie near enough, in units of which a scene has six; loss, the Huber loss
    after matching.

    Args:
        model: From images (B, C, H, W) to vectors (B, K, P), all from 0 to 1.
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
        coordinates: Coordinates of a target, which come first.
        classes: Widths of the one-hots that follow.
        flagged: Whether the last number says that there is an object; it must.
    """

    names = (*(f"ap_{limit:g}" for limit in THRESHOLDS), "loss")

    def check(self, flagged: bool) -> None:
        """Refuse targets of another layout.

        Raises:
            ZooError: They have no flag.
        """
        if not flagged:
            raise ZooError(
                "task 'properties' needs targets that end in a flag; task 'sets' does not"
            )

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return PropertyFigures(self.coordinates, self.classes)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean Huber loss after matching."""
        return set_errors(logits.float(), fill(batch["targets"], logits.shape[1]), "huber").mean()


def draw_sets(predicted: Tensor, batch: Batch) -> Figure:
    """Plot the first two coordinates of targets as circles and of predictions as crosses.

    Args:
        predicted: (B, K, P).
        batch: With targets (B, M, P), present (B, M), and perhaps image (B, C, H, W).
    """
    from matplotlib.figure import Figure as Canvas

    from zoo.pictures import SAMPLES

    count = min(SAMPLES, len(predicted))
    figure = Canvas(figsize=(2.6 * count, 2.9), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    flagged = "image" in batch
    for i, axis in enumerate(axes):
        wanted, said = batch["targets"][i].cpu(), predicted[i].detach().float().cpu()
        wanted = wanted[batch["present"][i].cpu()]
        if flagged:
            axis.imshow(batch["image"][i].cpu().permute(1, 2, 0), extent=(0, 1, 1, 0))
        shade = said[:, -1].clamp(0.05, 1) if flagged else torch.ones(len(said))
        axis.scatter(wanted[:, 0], wanted[:, 1], s=90, facecolors="none", edgecolors="tab:blue")
        axis.scatter(said[:, 0], said[:, 1], marker="x", color="tab:red", alpha=shade.numpy())
        axis.tick_params(labelsize=7)
    figure.suptitle("blue: true, red: predicted, the first two coordinates", fontsize=9)
    return figure
