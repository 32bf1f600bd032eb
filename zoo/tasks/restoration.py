"""Restoration: an image without its shadow, from the image and a mask of the shadow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo import checks
from zoo.metrics.restoration import (
    EPSILON,
    GAIN,
    INPUT,
    NAMES,
    OverImages,
    ShadowRemoval,
    best_gain,
    shrunk,
)
from zoo.pictures.colour import MATRICES, to_lab
from zoo.tasks._restoration_losses import Perceptual, shadow_loss, vgg19_features
from zoo.tasks._restoration_tiles import in_tiles
from zoo.tasks.base import Batch, Figures, Task
from zoo.tasks.optim import Optim
from zoo.tasks.registry import task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4
"""Images in a picture."""
WEIGHT = 0.001
"""Of the perceptual loss."""


class RestorationFigures(Figures):
    """What `shadow_metrics` gives, of the output and of the answers without learning.

    Args:
        white: Of L*a*b*.
        side: Images are scaled to a square of that side before they are compared; None compares
            them as they are.
    """

    def __init__(self, white: str = "D65", side: int | None = None) -> None:
        super().__init__()
        self.side = side
        self.output = ShadowRemoval(white)
        self.input = ShadowRemoval(white, [name.removesuffix("_input") for name in INPUT])
        self.gain = ShadowRemoval(white, [name.removesuffix("_gain") for name in GAIN])
        self.loss = OverImages()

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Take in outputs (B, 3, H, W)."""
        image, target = batch["image"].float(), batch["target"].float()
        region = shadow_of(batch)
        output = logits.float().clamp(0, 1)
        loss = ((output - target).square() + EPSILON).sqrt().flatten(1).mean(1)
        self.loss.update(loss, torch.ones_like(loss, dtype=torch.bool))
        if self.side is not None:
            output, image, target = (shrunk(x, self.side) for x in (output, image, target))
            region = shrunk(region.float(), self.side) > 0.5
        self.output.update(output, target, region)
        self.input.update(image, target, region)
        self.gain.update(best_gain(image, target, region), target, region)

    def compute(self) -> dict[str, Tensor]:
        """Return the figures by name."""
        found = {
            **self.output.compute(),
            **{f"{name}_input": value for name, value in self.input.compute().items()},
            **{f"{name}_gain": value for name, value in self.gain.compute().items()},
            "loss": self.loss.compute(),
        }
        found["shadow_left"] = found["lab_mae_shadow"] / found["lab_mae_shadow_input"]
        return found


def shadow_of(batch: Batch) -> Tensor:
    """Return what counts as shadow, (B, 1, H, W) bool: the region, or the mask if that is all."""
    return batch.get("region", batch["mask"]) > 0


@task("restoration")
class Restoration(Task):
    """Remove the shadow from an image.

    The loss is RASM's: the Charbonnier distance and, if asked for, the perceptual one. The figure
    `loss` is the Charbonnier distance alone. `zoo.metrics.restoration` defines the others.

    Args:
        model: From images (B, 3, H, W) in [0, 1] and masks (B, 1, H, W) to images (B, 3, H, W).
        optim: How the weights are updated.
        max_steps: Steps of the schedule.
        test_names: Names of the test sets, the first of which is "test".
        perceptual: Add the perceptual loss, which takes the weights of VGG-19.
        tile: Height and width of tiles on which larger images are evaluated; None takes them whole.
        compare_at: Side of a square that images are scaled to before they are compared; None
            compares them as they are.
        white: White of L*a*b*, "D65" or "D50".

    Raises:
        ZooError: An impossible value, or no weights of VGG-19.
    """

    names = (
        "lab_mae_shadow",
        *(name for name in NAMES if name != "lab_mae_shadow"),
        *INPUT,
        *GAIN,
        "shadow_left",
        "loss",
    )

    def __init__(
        self,
        model: nn.Module,
        optim: Optim,
        *,
        max_steps: int,
        test_names: Sequence[str],
        perceptual: bool = False,
        tile: Sequence[int] | None = None,
        compare_at: int | None = None,
        white: str = "D65",
    ) -> None:
        checks.flag("perceptual", perceptual)
        sides = checks.optional(checks.wholes)("tile", tile, 2)
        # What the figures are made with.
        self.white = checks.choice("white", white, MATRICES)
        self.compare_at = checks.optional(checks.whole)("compare_at", compare_at, 8)
        super().__init__(model, optim, max_steps=max_steps, test_names=test_names)
        self.tile = None if sides is None else (sides[0], sides[1])
        # In a list it is no part of the task, and checkpoints do not hold it.
        self._perceptual = [Perceptual(vgg19_features())] if perceptual else []

    def make_figures(self) -> Figures:
        """Return fresh metrics for a split."""
        return RestorationFigures(self.white, self.compare_at)

    def logits(self, batch: Batch) -> Tensor:
        """Return images (B, 3, H, W)."""
        image, mask = batch["image"], batch["mask"]
        if self.training or self.tile is None:
            output: Tensor = self.model(image, mask)
            return output
        return in_tiles(self.model, image, mask, self.tile)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        network = self._perceptual[0].to(logits.device) if self._perceptual else None
        return shadow_loss(logits.float(), batch["target"], network, weight=WEIGHT)

    def pictures(self, batch: Batch) -> dict[str, Figure]:
        """Draw images with shadow, restored and without, and how far off they are."""
        from zoo.pictures.figures import panels

        batch = {name: value[:SHOWN] for name, value in batch.items()}
        output = self.logits(batch).float().clamp(0, 1)
        wanted = to_lab(batch["target"], self.white)
        maps = [(to_lab(x, self.white) - wanted).abs().sum(1) for x in (batch["image"], output)]
        told, shadow = batch["mask"].float(), shadow_of(batch)
        rows = [
            [batch["image"][i], told[i], output[i], batch["target"][i], maps[0][i], maps[1][i]]
            for i in range(len(output))
        ]
        names = []
        for i in range(len(output)):
            before, after = (m[i][shadow[i, 0]].mean() if shadow[i].any() else 0.0 for m in maps)
            names.append(f"{before:.1f} to {after:.1f}")
        return {
            "restored": panels(
                rows,
                title="shadows removed, and the error in the shadow before and after",
                columns=["input", "mask", "output", "target", "error before", "error after"],
                names=names,
                label="absolute error in L*a*b*",
            )
        }
