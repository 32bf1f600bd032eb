"""Scenes of a few coloured shapes, with masks: the cheap form of Tetrominoes and Multi-dSprites.

Locatello et al. 2020 (arXiv 2006.15055) find objects in such scenes. Here two to four squares,
circles and triangles in six colours lie on a black background of 32x32 pixels; they may hide each
other (`max_overlap`), and backgrounds may be grey or waves.

A batch holds, for B scenes of up to M = max_objects objects,

    image     (B, 3, H, W) float, from 0 to 1
    masks     (B, M, H, W) bool: visible pixels; no pixel is in two masks, the rest is background
    count     (B,) int: number of objects; rows of M from there on are empty, all zeros
    present   (B, M) bool: whether there is such an object
    shape, colour (B, M) int: index into `shapes`, `colours`
    size      (B, M) float: side of the box around the shape over the image's shorter side
    position  (B, M, 2) float: (x, y) of its middle from 0 to 1, x to the right, y downwards

Objects are in order of depth: each hides those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.generated import GeneratedData
from zoo.datasets.registry import dataset
from zoo.datasets.vision import sprites
from zoo.datasets.vision.colour_images import ObjectImages
from zoo.datasets.vision.sprites import Look
from zoo.errors import ZooError


def named(option: str, values: object, known: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a list option, each of which must be known.

    Raises:
        ZooError: Not a list, an empty one, a name twice, or an unknown name.
    """
    names = checks.several(option, values)
    if not names:
        raise checks.wrong(option, names, f"at least one of {', '.join(known)}")
    for name in names:
        checks.choice(f"name in {option}", name, known)
    return tuple(names)


