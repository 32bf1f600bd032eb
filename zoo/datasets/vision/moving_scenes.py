"""Videos of a few coloured shapes that move, bounce off the edges and hide each other.

The smallest form of the videos on which MESH (Zhang et al. 2023, arXiv 2301.13197) asks whether an
object keeps its slot: with `enter`, an object appears in a later frame and must take a slot that
held nothing; with `leave`, one disappears. An object that is hidden for a while is still present.

A batch holds, for B videos of T frames and up to M = max_objects objects,

    video     (B, T, 3, H, W) float, from 0 to 1
    masks     (B, T, M, H, W) bool: visible pixels; object m is the same in all frames
    count     (B,) int: number of objects of the whole video; rows of M from there on are empty
    present   (B, T, M) bool: whether the object is in the scene, seen or hidden
    shape, colour (B, M) int: index into `shapes`, `colours`
    size      (B, M) float: side of the box around the shape over the image's shorter side
    position  (B, T, M, 2) float: (x, y) of its middle from 0 to 1, x to the right, y downwards

Every object shows at least `min_visible` pixels, and at most a share `max_overlap` of its pixels is
hidden, in the frame where it appears; afterwards it may be hidden altogether. At least one object
is there in all frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.registry import dataset
from zoo.datasets.vision.scenes import SceneData


@dataset("moving_scenes")
@dataclass(kw_only=True, eq=False, repr=False)
class MovingScenes(SceneData):
    """Videos of two to four moving shapes that hide each other, appear and disappear, with masks.

    After the videos of Zhang et al. 2023, arXiv 2301.13197; drawn, no download.

    Args:
        frames: Frames of a video, T.
        speed: Largest distance an object moves from one frame to the next, over the shorter side
            of the image; the least is half of it.
        enter: Probability that an object appears after the first frame.
        leave: Probability that an object disappears before the last frame.
        height: Pixels, H.
        width: Pixels, W.
        min_objects: Fewest objects of a video.
        max_objects: Most objects of a video, M; all numbers between are equally likely.
        shapes: Names of shapes: square, circle, triangle, diamond, cross.
        colours: Names of colours: red, green, blue, yellow, magenta, cyan, orange, white.
        sizes: Sizes to draw from, the side of the box around a shape over the shorter side of the
            image.
        distinct_colours: Let no two objects of a scene have the same colour.
        background: "black", "grey" (a level for each video) or "texture" (grey waves); at rest.
        min_visible: Fewest pixels that are seen of an object in the frame where it appears.
        max_overlap: Largest share of an object's pixels that others hide in that frame.
        smooth: Smooth the edges in the image; masks are of whole pixels all the same.
        train_size: Number of training videos, repeated in epochs; None draws new ones forever.
        val_size: Number of validation videos.
        test_size: Number of test videos.
        batch_size: Training videos per step.
        eval_batch_size: Videos per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size, number or name; or, when videos are drawn, objects that find
            no place.
    """

    frames: int = 4
    speed: float = 0.15
    enter: float = 0.3
    leave: float = 0.0
    val_size: int = 256
    test_size: int = 256
    batch_size: int = 32
    eval_batch_size: int = 64

    task = "object_videos"
    block = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.frames = checks.whole("frames", self.frames, 2)
        self.speed = checks.number("speed", self.speed, 0, 1)
        self.enter = checks.number("enter", self.enter, 0, 1)
        self.leave = checks.number("leave", self.leave, 0, 1)
        self._look = replace(
            self._look,
            frames=self.frames,
            speed=float(self.speed),
            enter=float(self.enter),
            leave=float(self.leave),
        )

    def example(self) -> tuple[Tensor, ...]:
        """Return a video (1, T, 3, H, W)."""
        return (torch.zeros(1, self.frames, *self.image_shape),)

    def draw(self, rows: int, source: torch.Generator) -> dict[str, Tensor]:
        """Return so many videos."""
        videos = self.film(rows, source)
        del videos["size_index"]
        return {"video": videos.pop("image"), **videos}
