"""Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747): 70,000 grey images of clothing, 28x28.

Read from a local folder of IDX files, from the Debian package ``dataset-fashion-mnist`` where it is
installed, else from the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zoo.datasets.registry import dataset
from zoo.datasets.vision.idx import find_idx, read_idx
from zoo.datasets.vision.images import Split
from zoo.datasets.vision.labelled import LabelledImages
from zoo.errors import ZooError

PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_STEMS = {"train": "train", "test": "t10k"}


@dataset("fashion_mnist")
@dataclass(kw_only=True, eq=False, repr=False)
class FashionMNIST(LabelledImages):
    """Fashion-MNIST: ten kinds of clothing in grey, 28x28 pixels.

    Xiao et al., 2017, arXiv 1708.07747.

    Args:
        root: Folder with its IDX files, plain or ``.gz``; None takes the Debian package's folder
            where there is one, else the hub.
        val_size: Training images set aside for validation, by a fixed permutation.
        standardize: Give pixels mean 0 and standard deviation 1 over the training images;
            otherwise they lie between 0 and 1.
        few_shot: Train on the first so many images of the training split; None takes all.
        batch_size: Training images per step.
        eval_batch_size: Images per validation or test batch.
        seed: Seed of the training order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: The folder is missing, or an impossible size.
    """

    needs = "files, the Debian package dataset-fashion-mnist, or the hub"

    title = "Fashion-MNIST"
    repository = "zalando-datasets/fashion_mnist"
    column = "image"
    local = "root=FOLDER with its four IDX files, or the Debian package dataset-fashion-mnist"
    classes = (
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )
    image_shape = (1, 28, 28)

    def own_files(self, folder: Path, split: str) -> list[Path] | None:
        """Return the IDX files of images and labels, None if they are not both there."""
        found = [find_idx(folder, name) for name in _names(split)]
        files = [file for file in found if file is not None]
        return files if len(files) == len(found) else None

    def read_own(self, files: list[Path]) -> Split:
        """Read IDX files of images and labels.

        Raises:
            ZooError: A file is malformed.
        """
        images, labels = files
        pixels = read_idx(images)
        if pixels.ndim != 3:
            raise ZooError(f"root: {images.name!r} has {pixels.ndim} dimensions; needed: 3")
        return pixels[:, None], read_idx(labels).long()

    def own_names(self, split: str) -> str:
        """Say how the IDX files are called."""
        return f"{' and '.join(_names(split))}, plain or .gz"

    def package_folder(self) -> Path | None:
        """Return the folder of the Debian package, None where it is not installed."""
        return PACKAGE_FOLDER if PACKAGE_FOLDER.is_dir() else None


def _names(split: str) -> tuple[str, str]:
    """Names of the files of images and of labels."""
    return f"{_STEMS[split]}-images-idx3-ubyte", f"{_STEMS[split]}-labels-idx1-ubyte"
