"""Sets: vectors in any order, paired with the true ones by the Hungarian method before comparison.

Task "sets" is for vectors of coordinates alone, "properties" for those of objects, with classes
and a flag (Locatello et al. 2020, arXiv 2006.15055, section on set prediction).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.metrics.sets import THRESHOLDS, SetError, SetPrecision, fill, set_errors
from zoo.tasks.base import Batch, Figures, Task, mean
from zoo.tasks.optim import Optim
from zoo.tasks.registry import task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SetFigures(Figures):
    """Squared error after pairing, which is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.error = SetError("mse")

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Take in predictions (B, K, P) for targets (B, M, P)."""
        self.error.update(logits.float(), batch["targets"])

    def compute(self) -> dict[str, Tensor]:
        """Return set_mse and loss, the same."""
        found = self.error.compute()
        return {"set_mse": found, "loss": found}


@task("sets")
class SetReconstruction(Task):
    """Say the vectors of a set, in any order.

    Figures: set_mse, the squared error after pairing, mean over vectors and coordinates; loss, the
    same. Predictions that are left over cost nothing.

    Args:
        model: From sets (B, N, P) or images (B, C, H, W) to vectors (B, K, P).
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
        coordinates: Coordinates of a target, which come first.
        classes: Widths of the one-hots that follow; here none.
        flagged: Whether the last number says that there is an object; here not.

    Raises:
        ZooError: Targets that are laid out otherwise.
    """

    names: ClassVar[tuple[str, ...]] = ("set_mse", "loss")

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
        self.check_layout(flagged)
        super().__init__(model, optim, max_steps=max_steps, test_names=test_names)

    def check_layout(self, flagged: bool) -> None:
        """Refuse targets of another layout."""
        if self.classes or flagged:
            raise ZooError(
                f"task 'sets' takes targets of coordinates alone, not classes={self.classes} and "
                f"flagged={flagged}; use task 'properties'"
            )

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return SetFigures()

    def logits(self, batch: Batch) -> Tensor:
        """Return (B, K, P)."""
        return self.model(batch["image"] if "image" in batch else batch["points"])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean squared error after pairing."""
        return set_errors(logits.float(), batch["targets"], "mse").mean()

    def pictures(self, batch: Batch) -> dict[str, Figure]:
        """Draw the first coordinates of true and predicted sets."""
        return {"sets": draw_sets(self.logits(batch), batch)}


class PropertyFigures(Figures):
    """Average precision by distance, squared error, and the Huber loss after pairing."""

    def __init__(self, coordinates: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.precision = SetPrecision(coordinates, classes)
        self.error = SetError("mse")
        self.loss = mean()

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Take in predictions (B, K, P) for targets (B, M, P)."""
        wanted = fill(batch["targets"], logits.shape[1])
        self.precision.update(logits.float(), wanted)
        self.error.update(logits.float(), wanted)
        self.loss.update(set_errors(logits.float(), wanted, "huber"))

    def compute(self) -> dict[str, Tensor]:
        """Return the precisions, set_mse and loss."""
        found = self.precision.compute()
        return {**found, "set_mse": self.error.compute(), "loss": self.loss.compute()}


@task("properties")
class PropertyPrediction(SetReconstruction):
    """Say what is in a scene: position, size, shape and colour of every object.

    Figures: ap_inf, ap_1, ap_0.5, ap_0.25 and ap_0.125, the average precision of predictions that
    name all classes and lie nearer than that, where the image's sides are 6; set_mse, the squared
    error after pairing; loss, the Huber loss after pairing.

    Args:
        model: From images (B, C, H, W) to vectors (B, K, P), all from 0 to 1.
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
        coordinates: Coordinates of a target, which come first.
        classes: Widths of the one-hots that follow.
        flagged: Whether the last number says that there is an object; it must.

    Raises:
        ZooError: Targets that are laid out otherwise.
    """

    names: ClassVar[tuple[str, ...]] = (
        *(f"ap_{limit:g}" for limit in THRESHOLDS),
        "set_mse",
        "loss",
    )

    def check_layout(self, flagged: bool) -> None:
        """Refuse targets of another layout."""
        if not flagged:
            raise ZooError(
                "task 'properties' takes targets that end in a flag; flagged=False; use task 'sets'"
            )

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return PropertyFigures(self.coordinates, self.classes)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean Huber loss after pairing."""
        return set_errors(logits.float(), fill(batch["targets"], logits.shape[1]), "huber").mean()


def draw_sets(predicted: Tensor, batch: Batch) -> Figure:
    """Plot the first two coordinates of targets as circles and of predictions as crosses.

    Args:
        predicted: (B, K, P); over an image a cross is as strong as its flag, the last number.
        batch: With targets (B, M, P), present (B, M), and perhaps image (B, C, H, W).
    """
    from matplotlib.figure import Figure as Canvas

    from zoo.pictures.figures import SAMPLES

    count = min(SAMPLES, len(predicted))
    figure = Canvas(figsize=(2.6 * count, 2.9), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for i, axis in enumerate(axes):
        said = _plane(predicted[i])
        wanted = _plane(batch["targets"][i][batch["present"][i]])
        strength = torch.ones(len(said))
        if "image" in batch:
            axis.imshow(batch["image"][i].cpu().permute(1, 2, 0).numpy(), extent=(0, 1, 1, 0))
            strength = predicted[i, :, -1].detach().float().cpu().clamp(0.05, 1)
        axis.scatter(*wanted.T.numpy(), s=90, facecolors="none", edgecolors="tab:cyan")
        axis.scatter(*said.T.numpy(), marker="x", color="tab:red", alpha=strength.numpy())
        axis.tick_params(labelsize=7)
    figure.suptitle("circles: true, crosses: predicted (first two coordinates)", fontsize=9)
    return figure


def _plane(points: Tensor) -> Tensor:
    """The first two coordinates (N, 2) of vectors, of which there may be one."""
    flat = points.detach().float().cpu()
    return torch.cat([flat, torch.zeros(len(flat), 1)], 1)[:, :2]
