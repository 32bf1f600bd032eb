"""Labelled images: what all image sets share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.base import DataModule, content_hash
from zoo.datasets.batches import Source
from zoo.datasets.order import Epochs, Order, generator
from zoo.datasets.parquet import checked, parquet_batches
from zoo.datasets.picture_reader import as_bytes, cell, read_pixels
from zoo.errors import ZooError

Split = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and labels (N,)."""


def permutation(size: int, *key: object) -> Tensor:
    """Return the fixed permutation of a set that its splits are cut from."""
    return torch.randperm(size, generator=generator("split", *key))


def gathered(rows: Iterable[tuple[str, object, object]], image: str, mode: str) -> Split:
    """Read the pictures and labels of a table; pixels are bytes.

    Args:
        rows: What errors call a row, its picture and its label.
        image: Name of the column with the pictures; the labels are in ``label``.
        mode: "L" for grey, "RGB" for colour.

    Raises:
        ZooError: There is no row, or one that holds no picture, no label or another size.
    """
    pixels: list[Tensor] = []
    labels: list[int] = []
    for where, picture, label in rows:
        place = f"{where}, column {image!r},"
        pixels.append(as_bytes(read_pixels(cell(picture, place), mode, place)))
        labels.append(checked(label, int, f"{where}, column 'label',"))
        if pixels[-1].shape != pixels[0].shape:
            sizes = ["x".join(map(str, each.shape[1:])) for each in (pixels[-1], pixels[0])]
            raise ZooError(f"{place} has {sizes[0]} pixels; the first row has {sizes[1]}")
    if not pixels:
        raise ZooError(f"a table with the columns {image!r} and 'label' has no rows")
    return torch.stack(pixels), torch.tensor(labels, dtype=torch.int64)


def hub_split(rows: Any, image: str, mode: str) -> Split:
    """Read a split that ``datasets`` loaded.

    Args:
        rows: The split.
        image: Name of the column with the pictures; the labels are in ``label``.
        mode: "L" for grey, "RGB" for colour.

    Raises:
        ZooError: There is no row, or one that holds no picture, no label or another size.
    """
    import datasets

    # Files as they are, so that all data sets read pictures alike and errors know the row.
    files = rows.cast_column(image, datasets.Image(decode=False))
    split = f"split {str(rows.split)!r}" if rows.split else "a split"
    named = (
        (f"row {n}, counted from 0, of {split} of the hub's data set", row[image], row["label"])
        for n, row in enumerate(files)
    )
    return gathered(named, image, mode)


def parquet_split(folder: Path, split: str, image: str, mode: str) -> Split | None:
    """Read a split from the parquet files that a copy of the hub's repository holds.

    Args:
        folder: Folder with the files, at any depth.
        split: What their names start with.
        image: Name of the column with the pictures.
        mode: "L" for grey, "RGB" for colour.

    Returns:
        The split, or None if there is no such file.

    Raises:
        ZooError: There is no row, or one that holds no picture, no label or another size.
    """
    files = sorted(folder.rglob(f"{split}*.parquet"))
    named = (
        (f"row {n}, counted from 0, of {file.name!r}", picture, label)
        for file in files
        for n, (picture, label) in enumerate(
            row
            for columns in parquet_batches(file, [image, "label"])
            for row in zip(columns[image], columns["label"], strict=True)
        )
    )
    return gathered(named, image, mode) if files else None


