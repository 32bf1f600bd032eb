"""Property prediction: say what is in a scene as a set of vectors, after Locatello et al. 2020.

The set is that of the data set `scenes`; each of its M = max_objects targets is a vector in the
layout of the paper's CLEVR targets, coordinates first and the flag last:

    x, y | one-hot size | one-hot shape | one-hot colour | 1 for an object, 0 for none

with x and y from 0 to 1. Rows without an object are all zeros. A batch holds

    image     (B, 3, H, W) float, from 0 to 1
    targets   (B, M, P) float, P = 2 + sizes + shapes + colours + 1
    present   (B, M) bool: whether there is such an object
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.datasets.registry import dataset
from zoo.datasets.vision.scenes import SceneData


@dataset("scene_sets")
@dataclass(kw_only=True, eq=False, repr=False)
class SceneSets(SceneData):
    """Scenes of two to four coloured shapes, whose properties are to be predicted as a set.

    After the property prediction of Locatello et al. 2020, arXiv 2006.15055; drawn, no download.

    Args:
        height: Pixels, H.
        width: Pixels, W.
        min_objects: Fewest objects of a scene.
        max_objects: Most objects of a scene, M; all numbers between are equally likely.
        shapes: Names of shapes: square, circle, triangle, diamond, cross.
        colours: Names of colours: red, green, blue, yellow, magenta, cyan, orange, white.
        sizes: Sizes to draw from, the side of the box around a shape over the shorter side of the
            image; a class each.
        distinct_colours: Let no two objects of a scene have the same colour.
        background: "black", "grey" (a level for each scene) or "texture" (grey waves).
        min_visible: Fewest pixels that are seen of an object.
        max_overlap: Largest share of an object's pixels that others hide; 0 keeps objects apart.
        smooth: Smooth the edges in the image.
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

    task = "properties"

    @property
    def classes(self) -> tuple[int, ...]:
        """Numbers of sizes, shapes and colours."""
        look = self._look
        return len(look.sizes), len(look.shapes), len(look.colours)

    def model_facts(self) -> dict[str, Any]:
        """Return image_shape, max_objects and properties, the width of a target."""
        return super().model_facts() | {"properties": 2 + sum(self.classes) + 1}

    def task_facts(self) -> dict[str, Any]:
        """Return the layout of a target: coordinates, the widths of its one-hots, and the flag."""
        return {"coordinates": 2, "classes": self.classes, "flagged": True}

    def draw(self, rows: int, source: torch.Generator) -> dict[str, Tensor]:
        """Return so many scenes."""
        scene = self.still(rows, source)
        named = zip(("size_index", "shape", "colour"), self.classes, strict=True)
        parts = [F.one_hot(scene[name], count) for name, count in named]
        there = scene["present"][..., None]
        targets = torch.cat([scene["position"], *parts, torch.ones_like(there)], dim=-1)
        return {
            "image": scene["image"],
            "targets": targets * there,
            "present": scene["present"],
        }
