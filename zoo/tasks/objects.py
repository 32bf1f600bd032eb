"""Object discovery: reproduce images or videos, and be measured by how the slots share them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from zoo.models._slot_coders import Scene
from zoo.tasks._object_metrics import (
    ForegroundARI,
    MatchedIoU,
    SlotConsistency,
    refuse_too_many,
)
from zoo.tasks.base import Batch, Figures, Task, mean
from zoo.tasks.registry import task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ObjectFigures(Figures):
    """Foreground ARI, matched IoU, and the error of the reconstruction, which is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fg_ari: Metric = ForegroundARI()
        self.miou: Metric = MatchedIoU()
        self.loss = mean()

    def update(self, logits: Scene, batch: Batch) -> None:
        """Take in scenes for images or videos; those of folders may have no masks."""
        if "masks" in batch:
            refuse_too_many(batch["masks"], logits.masks.shape[-3])
            for metric in self.masked():
                metric.update(logits.masks, batch["masks"])
        self.loss.update(_errors(logits, batch))

    def masked(self) -> list[Metric]:
        """Metrics that compare masks."""
        return [self.fg_ari, self.miou]

    def compute(self) -> dict[str, Tensor]:
        """Return fg_ari, miou and loss."""
        return {
            "fg_ari": self.fg_ari.compute(),
            "miou": self.miou.compute(),
            "loss": self.loss.compute(),
        }


class VideoFigures(ObjectFigures):
    """The same over whole videos, and whether objects keep their slots."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Metric = SlotConsistency()
        self.miou = MatchedIoU(joint=True)

    def masked(self) -> list[Metric]:
        """Metrics that compare masks."""
        return [*super().masked(), self.kept]

    def compute(self) -> dict[str, Tensor]:
        """Return fg_ari, miou, kept and loss."""
        found = super().compute()
        return {**found, "kept": self.kept.compute(), "loss": found.pop("loss")}


def pixels(batch: Batch) -> Tensor:
    """The images (B, C, H, W) or videos (B, T, C, H, W) of a batch."""
    return batch["video"] if "video" in batch else batch["image"]


def _errors(scene: Scene, batch: Batch) -> Tensor:
    """Mean squared error of each sample (B,)."""
    loss = F.mse_loss(scene.image.float(), pixels(batch), reduction="none")
    return loss.flatten(1).mean(1)


@task("objects")
class ObjectDiscovery(Task):
    """Reproduce images from slots; masks are for measuring only.

    Figures: fg_ari, the adjusted Rand index over the pixels of objects; miou, the overlap of
    objects with the slots matched to them; loss, the mean squared error of the reconstruction.

    Args:
        model: From images to a `Scene`.
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
    """

    names = ("fg_ari", "miou", "loss")

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return ObjectFigures()

    def logits(self, batch: Batch) -> Scene:
        """Return what the model makes of the images."""
        return self.model(pixels(batch))

    def loss(self, logits: Scene, batch: Batch) -> Tensor:
        """Return the mean squared error of the reconstruction."""
        return _errors(logits, batch).mean()

    def pictures(self, batch: Batch) -> dict[str, Figure]:
        """Draw inputs, reconstructions, the shares of the slots and the true ones."""
        from zoo.pictures import SAMPLES, panels, segments

        count = SAMPLES
        few = {key: value[:count] for key, value in batch.items()}
        scene = self.logits(few)
        images, masks = pixels(few), few.get("masks")
        parts = scene.masks[..., None, :, :] * scene.parts
        if images.ndim == 5:  # one video, frame by frame
            images, parts = images[0], parts[0]
            masks = None if masks is None else masks[0]
            scene = Scene(*(item[0] for item in scene))
        rows = []
        for i in range(len(images)):
            truth = None
            if masks is not None:
                truth = segments(torch.cat([~masks[i].any(0, keepdim=True), masks[i]]))
            row: list[Tensor | None]
            row = [images[i], scene.image[i], truth, segments(scene.masks[i])]
            rows.append([*row, *parts[i]])
        slots = [f"slot {k}" for k in range(parts.shape[1])]
        columns = ["input", "reconstruction", "objects", "slots", *slots]
        return {"slots": panels(rows, title="what the slots take", columns=columns)}


@task("object_videos")
class VideoDiscovery(ObjectDiscovery):
    """Reproduce videos from slots that are carried from frame to frame.

    Figures as of `ObjectDiscovery`, with fg_ari and miou over whole videos (an object has one slot
    in all frames), and kept, the share of objects that are in the same slot in the next frame.

    Args:
        model: From videos to a `Scene`.
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
    """

    names = ("fg_ari", "miou", "kept", "loss")

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return VideoFigures()