@dataclass(kw_only=True, eq=False, repr=False)
class SceneData(ObjectImages, GeneratedData):
    """Base of the drawn scenes: what is in them and how it is drawn.

    Args:
        height: Pixels, H.
        width: Pixels, W.
        min_objects: Fewest objects of a scene.
        max_objects: Most objects of a scene, M; all numbers between are equally likely.
        shapes: Names of shapes: square, circle, triangle, diamond, cross.
        colours: Names of colours: red, green, blue, yellow, magenta, cyan, orange, white.
        sizes: Sizes to draw from, the side of the box around a shape over the shorter side of the
            image.
        distinct_colours: Let no two objects of a scene have the same colour.
        background: "black", "grey" (a level for each scene) or "texture" (grey waves).
        min_visible: Fewest pixels that are seen of an object.
        max_overlap: Largest share of an object's pixels that others hide; 0 keeps objects apart.
        smooth: Smooth the edges in the image; masks are of whole pixels all the same.
        train_size: Number of training scenes, repeated in epochs; None draws new ones forever.
        val_size: Number of validation scenes.
        test_size: Number of test scenes.
        batch_size: Training scenes per step.
        eval_batch_size: Scenes per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.
    """

    height: int = 32
    width: int = 32
    min_objects: int = 2
    max_objects: int = 4
    shapes: Sequence[str] = ("square", "circle", "triangle")
    colours: Sequence[str] = ("red", "green", "blue", "yellow", "magenta", "cyan")
    distinct_colours: bool = False
    sizes: Sequence[float] = (0.25, 0.4)
    background: str = "black"
    min_visible: int = 8
    max_overlap: float = 0.5
    smooth: bool = False

    task = "objects"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.height = checks.whole("height", self.height, 4)
        self.width = checks.whole("width", self.width, 4)
        self.max_objects = checks.whole("max_objects", self.max_objects, 1)
        self.min_objects = checks.whole("min_objects", self.min_objects, 1, self.max_objects)
        self.min_visible = checks.whole("min_visible", self.min_visible, 1)
        self.max_overlap = checks.number("max_overlap", self.max_overlap, 0, 1)
        self.smooth = checks.flag("smooth", self.smooth)
        self.distinct_colours = checks.flag("distinct_colours", self.distinct_colours)
        checks.choice("background", self.background, sprites.BACKGROUNDS)
        sizes = checks.each(checks.number)("sizes", self.sizes, 0, 1)
        if not sizes:
            raise checks.wrong("sizes", sizes, "a list of at least one number")
        self._look = Look(
            height=self.height,
            width=self.width,
            frames=1,
            min_objects=self.min_objects,
            max_objects=self.max_objects,
            shapes=named("shapes", self.shapes, sprites.SHAPES),
            colours=named("colours", self.colours, tuple(sprites.COLOURS)),
            sizes=tuple(float(size) for size in sizes),
            background=self.background,
            min_visible=self.min_visible,
            max_overlap=float(self.max_overlap),
            smooth=self.smooth,
            distinct=self.distinct_colours,
        )
        if self.distinct_colours and self.max_objects > len(self._look.colours):
            raise ZooError(
                f"max_objects={self.max_objects} objects cannot have distinct_colours: there are "
                f"{len(self._look.colours)} colours"
            )
        # No shape has more pixels than its box.
        side = min(sizes) * min(self.height, self.width)
        if side * side < self.min_visible:
            raise ZooError(
                f"sizes holds {min(sizes)}, a box of {side:.1f}x{side:.1f} pixels, which cannot "
                f"show min_visible={self.min_visible} pixels"
            )

    def parameters(self) -> dict[str, Any]:
        """Return all that the scenes depend on."""
        return asdict(self._look)

    def film(self, rows: int, source: torch.Generator) -> dict[str, Tensor]:
        """Draw scenes as videos.

        Args:
            rows: Number of scenes, B.
            source: Source of randomness.

        Returns:
            Images (B, T, 3, H, W), masks (B, T, M, H, W) and the objects' properties, those that
            change with time (B, T, M, ...).
        """
        look = self._look
        objects, visible, count = sprites.place(rows, look, source)
        there = torch.arange(look.max_objects) < count[:, None]
        scale = torch.tensor([look.width, look.height])
        return {
            "image": sprites.paint(objects, visible, sprites.backdrop(rows, look, source), look),
            "masks": visible.transpose(1, 2),
            "count": count,
            "present": (objects["alive"] & there[..., None]).transpose(1, 2),
            "shape": objects["shape"],
            "colour": objects["colour"],
            "size": torch.tensor(look.sizes)[objects["size"]] * there,
            "position": (objects["centre"] / scale).transpose(1, 2),
            "size_index": objects["size"],
        }

    def still(self, rows: int, source: torch.Generator) -> dict[str, Tensor]:
        """Draw scenes at rest: `film` without its axis of time."""
        film = self.film(rows, source)
        return film | {name: film[name][:, 0] for name in ("image", "masks", "present", "position")}


@dataset("scenes")
@dataclass(kw_only=True, eq=False, repr=False)
class Scenes(SceneData):
    """Scenes of two to four coloured shapes of 32x32 pixels, with a mask for each.

    After the sets of Locatello et al. 2020, arXiv 2006.15055; drawn, no download.

    Args:
        height: Pixels, H.
        width: Pixels, W.
        min_objects: Fewest objects of a scene.
        max_objects: Most objects of a scene, M; all numbers between are equally likely.
        shapes: Names of shapes: square, circle, triangle, diamond, cross.
        colours: Names of colours: red, green, blue, yellow, magenta, cyan, orange, white.
        sizes: Sizes to draw from, the side of the box around a shape over the shorter side of the
            image.
        distinct_colours: Let no two objects of a scene have the same colour.
        background: "black", "grey" (a level for each scene) or "texture" (grey waves).
        min_visible: Fewest pixels that are seen of an object.
        max_overlap: Largest share of an object's pixels that others hide; 0 keeps objects apart.
        smooth: Smooth the edges in the image; masks are of whole pixels all the same.
        train_size: Number of training scenes, repeated in epochs; None draws new ones forever.
        val_size: Number of validation scenes.
        test_size: Number of test scenes.
        batch_size: Training scenes per step.
        eval_batch_size: Scenes per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size, number or name; or, when scenes are drawn, objects that find
            no place.
    """

    def draw(self, rows: int, source: torch.Generator) -> dict[str, Tensor]:
        """Return so many scenes."""
        scenes = self.still(rows, source)
        del scenes["size_index"]
        return scenes
