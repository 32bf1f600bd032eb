"""Handwritten digits of 8x8 pixels that come with scikit-learn, with corrupted test sets.

1797 images from the UCI collection "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak, 1998), values 0 to 16, cut into 1197 for training, 240 for validation and 360 for test by
a fixed permutation. The corruptions separate models that the clean set does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.order import generator
from zoo.datasets.registry import dataset
from zoo.datasets.vision.images import ImageData, Split, permutation

TRAIN, VAL, TEST = 1197, 240, 360
NOISE = 0.3
OCCLUSION = 3
_LEVELS = 16


def occlude(images: Tensor, source: torch.Generator) -> Tensor:
    """Set a square of 3x3 pixels at a random place of every image (N, 1, H, W) to 0."""
    height, width = images.shape[-2:]
    top = torch.randint(height - OCCLUSION + 1, (len(images), 1, 1, 1), generator=source)
    left = torch.randint(width - OCCLUSION + 1, (len(images), 1, 1, 1), generator=source)
    row, column = torch.arange(height)[:, None], torch.arange(width)
    inside = (row >= top) & (row < top + OCCLUSION) & (column >= left) & (column < left + OCCLUSION)
    return images.masked_fill(inside, 0)


def add_noise(images: Tensor, source: torch.Generator) -> Tensor:
    """Add Gaussian noise of standard deviation 0.3 to images with values from 0 to 1."""
    return images + NOISE * torch.randn(images.shape, generator=source)


def shift(images: Tensor, source: torch.Generator) -> Tensor:
    """Move every image by one pixel to one of the eight sides and corners; 0 moves in."""
    moves = torch.tensor([(y, x) for y in (0, 1, 2) for x in (0, 1, 2) if (y, x) != (1, 1)])
    chosen = torch.randint(len(moves), (len(images),), generator=source)
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    views = [padded[..., y : y + height, x : x + width] for y, x in moves.tolist()]
    return torch.stack(views)[chosen, torch.arange(len(images))]


CORRUPTIONS = {"occlusion": occlude, "noise": add_noise, "shift": shift}


@dataset("digits")
@dataclass(kw_only=True, eq=False, repr=False)
class Digits(ImageData):
    """Handwritten digits of 8x8 pixels, with occluded, noisy and shifted test sets.

    Alpaydin and Kaynak, 1998, bundled with scikit-learn; no download.

    Args:
        few_shot: Train on the first so many of the 1197 training images; None takes all.
        batch_size: Training images per step.
        eval_batch_size: Images per validation or test batch.
        seed: Seed of the training order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size.
    """

    classes = tuple("0123456789")
    image_shape = (1, 8, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.few_shot = checks.optional(checks.whole)("few_shot", self.few_shot, 1, TRAIN)

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, "test" first."""
        return ["test", *CORRUPTIONS]

    def read(self) -> Mapping[str, Split]:
        """Return all splits, pixels from 0 to 1."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float()[:, None] / _LEVELS
        labels = torch.from_numpy(bunch.target).long()
        train, val, test = permutation(len(labels), "digits").split((TRAIN, VAL, TEST))
        splits = {
            "train": (images[train], labels[train]),
            "val": (images[val], labels[val]),
            "test": (images[test], labels[test]),
        }
        for name, corrupt in CORRUPTIONS.items():
            source = generator("digits", name)
            splits[name] = corrupt(images[test], source), labels[test]
        return splits

    def scaling(self, train: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the pixels as they are, from 0 to 1."""
        return torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
