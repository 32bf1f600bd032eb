"""Images and videos of objects in local folders, laid out as CLEVR or MOVi.

`zoo.datasets.vision.object_files` says where files must lie. A batch holds, for B examples of up to
M = max_objects objects (and T frames of a video),

    image     (B, 3, H, W) float from 0 to 1, or video (B, T, 3, H, W)
    masks     (B, M, H, W) bool, or (B, T, M, H, W); only if there are masks
    present   (B, M) bool, or (B, T, M): whether there is such an object; only with masks or scenes
    count     (B,) int: number of objects; only with masks or scenes
    shape, colour, material   (B, M) int: number of the name among those that occur, in order; only
              with scenes that say so
    size      (B, M) float, likewise, or the number itself
    position  (B, M, 2) float: pixel_coords as (x, y) from 0 to 1

Mask m and the m-th object of scenes.json are the same object. Everything is scaled to one size and
held in memory as bytes, 16 kB for an image of 64x64 pixels with its masks.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.base import DataModule, content_hash
from zoo.datasets.batches import Source
from zoo.datasets.order import Epochs, Order
from zoo.datasets.registry import dataset
from zoo.datasets.vision import object_files
from zoo.datasets.vision.colour_images import ObjectImages
from zoo.datasets.vision.images import permutation
from zoo.datasets.vision.object_files import Entry, Unreadable
from zoo.errors import ZooError

LAYOUTS = ("auto", "images", "videos")
NAMED = {"shape": "shape", "colour": "color", "material": "material", "size": "size"}
"""Our names of properties, and CLEVR's."""
EMBEDDED = "without files, data set 'scenes' draws such images ('moving_scenes' videos)"


class Examples:
    """Images or videos held as bytes, and what is known of their objects.

    Args:
        pixels: (N, T, H, W, 3).
        labels: (N, T, H, W), 0 for background, or None.
        properties: Further columns.
        objects: Number of masks, M.
        still: Whether to leave out the axis of time.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor | None,
        properties: dict[str, Tensor],
        objects: int,
        still: bool,
    ) -> None:
        self.pixels, self.labels, self.properties = pixels, labels, properties
        self.objects, self.still = objects, still

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the batch of these examples."""
        video = self.pixels[indices].movedim(-1, 2).float() / 255
        batch = {"video": video}
        if self.labels is not None:
            numbers = torch.arange(1, self.objects + 1, dtype=torch.uint8)[:, None, None]
            batch["masks"] = self.labels[indices][:, :, None] == numbers
            batch["present"] = batch["masks"].flatten(3).any(-1)
            batch["count"] = batch["present"].any(1).sum(1)
        if self.still:
            batch = {name: v if name == "count" else v[:, 0] for name, v in batch.items()}
            batch["image"] = batch.pop("video")
        return batch | {name: column[indices] for name, column in self.properties.items()}


