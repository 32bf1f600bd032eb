"""Synthetic shadows on crops of the two photographs that come with scikit-learn; no download.

A batch holds, for B crops,

    image     (B, 3, H, W) float, from 0 to 1: with a shadow
    mask      (B, 1, H, W) bool: the shadow as a model is told it, off by a few pixels
    target    (B, 3, H, W) float, from 0 to 1: the crop without the shadow
    region    (B, 1, H, W) bool: the shadow's outline, before its edge was softened

Training, validation and test are cut from different columns of both photographs, eight pixels
apart, so that no pixel is in two of them. They are still the same two scenes and cameras: this says
nothing about other photographs, and figures are not comparable with those on ISTD.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.base import content_hash
from zoo.datasets.generated import Draw, GeneratedData
from zoo.datasets.registry import dataset
from zoo.datasets.vision import shadow_synthesis
from zoo.datasets.vision.colour_images import MaskedImages

COLUMNS = {"train": ((0, 252), (520, 640)), "val": ((260, 384),), "test": ((392, 512),)}
"""First column and the one after the last that the crops of a split lie between."""
HEIGHT, WIDTH = 427, 120
"""Largest crop."""
PLACES = 4
"""Places looked at for a crop, of which the one with most contrast is taken: half of what the
photographs show is plain sky or dark leaves."""


@functools.cache
def photographs() -> Tensor:
    """Return the photographs as bytes (2, 427, 640, 3)."""
    import numpy as np
    from sklearn.datasets import load_sample_images

    return torch.from_numpy(np.stack(load_sample_images().images))


def crops(split: str, rows: int, height: int, width: int, source: torch.Generator) -> Tensor:
    """Cut crops out of the columns of a split, some of them mirrored.

    Args:
        split: "train", "val" or "test".
        rows: Number of crops.
        height: Pixels, H.
        width: Pixels, W.
        source: Source of randomness.

    Returns:
        (rows, 3, H, W) in [0, 1].
    """
    photos = photographs()
    lefts = torch.cat([torch.arange(a, b - width + 1) for a, b in COLUMNS[split]])
    shape = (rows, PLACES, 1, 1)
    which = torch.randint(len(photos), shape, generator=source)
    left = lefts[torch.randint(len(lefts), shape, generator=source)]
    top = torch.randint(photos.shape[1] - height + 1, shape, generator=source)
    mirrored = torch.rand(shape, generator=source) < 0.5
    x = torch.arange(width)
    x = left + torch.where(mirrored, x.flip(0), x)
    y = top + torch.arange(height)[:, None]
    found = photos[which, y, x].permute(0, 1, 4, 2, 3).float() / 255  # (rows, PLACES, 3, H, W)
    best = found.flatten(3).std(-1).mean(-1).argmax(1)
    return found[torch.arange(rows), best]


@dataset("shadows")
@dataclass(kw_only=True, eq=False, repr=False)
class Shadows(MaskedImages, GeneratedData):
    """Synthetic soft shadows on crops of two photographs, with masks and the crops without them.

    The photographs come with scikit-learn; no download. The three splits are from different parts
    of them.

    Args:
        height: Pixels, H.
        width: Pixels, W.
        area: Smallest and largest share of the pixels in a shadow.
        attenuation: Least and most light that is left in a shadow, as a factor; drawn for each
            channel, most is left of blue and least of red.
        penumbra: Widest blur of a shadow's edge, as a standard deviation in pixels.
        noise: Standard deviation of the noise in a shadow at white, in linear light.
        mask_error: Most pixels by which masks are grown or shrunk.
        train_size: Number of training crops, repeated in epochs; None draws new ones forever.
        val_size: Number of validation crops.
        test_size: Number of test crops.
        batch_size: Training crops per step.
        eval_batch_size: Crops per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size or range.
    """

    height: int = 64
    width: int = 64
    area: Sequence[float] = (0.1, 0.5)
    attenuation: Sequence[float] = (0.25, 0.7)
    penumbra: float = 3.0
    noise: float = 0.02
    mask_error: int = 2
    val_size: int = 128
    test_size: int = 256
    batch_size: int = 8
    eval_batch_size: int = 64

    task = "restoration"
    block = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.height = checks.whole("height", self.height, 8, HEIGHT)
        self.width = checks.whole("width", self.width, 8, WIDTH)
        self._area = self._range("area")
        self._attenuation = self._range("attenuation")
        self.penumbra = checks.number("penumbra", self.penumbra, 0, 10)
        self.noise = checks.number("noise", self.noise, 0, 1)
        self.mask_error = checks.whole("mask_error", self.mask_error, 0, 16)

    def _range(self, option: str) -> tuple[float, float]:
        ends = checks.each(checks.number, distinct=False)(option, getattr(self, option), 0, 1)
        if len(ends) != 2 or ends[0] > ends[1]:
            raise checks.wrong(option, ends, "two numbers, the first not above the second")
        return float(ends[0]), float(ends[1])

    def parameters(self) -> dict[str, Any]:
        """Return all that the examples depend on."""
        return {
            "size": [self.height, self.width],
            "area": self._area,
            "attenuation": self._attenuation,
            "penumbra": float(self.penumbra),
            "noise": float(self.noise),
            "mask_error": self.mask_error,
            # Decoders of JPEG differ.
            "photographs": content_hash(photographs()),
        }

    def draw(self, rows: int, source: torch.Generator, split: str = "train") -> dict[str, Tensor]:
        """Return so many examples of a split.

        Args:
            rows: Number of examples.
            source: Source of randomness.
            split: "train", "val" or "test".
        """
        target = crops(split, rows, self.height, self.width, source)
        region = shadow_synthesis.outlines(rows, self.height, self.width, self._area, source)
        strength = shadow_synthesis.penumbra(region, float(self.penumbra), source)
        image = shadow_synthesis.cast(target, strength, self._attenuation, self.noise, source)
        mask = shadow_synthesis.misdrawn(region, self.mask_error, source)
        return {"image": image, "mask": mask[:, None], "target": target, "region": region[:, None]}

    def drawn_by(self, split: str) -> Draw:
        """Return what draws the examples of a split."""
        return partial(self.draw, split=split)
