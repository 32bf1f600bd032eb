"""Same or different: are the two marked shapes of an image the same shape.

Fleuret et al. (2011, PNAS 108) and Kim, Ricci and Serre (2018, Interface Focus 8) found that
networks of convolutions learn such relations badly: the answer is not in any one place of the
image, nor in how much of which shape there is.

Shapes are bitmaps of 3x3 pixels, 3 to 6 of them set, that touch all four sides: 274 in all. They
stand in different cells, of 4x4 pixels each, of a grid; two are red, the others, as distractors,
green or blue. In half of the images the red shapes are the same. Every object has a brightness of
its own, and noise lies on all pixels. A fixed quarter of the shapes is kept for the test set "new",
which asks for the relation and not for the shapes; "crowded" has the shapes of training and a
distractor in each cell that is left.

A batch holds, for B images,

    image     (B, 3, H, W) float, H = W = 4 * cells
    label     (B,) int: 1 where the marked shapes are the same
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.generated import Draw, GeneratedData
from zoo.datasets.order import generator
from zoo.datasets.registry import dataset

CELL, SIDE = 4, 3
FEWEST, MOST = 3, 6
NEW_SHARE = 4
RED = 0
_DIMMEST = 0.6


@functools.cache
def shapes(new: bool = False) -> Tensor:
    """Return the bitmaps (S, 3, 3) of training, or those that training never shows.

    Args:
        new: Whether to return the latter.
    """
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=SIDE * SIDE)))
    bitmaps = every.view(-1, SIDE, SIDE)
    # One that leaves a side empty would look like another that is shifted.
    touching = bitmaps[:, [0, -1]].any(2).all(1) & bitmaps[:, :, [0, -1]].any(1).all(1)
    count = bitmaps.sum((1, 2))
    bank = bitmaps[touching & (count >= FEWEST) & (count <= MOST)]
    order = torch.randperm(len(bank), generator=generator("same_different", "shapes"))
    held_out = len(bank) // NEW_SHARE
    return bank[order[:held_out] if new else order[held_out:]]


def same_different(
    rows: int,
    source: torch.Generator,
    *,
    cells: int,
    distractors: int,
    noise: float,
    jitter: bool,
    new: bool = False,
) -> dict[str, Tensor]:
    """Draw images with two marked shapes.

    Args:
        rows: Number of images.
        source: Source of randomness.
        cells: Cells along each side of the image.
        distractors: Objects beside the two marked ones.
        noise: Standard deviation of the noise on every pixel.
        jitter: Whether each bitmap stands anywhere in its cell, or in its upper left corner.
        new: Whether the shapes are those kept from training.
    """
    bank = shapes(new)
    objects, places = 2 + distractors, cells * cells
    label = torch.randint(2, (rows,), generator=source)
    which = torch.randint(len(bank), (rows, objects), generator=source)
    # A step of 1 to S - 1 around the bank is another shape, all others alike.
    step = torch.randint(1, len(bank), (rows,), generator=source)
    which[:, 1] = (which[:, 0] + torch.where(label == 1, 0, step)) % len(bank)
    cell = torch.rand(rows, places, generator=source).argsort(1)[:, :objects]
    colour = torch.randint(RED + 1, 3, (rows, objects), generator=source)
    colour[:, :2] = RED
    light = _DIMMEST + (1 - _DIMMEST) * torch.rand(rows, objects, 1, 1, generator=source)
    # Where in its cell of 4x4 a bitmap of 3x3 begins.
    shift = torch.randint(CELL - SIDE + 1, (2, rows, objects), generator=source) * jitter

    tile = torch.zeros(rows, objects, CELL, CELL)
    at = torch.arange(SIDE)
    row = (shift[0, ..., None] + at)[..., :, None]
    column = (shift[1, ..., None] + at)[..., None, :]
    batch = torch.arange(rows)[:, None, None, None]
    item = torch.arange(objects)[:, None, None]
    tile[batch, item, row, column] = bank[which] * light
    canvas = torch.zeros(rows, 3, places, CELL, CELL)
    canvas[torch.arange(rows)[:, None], colour, cell] = tile
    grid = canvas.view(rows, 3, cells, cells, CELL, CELL).transpose(3, 4)
    image = grid.reshape(rows, 3, cells * CELL, cells * CELL)
    return {"image": image + noise * torch.randn(image.shape, generator=source), "label": label}


@dataset("same_different")
@dataclass(kw_only=True, eq=False, repr=False)
class SameDifferent(GeneratedData):
    """Same or different: whether two marked shapes among others are the same, also of new shapes.

    After Fleuret et al., 2011, and Kim, Ricci and Serre, 2018; drawn, no download.

    Args:
        cells: Cells along each side, at least 2; the image has 4 pixels for each.
        distractors: Objects beside the two marked ones, at most as many as cells are left.
        noise: Standard deviation of the noise on every pixel, whose values are from 0 to 1.
        jitter: Let each bitmap of 3x3 stand anywhere in its cell of 4x4 pixels.
        train_size: Number of training images, repeated in epochs; None draws new ones forever.
        val_size: Number of validation images.
        test_size: Number of images in each test set.
        batch_size: Training images per step.
        eval_batch_size: Images per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size.
    """

    cells: int = 3
    distractors: int = 2
    noise: float = 0.05
    jitter: bool = False

    task = "classification"
    classes: ClassVar[tuple[str, ...]] = ("different", "same")
    num_classes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cells = checks.whole("cells", self.cells, 2)
        self.distractors = checks.whole("distractors", self.distractors, 0, self.cells**2 - 2)
        self.noise = checks.number("noise", self.noise, 0)
        self.jitter = checks.flag("jitter", self.jitter)

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, "test" first."""
        return ["test", "new", "crowded"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return 3, CELL * self.cells, CELL * self.cells

    def model_facts(self) -> dict[str, Any]:
        """Return image_shape and num_classes."""
        return {"image_shape": self.image_shape, "num_classes": self.num_classes}

    def example(self) -> tuple[Tensor, ...]:
        """Return an image (1, C, H, W)."""
        return (torch.zeros(1, *self.image_shape),)

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of training, validation and the test set "test"."""
        return {name: getattr(self, name) for name in ("cells", "distractors", "noise", "jitter")}

    def drawn_by(self, split: str) -> Draw:
        """Return what draws the examples of a split."""
        changed: dict[str, dict[str, Any]] = {
            "new": {"new": True},
            "crowded": {"distractors": self.cells**2 - 2},
        }
        options = {**self.parameters(), **changed.get(split, {})}
        return functools.partial(same_different, **options)