@dataset("object_folders")
@dataclass(kw_only=True, eq=False, repr=False)
class ObjectFolders(ObjectImages, DataModule):
    """Images or videos of objects in a local folder laid out as CLEVR or MOVi, masks optional.

    Files that cannot be read are left out with a warning that names them; `skipped` holds them all.

    Args:
        root: The folder, which holds ``images`` (and ``masks``, ``scenes.json``), or a folder for
            each video.
        layout: "images", "videos", or "auto" to see what is there.
        max_objects: Most objects of an example, M; more are refused.
        height: Pixels that images are scaled to, H.
        width: Pixels that images are scaled to, W.
        frames: Frames taken of a video, the first ones; a video that has fewer is left out.
        val_share: Share of the examples for validation, by a fixed permutation.
        test_share: Share of the examples for test.
        limit: Look at the first so many examples only; None takes all.
        batch_size: Training examples per step.
        eval_batch_size: Examples per validation or test batch.
        seed: Seed of the training order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible value; or, when files are read, an empty folder, a mask and an image
            of different size, more objects than allowed.
    """

    needs = "files"

    root: str
    layout: str = "auto"
    max_objects: int = 10
    height: int = 64
    width: int = 64
    frames: int = 8
    val_share: float = 0.1
    test_share: float = 0.1
    limit: int | None = None

    task = "objects"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("layout", self.layout, LAYOUTS)
        # Labels are bytes, and 0 is the background.
        self.max_objects = checks.whole("max_objects", self.max_objects, 1, 255)
        for name in ("height", "width", "frames"):
            setattr(self, name, checks.whole(name, getattr(self, name), 1))
        self.val_share = checks.number("val_share", self.val_share, 0, 1)
        self.test_share = checks.number("test_share", self.test_share, 0, 1)
        if self.val_share + self.test_share >= 1:
            raise ZooError(
                f"val_share={self.val_share!r} and test_share={self.test_share!r} leave nothing "
                "to train on; allowed: a sum below 1"
            )
        self.limit = checks.optional(checks.whole)("limit", self.limit, 3)
        self.skipped: dict[str, str] = {}
        """Files that were left out, and why."""
        self._splits: dict[str, Examples] = {}
        self._found: tuple[str, list[Entry]] | None = None
        self._digest = ""

    def example(self) -> tuple[Tensor, ...]:
        """Return an image (1, 3, H, W), or a video (1, T, 3, H, W) if the folder holds videos."""
        still = self._entries()[0] == "images"
        return (torch.zeros(1, *(() if still else (self.frames,)), *self.image_shape),)

    def load(self) -> None:
        """Read all files.

        Raises:
            ZooError: There are fewer than three examples, a mask and an image differ in size, or an
                example has more objects than allowed.
        """
        layout, entries = self._entries()
        pixels, labels, sizes, used = self._read(entries, layout)
        if len(used) < 3:
            raise ZooError(
                f"root={self.root!r} holds {len(used)} readable examples and {len(self.skipped)} "
                f"others; training, validation and test need one each; {EMBEDDED}"
            )
        properties = self._properties(used, sizes) if layout == "images" else {}
        columns = (pixels, *(() if labels is None else (labels,)), *properties.values())
        self._digest = content_hash(str(list(properties)), *columns)
        order = permutation(len(used), self.name)
        held = [max(1, round(share * len(used))) for share in (self.val_share, self.test_share)]
        if sum(held) >= len(used):
            raise ZooError(
                f"val_share={self.val_share!r} and test_share={self.test_share!r} leave nothing of "
                f"{len(used)} examples to train on"
            )
        parts = order.split([len(used) - sum(held), *held])
        for split, part in zip(("train", "val", "test"), parts, strict=True):
            self._splits[split] = Examples(
                pixels[part],
                None if labels is None else labels[part],
                {name: column[part] for name, column in properties.items()},
                self.max_objects,
                layout == "images",
            )

    def source(self, split: str) -> Source:
        """Return the examples of a split."""
        return self._splits[split]

    def size(self, split: str) -> int:
        """Return the number of examples of a split."""
        return len(self._splits[split].pixels)

    def order(self) -> Order:
        """Return the order of training: epochs, each in its own permutation."""
        return Epochs(self.size("train"), self.batch_size, self.seed)

    def digest(self) -> str:
        """Return the hash of all pixels, masks and properties."""
        return self._digest

    def _entries(self) -> tuple[str, list[Entry]]:
        if self._found is None:
            layout, entries = object_files.find(Path(self.root), self.layout)
            if not entries:
                raise ZooError(
                    f"root={self.root!r} holds neither pictures in a folder 'images' nor folders "
                    f"of a video with rgba_00000.png ... (layout={self.layout!r}); {EMBEDDED}"
                )
            self._found = layout, entries[: self.limit]
        return self._found

    def _read(
        self, entries: list[Entry], layout: str
    ) -> tuple[Tensor, Tensor | None, list[tuple[int, int]], list[Entry]]:
        size = self.height, self.width
        masked = any(entry.masks for entry in entries)
        pixels, labels, sizes, used = [], [], [], []
        for entry in entries:
            if layout == "videos":
                if len(entry.frames) < self.frames:
                    self.skipped[str(entry.frames[0].parent)] = (
                        f"{len(entry.frames)} frames, not {self.frames}"
                    )
                    continue
                entry = Entry(entry.frames[: self.frames], entry.masks[: self.frames])
            try:
                images = [object_files.read_image(path, size) for path in entry.frames]
                if masked:
                    if not entry.masks:
                        raise Unreadable(entry.frames[0], "it has no masks")
                    had = [shape for _, shape in images]
                    labels.append(object_files.read_masks(entry, had, self.max_objects, size))
            except Unreadable as error:
                self.skipped[str(error.path)] = error.reason
                continue
            pixels.append(np.stack([image for image, _ in images]))
            sizes.append(images[0][1])
            used.append(entry)
        if self.skipped:
            some = "; ".join(f"{name} ({why})" for name, why in list(self.skipped.items())[:3])
            warnings.warn(
                f"{len(self.skipped)} of {len(entries)} examples of {self.root} are left out: "
                f"{some}{' ...' if len(self.skipped) > 3 else ''}",
                stacklevel=2,
            )
        if not used:
            return torch.zeros(0), None, sizes, used
        return (
            torch.from_numpy(np.stack(pixels)),
            torch.from_numpy(np.stack(labels)) if masked else None,
            sizes,
            used,
        )

    def _properties(self, entries: list[Entry], sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Return what scenes.json says of the objects, by our names."""
        if entries[0].objects is None:
            return {}
        rows = [entry.objects or [] for entry in entries]
        for entry, row in zip(entries, rows, strict=True):
            if len(row) > self.max_objects:
                raise ZooError(
                    f"scenes.json gives {entry.frames[0].name!r} {len(row)} objects; "
                    f"max_objects={self.max_objects} must be as many at least"
                )

        def column(values: list[list[Any]], empty: Any) -> Tensor:
            return torch.tensor([row + [empty] * (self.max_objects - len(row)) for row in values])

        found = {"present": column([[True] * len(row) for row in rows], False)}
        found["count"] = found["present"].sum(1)
        for ours, theirs in NAMED.items():
            numbers = object_files.vocabulary(entries, theirs)
            if numbers:
                values = [[numbers.get(item.get(theirs), 0.0) for item in row] for row in rows]
                found[ours] = column(values, 0.0)
                if ours != "size":
                    found[ours] = found[ours].long()
        if any("pixel_coords" in item for row in rows for item in row):
            found["position"] = column(
                [
                    [[x / n for x, n in zip(_place(item), ends[::-1], strict=True)] for item in row]
                    for row, ends in zip(rows, sizes, strict=True)
                ],
                [0.0, 0.0],
            )
        return found


def _place(item: dict[str, Any]) -> tuple[float, float]:
    """Return the pixel in which the middle of an object lies; CLEVR adds a depth."""
    x, y, *_ = item.get("pixel_coords", (0.0, 0.0))
    return float(x), float(y)
