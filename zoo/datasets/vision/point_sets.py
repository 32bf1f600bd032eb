"""Sets of random points to be reproduced: the smallest task that identical slots fail.

N points, each uniform in [-1, 1]^D; the encoded set must come out again in any order. A model
whose slots begin identical, and stay so, can only say the mean of the set N times: an error of
(1 - 1/N) / 3 per coordinate, 0.25 for N = 4. A way out is what MESH (Zhang et al. 2023,
arXiv 2301.13197) offers.

A batch holds

    points    (B, N, D) float: the input
    targets   (B, N, D) float: the same
    present   (B, N) bool: all true
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.generated import GeneratedData
from zoo.datasets.registry import dataset


@dataset("point_sets")
@dataclass(kw_only=True, eq=False, repr=False)
class PointSets(GeneratedData):
    """Sets of uniform random points to be reproduced, which breaks ties between slots or fails.

    The zoo's own smallest test of Zhang et al. 2023, arXiv 2301.13197; drawn, no download.

    Args:
        points: Points of a set, N.
        coordinates: Coordinates of a point, D.
        train_size: Number of training sets, repeated in epochs; None draws new ones forever.
        val_size: Number of validation sets.
        test_size: Number of test sets.
        batch_size: Training sets per step.
        eval_batch_size: Sets per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size.
    """

    points: int = 4
    coordinates: int = 4
    batch_size: int = 32

    task = "sets"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.points = checks.whole("points", self.points, 1)
        self.coordinates = checks.whole("coordinates", self.coordinates, 1)

    def model_facts(self) -> dict[str, Any]:
        """Return max_objects, the points of a set, and properties, the width of a point."""
        return {"max_objects": self.points, "properties": self.coordinates}

    def task_facts(self) -> dict[str, Any]:
        """Return the layout of a target: coordinates only."""
        return {"coordinates": self.coordinates, "classes": (), "flagged": False}

    def example(self) -> tuple[Tensor, ...]:
        """Return a set (1, N, D)."""
        return (torch.zeros(1, self.points, self.coordinates),)

    def parameters(self) -> dict[str, Any]:
        """Return all that the sets depend on."""
        return {"points": self.points, "coordinates": self.coordinates}

    def draw(self, rows: int, source: torch.Generator) -> dict[str, Tensor]:
        """Return so many sets."""
        points = 2 * torch.rand(rows, self.points, self.coordinates, generator=source) - 1
        present = torch.ones(rows, self.points, dtype=torch.bool)
        return {"points": points, "targets": points, "present": present}
