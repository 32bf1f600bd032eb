"""Shadows on disk: where images, masks and targets lie, their reading, and crops of them.

A file has one name in three folders, directly below the root or in a folder ``train`` or ``test``,

    train_A, test_A      images with a shadow
    train_B, test_B      masks, not 0 in the shadow (a palette's index, any colour, or alpha)
    train_C, test_C      the same without a shadow; of ISTD+ train_C_fixed_ours and
                         test_C_fixed_official, which are taken if they are there

`zoo.datasets.picture_reader` says how their numbers are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.datasets.order import Epochs, generator
from zoo.datasets.picture_reader import as_unit, read_mask, read_pixels
from zoo.datasets.vision.object_files import natural, pictures, twice
from zoo.datasets.vision.shadow_synthesis import grown
from zoo.errors import ZooError

TARGETS = ("auto", "original", "corrected")
Files = tuple[Path, Path, Path]
"""Image, mask and target."""
Triplet = tuple[Tensor, Tensor, Tensor]
"""Pixels (3, H, W), mask (1, H, W) bool, pixels (3, H, W); pixels are bytes, or numbers from 0 to 1
where a file has more than 8 bits."""


def find(root: Path, split: str, targets: str) -> tuple[list[Files], dict[str, str]]:
    """Find the triplets of a split.

    Args:
        root: The folder.
        split: "train" or "test".
        targets: One of `TARGETS`.

    Returns:
        The files in natural order of their names; and those without partners, with the reason.
    """
    folders = []
    for letter, endings in (("A", ("",)), ("B", ("",)), ("C", _endings(targets))):
        names = [f"{split}_{letter}{ending}" for ending in endings]
        choices = [base / name for name in names for base in (root, root / split)]
        folders.append(next((folder for folder in choices if folder.is_dir()), None))
    images, masks, shadowless = (_by_name(folder) for folder in folders)
    found, alone = [], {}
    for name in sorted(images, key=lambda name: natural(Path(name))):
        missing = [
            f"no {what} of its name in {folder.name if folder else 'a folder that is missing'}"
            for what, others, folder in (
                ("mask", masks, folders[1]),
                ("target", shadowless, folders[2]),
            )
            if name not in others
        ]
        if missing:
            alone[str(images[name])] = " and ".join(missing)
        else:
            found.append((images[name], masks[name], shadowless[name]))
    for others in (masks, shadowless):
        alone |= {str(others[n]): "no image of its name" for n in others if n not in images}
    return found, alone


def _endings(targets: str) -> tuple[str, ...]:
    corrected = ("_fixed_official", "_fixed_ours", "_fixed")
    return {"auto": (*corrected, ""), "original": ("",), "corrected": corrected}[targets]


def _by_name(folder: Path | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in pictures(folder, "*") if folder else ():
        if found.setdefault(path.stem, path) != path:
            raise twice(found[path.stem], path)
    return found


def read(files: Files) -> Triplet:
    """Read an image, its mask and its target.

    Raises:
        Unreadable: One of them cannot be read.
        ZooError: They differ in size.
    """
    image, mask, target = read_pixels(files[0]), read_mask(files[1]), read_pixels(files[2])
    had = image.shape[1:]
    for what, path, other in (("mask", files[1], mask), ("target", files[2], target)):
        if other.shape[1:] != had:
            raise ZooError(
                f"{what} {str(path)!r} has {other.shape[1]}x{other.shape[2]} pixels, but image "
                f"{str(files[0])!r} has {had[0]}x{had[1]}; they must be of one size"
            )
    return image, mask, target


class Whole:
    """Whole images of one split; those of a batch must be of one size.

    Args:
        files: The triplets.
        held: The triplets as read, or None to read them each time.
    """

    def __init__(self, files: Sequence[Files], held: Sequence[Triplet] | None) -> None:
        self.files, self.held = files, held

    def triplet(self, index: int) -> Triplet:
        """Return an image, its mask and its target."""
        return read(self.files[index]) if self.held is None else self.held[index]

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the batch of these triplets."""
        return batch([self.triplet(index) for index in indices.tolist()])


class Crops:
    """Random crops for training: place p of the stream is a function of seed and p.

    Args:
        whole: The training images.
        size: Height and width.
        augment: Mirror crops, and turn them if they are square.
        mask_error: Most pixels by which masks are grown or shrunk.
        seed: Of order and crops.
    """

    def __init__(
        self, whole: Whole, size: tuple[int, int], augment: bool, mask_error: int, seed: int
    ) -> None:
        self.whole, self.size, self.augment = whole, size, augment
        self.mask_error, self.seed = mask_error, seed
        self._order = Epochs(len(whole.files), 1, seed)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the crops at these places of the stream."""
        return batch([self._crop(place) for place in indices.tolist()])

    def _crop(self, place: int) -> Triplet:
        source = generator("istd", self.seed, place)
        image, mask, target = self.whole.triplet(int(self._order(place)))
        size = tuple(max(s, n) for s, n in zip(image.shape[1:], self.size, strict=True))
        top, left = (
            int(torch.randint(s - n + 1, (), generator=source))
            for s, n in zip(size, self.size, strict=True)
        )
        rows, columns = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        pieces = [_filled(x, size)[:, rows, columns] for x in (image, mask, target)]
        over, across, turned = (torch.rand(3, generator=source) < 0.5).tolist()
        if self.augment:
            sides = [side for side, flip in ((1, over), (2, across)) if flip]
            pieces = [x.flip(sides) for x in pieces]
            if turned and self.size[0] == self.size[1]:
                pieces = [x.mT for x in pieces]
        error = int(torch.randint(-self.mask_error, self.mask_error + 1, (), generator=source))
        return pieces[0], grown(pieces[1], error), pieces[2]


def _filled(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Continue an image (C, H, W) that is too small by its last pixels."""
    room = (0, size[1] - x.shape[2], 0, size[0] - x.shape[1])
    if not any(room):
        return x
    return F.pad(x[None].float(), room, mode="replicate")[0].to(x.dtype)


def batch(triplets: Sequence[Triplet]) -> dict[str, Tensor]:
    """Stack triplets of one size; pixels from 0 to 1."""
    images, masks, targets = zip(*triplets, strict=True)
    image, target = (torch.stack([as_unit(x) for x in column]) for column in (images, targets))
    return {"image": image, "mask": torch.stack(masks), "target": target}
