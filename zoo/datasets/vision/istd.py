"""Shadow removal from local folders laid out as ISTD: images, masks and images without shadow.

ISTD (Wang, Li and Yang 2018, arXiv 1712.02478) has 1330 triplets for training and 540 for test, and
ISTD+ (Le and Samaras 2019, arXiv 1908.08628) other targets, whose colours are corrected; where
their files lie is in `zoo.datasets.vision.istd_files`.

A batch holds image, mask and target as that of `shadows` does; training takes random crops,
validation and test whole images, one at a time where sizes differ. Names of ISTD are SCENE-NUMBER,
and validation sets whole scenes aside, since the pictures of a scene are nearly alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo import checks
from zoo.datasets.base import DataModule, content_hash
from zoo.datasets.batches import Source
from zoo.datasets.order import Order, Stream
from zoo.datasets.registry import dataset
from zoo.datasets.vision.colour_images import MaskedImages
from zoo.datasets.vision.images import permutation
from zoo.datasets.vision.istd_files import TARGETS, Crops, Files, Triplet, Whole, find, read
from zoo.datasets.vision.object_files import Unreadable
from zoo.errors import ZooError
from zoo.pictures.colour import MATRICES

EMBEDDED = (
    "get ISTD or ISTD+ and say where it lies (root=FOLDER), or take data set 'shadows', which "
    "draws shadows on photographs that come with scikit-learn"
)


@dataset("istd")
@dataclass(kw_only=True, eq=False, repr=False)
class ISTD(MaskedImages, DataModule):
    """Photographs with a shadow, its mask, and the same without, in a local folder as ISTD's.

    Triplets that lack a file, or have one that cannot be read, are left out with a warning that
    names them; `skipped` holds them all. Every file is read once at the beginning.

    Args:
        root: The folder that holds train_A, train_B, train_C, test_A, test_B and test_C.
        targets: "corrected" for those of ISTD+, "original", or "auto" for the first of them there.
        height: Pixels of a training crop, H; the paper's 320.
        width: Pixels of a training crop, W.
        augment: Mirror crops, and turn them if they are square. The paper changes colours and mixes
            images as well.
        mask_error: Most pixels by which the masks of training are grown or shrunk.
        val_share: Share of the training scenes for validation, by a fixed permutation.
        limit: Take the first so many triplets of training and of test only; None takes all.
        hold: Keep all images in memory, 7 bytes a pixel (4 GB for ISTD); otherwise they are read
            whenever they are needed.
        tiles: Evaluate on overlapping tiles of the size of crops, for models that take no other.
        compare_at: Side of a square that images are scaled to before they are compared, 256 in the
            papers; None compares them as they are.
        white: White of L*a*b* in figures, "D65", or "D50" as in the papers' MATLAB code.
        perceptual: Add the paper's perceptual loss, which takes the weights of VGG-19.
        batch_size: Training crops per step.
        eval_batch_size: Images per validation or test batch, if they are of one size.
        seed: Seed of the training order and crops.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible value; or, when files are read, an empty folder, or a mask and an
            image of different size.
    """

    needs = "files"

    root: str
    targets: str = "auto"
    height: int = 320
    width: int = 320
    augment: bool = True
    mask_error: int = 10
    val_share: float = 0.1
    limit: int | None = None
    hold: bool = True
    tiles: bool = False
    compare_at: int | None = None
    white: str = "D65"
    perceptual: bool = False
    batch_size: int = 4
    eval_batch_size: int = 4

    task = "restoration"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("targets", self.targets, TARGETS)
        checks.choice("white", self.white, MATRICES)
        for name in ("height", "width"):
            setattr(self, name, checks.whole(name, getattr(self, name), 8))
        self.mask_error = checks.whole("mask_error", self.mask_error, 0)
        for name in ("augment", "hold", "tiles", "perceptual"):
            setattr(self, name, checks.flag(name, getattr(self, name)))
        self.val_share = checks.number("val_share", self.val_share, 0, 0.9)
        self.limit = checks.optional(checks.whole)("limit", self.limit, 2)
        self.compare_at = checks.optional(checks.whole)("compare_at", self.compare_at, 8)
        self.skipped: dict[str, str] = {}
        """Files that were left out, and why."""
        self._splits: dict[str, Whole] = {}
        self._alike: dict[str, bool] = {}
        self._digest = ""

    def task_facts(self) -> dict[str, Any]:
        """Return how images are evaluated, and whether to add the perceptual loss."""
        return {
            "tile": self.image_shape[1:] if self.tiles else None,
            "compare_at": self.compare_at,
            "white": self.white,
            "perceptual": self.perceptual,
        }

    def load(self) -> None:
        """Read all files once.

        Raises:
            ZooError: There are too few triplets, or files of different size in one.
        """
        root, digests, parts = Path(self.root), [], {}
        for split in ("train", "test"):
            files, alone = find(root, split, self.targets)
            self.skipped |= alone
            parts[split] = self._read(files[: self.limit])
        self._warn()
        train = parts.pop("train")
        scenes = sorted({_scene(files) for files, *_ in train})
        held = max(1, round(self.val_share * len(scenes)))
        if len(scenes) < 2 or not parts["test"]:
            raise ZooError(
                f"root={self.root!r} holds {len(scenes)} readable scenes for training and "
                f"validation, and {len(parts['test'])} images for test, {len(self.skipped)} files "
                f"being left out; two and one are needed at least, in train_A, train_B, train_C "
                f"and test_A, test_B, test_C (targets={self.targets!r}); {EMBEDDED}"
            )
        order = permutation(len(scenes), self.name).tolist()
        aside = {scenes[n] for n in order[-held:]}
        parts["train"] = [part for part in train if _scene(part[0]) not in aside]
        parts["val"] = [part for part in train if _scene(part[0]) in aside]
        for split, items in sorted(parts.items()):
            kept = [triplet for *_, triplet in items if triplet is not None]
            self._splits[split] = Whole([f for f, *_ in items], kept if self.hold else None)
            self._alike[split] = len({size for _, size, _, _ in items}) == 1
            digests += [split, *(digest for _, _, digest, _ in items)]
        self._digest = content_hash(*digests)

    def _read(
        self, files: Sequence[Files]
    ) -> list[tuple[Files, tuple[int, ...], str, Triplet | None]]:
        """Read triplets: files, size, hash, and the images if they are to be held."""
        found = []
        for item in files:
            try:
                triplet = read(item)
            except Unreadable as error:
                self.skipped[str(error.path)] = error.reason
                continue
            size, digest = tuple(triplet[0].shape), content_hash(*triplet)
            found.append((item, size, digest, triplet if self.hold else None))
        return found

    def _warn(self) -> None:
        if self.skipped:
            some = "; ".join(f"{name} ({why})" for name, why in list(self.skipped.items())[:3])
            warnings.warn(
                f"{len(self.skipped)} files of {self.root} are left out: "
                f"{some}{' ...' if len(self.skipped) > 3 else ''}",
                stacklevel=3,
            )

    def source(self, split: str) -> Source:
        """Return the images of a split, random crops of those for training."""
        whole = self._splits[split]
        if split != "train":
            return whole
        return Crops(whole, (self.height, self.width), self.augment, self.mask_error, self.seed)

    def size(self, split: str) -> int:
        """Return the number of images of a split."""
        return len(self._splits[split].files)

    def eval_rows(self, split: str) -> int:
        """Return the images per batch: one where they differ in size."""
        return self.eval_batch_size if self._alike[split] else 1

    def order(self) -> Order:
        """Return the places of a stream; which image lies at one is the crops' business."""
        return Stream(self.batch_size)

    def digest(self) -> str:
        """Return the hash of all images, masks and targets."""
        return self._digest


def _scene(files: Files) -> str:
    return files[0].stem.split("-")[0]
