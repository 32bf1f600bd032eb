"""CIFAR-10 (Krizhevsky, 2009): 60,000 colour images of 32x32 pixels in ten classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.datasets.registry import dataset
from zoo.datasets.vision.images import Split
from zoo.datasets.vision.labelled import LabelledImages
from zoo.errors import ZooError

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


@dataset("cifar10")
@dataclass(kw_only=True, eq=False, repr=False)
class CIFAR10(LabelledImages):
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

    title = "CIFAR-10"
    repository = "uoft-cs/cifar10"
    column = "img"
    local = "root=FOLDER with its binary version or parquet files"
    classes = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    image_shape = (3, 32, 32)

    def own_files(self, folder: Path, split: str) -> list[Path] | None:
        """Return the files of the binary version, None if they are not all there."""
        files = [folder / name for name in _BINARY[split]]
        return files if all(file.is_file() for file in files) else None

    def read_own(self, files: list[Path]) -> Split:
        """Read files of the binary version."""
        return read_binary(files)

    def own_names(self, split: str) -> str:
        """Say how the files of the binary version are called."""
        return ", ".join(_BINARY[split])