class Pictures:
    """Images with labels, shifted and scaled when they are taken.

    Args:
        images: Pixels (N, C, H, W).
        labels: Classes (N,).
        offset: Subtracted from the pixels, (C, 1, 1).
        scale: What they are then divided by, (C, 1, 1).
    """

    def __init__(self, images: Tensor, labels: Tensor, offset: Tensor, scale: Tensor) -> None:
        self.images, self.labels = images, labels
        self.offset, self.scale = offset, scale

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return images (B, C, H, W) in float32 and labels (B,)."""
        image = (self.images[indices].float() - self.offset) / self.scale
        return {"image": image, "label": self.labels[indices]}


@dataclass(kw_only=True, eq=False, repr=False)
class ImageData(DataModule):
    """Base of the image sets: finite splits, trained in epochs of a new permutation each.

    Args:
        few_shot: Train on the first so many images of the training split; None takes all. The
            subsets are nested and the same for every seed.
        batch_size: Training images per step.
        eval_batch_size: Images per validation or test batch.
        seed: Seed of the training order.
        num_workers: Processes that prepare batches.
    """

    few_shot: int | None = None

    task = "classification"
    classes: ClassVar[tuple[str, ...]]
    image_shape: ClassVar[tuple[int, int, int]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.few_shot = checks.optional(checks.whole)("few_shot", self.few_shot, 1)
        self._pictures: dict[str, Pictures] = {}
        self._digest = ""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def model_facts(self) -> dict[str, Any]:
        """Return image_shape and num_classes."""
        return {"image_shape": self.image_shape, "num_classes": self.num_classes}

    def example(self) -> tuple[Tensor, ...]:
        """Return an image (1, C, H, W)."""
        return (torch.zeros(1, *self.image_shape),)

    def read(self) -> Mapping[str, Split]:
        """Return the images and labels of "train", "val" and every test set."""
        raise NotImplementedError

    def scaling(self, train: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to subtract from pixels, then divide them by, each (C, 1, 1).

        Args:
            train: All training images (N, C, H, W), before ``few_shot`` takes some of them.
        """
        raise NotImplementedError

    def load(self) -> None:
        """Read the images.

        Raises:
            ZooError: They are not what the data set promises, or fewer than ``few_shot``.
        """
        splits = dict(self.read())
        for split, (images, labels) in splits.items():
            self._check(split, images, labels)
        images, labels = splits["train"]
        offset, scale = self.scaling(images)
        if self.few_shot is not None:
            if self.few_shot > len(labels):
                most = f"at most {len(labels)}, the training images of data set {self.name!r}"
                raise checks.wrong("few_shot", self.few_shot, most)
            splits["train"] = images[: self.few_shot], labels[: self.few_shot]
        for split, (images, labels) in splits.items():
            self._pictures[split] = Pictures(images, labels, offset, scale)
        parts = [item for split, pair in splits.items() for item in (split, *pair)]
        self._digest = content_hash(*parts, offset, scale)

    def _check(self, split: str, images: Tensor, labels: Tensor) -> None:
        if len(images) != len(labels) or tuple(images.shape[1:]) != self.image_shape:
            raise ZooError(
                f"data set {self.name!r} needs images of shape {self.image_shape} and a label for "
                f"each; its {split} split has {tuple(images.shape)} and {len(labels)} labels"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ZooError(
                f"data set {self.name!r} has {self.num_classes} classes; its {split} split has "
                f"labels from {int(labels.min())} to {int(labels.max())}"
            )

    def source(self, split: str) -> Source:
        """Return the images of a split."""
        return self._pictures[split]

    def size(self, split: str) -> int:
        """Return the number of images of a split."""
        return len(self._pictures[split])

    def order(self) -> Order:
        """Return the order of training: epochs, each in its own permutation."""
        return Epochs(self.size("train"), self.batch_size, self.seed)

    def digest(self) -> str:
        """Return the hash of all images, labels and the scaling."""
        return self._digest


@dataclass(kw_only=True, eq=False, repr=False)
class LargeImageData(ImageData):
    """Base of the image sets that come as a training and a test part.

    Args:
        val_size: Training images set aside for validation, by a fixed permutation.
        standardize: Give every channel mean 0 and standard deviation 1 over the training images;
            otherwise pixels lie between 0 and 1.
        few_shot: Train on the first so many images of the training split; None takes all.
        batch_size: Training images per step.
        eval_batch_size: Images per validation or test batch.
        seed: Seed of the training order.
        num_workers: Processes that prepare batches.
    """

    val_size: int = 5000
    standardize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.val_size = checks.whole("val_size", self.val_size, 1)
        self.standardize = checks.flag("standardize", self.standardize)

    def parts(self) -> tuple[Split, Split]:
        """Return the training and the test part as they come, pixels as bytes."""
        raise NotImplementedError

    def read(self) -> Mapping[str, Split]:
        """Return the splits.

        Raises:
            ZooError: There are no more images than ``val_size``.
        """
        (images, labels), test = self.parts()
        if self.val_size >= len(images):
            all_of_them = f"below {len(images)}, the training images of data set {self.name!r}"
            raise checks.wrong("val_size", self.val_size, all_of_them)
        order = permutation(len(images), self.name)
        train, val = order[: -self.val_size], order[-self.val_size :]
        return {
            "train": (images[train], labels[train]),
            "val": (images[val], labels[val]),
            "test": test,
        }

    def scaling(self, train: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation per channel, or the range of a byte."""
        channels = train.shape[1]
        if not self.standardize:
            return torch.zeros(channels, 1, 1), torch.full((channels, 1, 1), 255.0)
        # A histogram gives exact moments of bytes without a copy of all images in float.
        counts = torch.stack([c.flatten().bincount(minlength=256) for c in train.unbind(1)])
        levels = torch.arange(256, dtype=torch.float64)
        share = counts / counts.sum(dim=1, keepdim=True)
        mean = share.double() @ levels
        spread = (share.double() @ levels.square() - mean.square()).clamp(min=0).sqrt()
        # An image set of one grey has no spread; it is shifted and left at its scale.
        spread = torch.where(spread > 0, spread, 1.0)
        return mean.float()[:, None, None], spread.float()[:, None, None]
