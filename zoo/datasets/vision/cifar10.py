"""CIFAR-10 (Krizhevsky, 2009): 60,000 colour images of 32x32 pixels in ten classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.datasets import hub
from zoo.datasets.registry import dataset
from zoo.datasets.vision.images import LargeImageData, Split, hub_split, parquet_split
from zoo.errors import ZooError

REPOSITORY = "uoft-cs/cifar10"
_BINARY = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}
_PIXELS = 3 * 32 * 32


def read_binary(files: list[Path]) -> Split:
    """Read files of the binary version: per image a label byte, then red, green and blue.

    Args:
        files: Files in order.

    Raises:
        ZooError: A file cannot be read, is empty, or has a fraction of an image.
    """
    records = []
    for file in files:
        try:
            content = bytearray(file.read_bytes())
        except OSError as error:
            raise ZooError(f"root: {file.name!r} cannot be read: {error.strerror}") from error
        if not content or len(content) % (1 + _PIXELS):
            raise ZooError(
                f"root: {file.name!r} has {len(content)} bytes; needed: a multiple of "
                f"{1 + _PIXELS}, the label and pixels of an image"
            )
        records.append(torch.frombuffer(content, dtype=torch.uint8).reshape(-1, 1 + _PIXELS))
    table = torch.cat(records)
    return table[:, 1:].reshape(-1, 3, 32, 32).contiguous(), table[:, 0].long()


def read_folder(folder: Path) -> tuple[Split, Split]:
    """Read training and test part from a folder of binary or parquet files.

    Args:
        folder: Folder of the binary version, or a copy of the hub's.

    Raises:
        ZooError: A file is missing or malformed.
    """
    parts: list[Split] = []
    for split, names in _BINARY.items():
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            parts.append(read_binary(files))
            continue
        found = parquet_split(folder, split, "img", "RGB")
        if found is None:
            raise ZooError(
                f"root {str(folder)!r} has no CIFAR-10 {split} part; allowed: a folder with "
                f"{', '.join(names)} or with {split}*.parquet"
            )
        parts.append(found)
    return parts[0], parts[1]


@dataset("cifar10")
@dataclass(kw_only=True, eq=False, repr=False)
class CIFAR10(LargeImageData):
    """CIFAR-10: ten classes of animals and vehicles in colour, 32x32 pixels.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    Args:
        root: Folder of the binary version or with the hub's parquet files; None asks the hub.
        val_size: Training images set aside for validation, by a fixed permutation.
        standardize: Give every channel mean 0 and standard deviation 1 over the training images;
            otherwise pixels lie between 0 and 1.
        few_shot: Train on the first so many images of the training split; None takes all.
        batch_size: Training images per step.
        eval_batch_size: Images per validation or test batch.
        seed: Seed of the training order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: The folder is missing, or an impossible size.
    """

    needs = "files or the hub"

    root: str | None = None

    classes = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    image_shape = (3, 32, 32)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root is not None and not Path(self.root).expanduser().is_dir():
            raise ZooError(f"root {self.root!r} is not a folder; allowed: a folder with CIFAR-10")

    def parts(self) -> tuple[Split, Split]:
        """Return the training and the test part."""
        if self.root is not None:
            return read_folder(Path(self.root).expanduser())
        loaded = hub.load(
            REPOSITORY,
            name="cifar10",
            instead="digits",
            local="root=FOLDER with its binary version or parquet files",
        )
        return hub_split(loaded["train"], "img", "RGB"), hub_split(loaded["test"], "img", "RGB")
