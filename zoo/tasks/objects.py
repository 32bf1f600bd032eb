"""Object discovery: reproduce images or videos, and be measured by how the slots share them.

Task "objects" is for images, "object_videos" for videos. Only pixels are learned from; masks serve
to measure, where the data have them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from zoo.metrics.objects import (
    ForegroundARI,
    MatchedIoU,
    SlotConsistency,
    bind,
    overlaps,
    slot_labels,
)
from zoo.models.objects.slot_autoencoder import Scene
from zoo.tasks.base import Batch, Figures, Task, mean
from zoo.tasks.registry import task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pixels(batch: Batch) -> Tensor:
    """The images (B, C, H, W) or videos (B, T, C, H, W) of a batch."""
    return batch["video"] if "video" in batch else batch["image"]


def squared_errors(scene: Scene, batch: Batch) -> Tensor:
    """Mean squared error of the reconstruction of each sample, (B,)."""
    errors = F.mse_loss(scene.image.float(), pixels(batch), reduction="none")
    return errors.flatten(1).mean(1)


class ObjectFigures(Figures):
    """How slots and objects agree, and the error of the reconstruction, which is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fg_ari, self.ari = ForegroundARI(), ForegroundARI(background=True)
        self.miou = MatchedIoU()
        self.loss = mean()

    def masked(self) -> dict[str, Metric]:
        """Metrics of masks by name."""
        return {"fg_ari": self.fg_ari, "ari": self.ari, "miou": self.miou}

    def update(self, logits: Scene, batch: Batch) -> None:
        """Take in scenes; without masks only the loss is known and the rest is NaN."""
        if "masks" in batch:
            labels = slot_labels(logits.masks, batch["masks"])
            for metric in self.masked().values():
                metric.update(labels, batch["masks"])
        self.loss.update(squared_errors(logits, batch))

    def compute(self) -> dict[str, Tensor]:
        """Return the figures of masks, and loss."""
        nothing = torch.full((), torch.nan, device=self.loss.device)
        found = {
            name: metric.compute() if metric.update_called else nothing
            for name, metric in self.masked().items()
        }
        return {**found, "loss": self.loss.compute()}


class VideoFigures(ObjectFigures):
    """The same over whole videos, and whether objects keep their slots."""

    def __init__(self) -> None:
        super().__init__()
        self.miou = MatchedIoU(joint=True)
        self.tca = SlotConsistency()

    def masked(self) -> dict[str, Metric]:
        """Metrics of masks by name."""
        return {**super().masked(), "tca": self.tca}


@task("objects")
class ObjectDiscovery(Task):
    """Reproduce images from slots.

    Figures: fg_ari, the adjusted Rand index over the pixels of objects (1 is perfect, 0 chance);
    ari, over all pixels with the background as one more object; miou, the overlap of objects with
    the slots matched to them; loss, the mean squared error of the reconstruction.

    Args:
        model: From images to a `Scene`.
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
    """

    names: ClassVar[tuple[str, ...]] = ("fg_ari", "ari", "miou", "loss")

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return ObjectFigures()

    def logits(self, batch: Batch) -> Scene:
        """Return what the model makes of the images."""
        return self.model(pixels(batch))

    def loss(self, logits: Scene, batch: Batch) -> Tensor:
        """Return the mean squared error of the reconstruction."""
        return squared_errors(logits, batch).mean()

    def pictures(self, batch: Batch) -> dict[str, Figure]:
        """Draw inputs, reconstructions, what is whose, and what each slot paints.

        Images have a row each; of videos the first is drawn, a row for each frame.
        """
        from zoo.pictures.figures import SAMPLES, panels, segments

        video = pixels(batch).ndim == 5
        few = {key: value[: 1 if video else SAMPLES] for key, value in batch.items()}
        scene, images, masks = self.logits(few), pixels(few), few.get("masks")
        named = scene.masks if masks is None else in_order(scene.masks, masks)
        if video:
            images, named, scene = images[0], named[0], Scene(*(item[0] for item in scene))
            masks = None if masks is None else masks[0]
        # White where a slot has no share, as backgrounds are often black.
        shares = scene.masks[:, :, None]
        painted = shares * scene.parts + (1 - shares)
        rows: list[list[Tensor | None]] = []
        for i, image in enumerate(images):
            truth = None
            if masks is not None:
                truth = segments(torch.cat([~masks[i].any(0, keepdim=True), masks[i]]))
            rows.append([image, scene.image[i], truth, segments(named[i]), *painted[i]])
        slots = [f"slot {k}" for k in range(painted.shape[1])]
        columns = ["input", "reconstruction", "objects", "largest share", *slots]
        names = [f"frame {t}" for t in range(len(images))] if video else []
        title = "what each slot takes, in the colours of the objects it fits best"
        return {"slots": panels(rows, title=title, columns=columns, names=names)}


@task("object_videos")
class VideoDiscovery(ObjectDiscovery):
    """Reproduce videos from slots that are carried from frame to frame.

    Figures as of `ObjectDiscovery`, with fg_ari, ari and miou over whole videos, in which an object
    has one slot for all frames; and tca, the temporal consistency, the share of objects that are
    in the same slot in the next frame.

    Args:
        model: From videos to a `Scene`.
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
    """

    names: ClassVar[tuple[str, ...]] = ("fg_ari", "ari", "miou", "tca", "loss")

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return VideoFigures()


def in_order(shares: Tensor, masks: Tensor) -> Tensor:
    """Sort slots by what they fit best: the background first, then the objects, then the rest.

    Args:
        shares: Masks of the slots (B, K, H, W), or (B, T, K, H, W), where a slot keeps its place.
        masks: Masks of the objects (B, M, H, W), or (B, T, M, H, W).

    Returns:
        1 + M + K masks, those for which there is no slot zero.
    """
    if shares.ndim == 4:
        return in_order(shares[:, None], masks[:, None])[:, 0]
    truth = torch.cat([~masks.any(2, keepdim=True), masks], 2)
    labels = slot_labels(shares, masks).flatten(1)
    slot, _ = bind(overlaps(labels, truth.transpose(1, 2).flatten(2)))  # (B, 1 + M)
    sorted_shares = []
    for picture, chosen in zip(shares, slot, strict=True):
        rest = [k for k in range(picture.shape[1]) if k not in chosen.tolist()]
        empty = torch.zeros_like(picture[:, 0])
        taken = [picture[:, k] if k >= 0 else empty for k in chosen.tolist()]
        taken += [picture[:, k] for k in rest]
        taken += [empty] * (truth.shape[2] + picture.shape[1] - len(taken))
        sorted_shares.append(torch.stack(taken, 1))
    return torch.stack(sorted_shares)
