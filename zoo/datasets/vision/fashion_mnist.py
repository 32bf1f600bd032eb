"""Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747): 70,000 grey images of clothing, 28x28.

Read from a local folder of IDX files, from the Debian package ``dataset-fashion-mnist`` where it is
installed, else from the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zoo.datasets import hub
from zoo.datasets.registry import dataset
from zoo.datasets.vision.idx import find_idx, read_idx
from zoo.datasets.vision.images import LargeImageData, Split, hub_split, parquet_split
from zoo.errors import ZooError

REPOSITORY = "zalando-datasets/fashion_mnist"
PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_STEMS = {"train": "train", "test": "t10k"}


def read_folder(folder: Path) -> tuple[Split, Split]:
    """Read training and test part from a folder of IDX or parquet files.

    Args:
        folder: Folder with the four IDX files, plain or compressed, or a copy of the hub's.

    Raises:
        ZooError: A file is missing or malformed.
    """
    parts: list[Split] = []
    for split, stem in _STEMS.items():
        images = find_idx(folder, f"{stem}-images-idx3-ubyte")
        labels = find_idx(folder, f"{stem}-labels-idx1-ubyte")
        if images is not None and labels is not None:
            pixels = read_idx(images)
            if pixels.ndim != 3:
                raise ZooError(f"root: {images.name!r} has {pixels.ndim} dimensions; needed: 3")
            parts.append((pixels[:, None], read_idx(labels).long()))
            continue
        found = parquet_split(folder, split, "image", "L")
        if found is None:
            raise ZooError(
                f"root {str(folder)!r} has no Fashion-MNIST {split} part; allowed: a folder with "
                f"{stem}-images-idx3-ubyte and {stem}-labels-idx1-ubyte, plain or .gz, or with "
                f"{split}*.parquet"
            )
        parts.append(found)
    return parts[0], parts[1]


@dataset("fashion_mnist")
@dataclass(kw_only=True, eq=False, repr=False)
class FashionMNIST(LargeImageData):
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

    root: str | None = None

    classes = (
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )
    image_shape = (1, 28, 28)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root is not None and not Path(self.root).expanduser().is_dir():
            raise ZooError(f"root {self.root!r} is not a folder; allowed: a folder of IDX files")

    def parts(self) -> tuple[Split, Split]:
        """Return the training and the test part."""
        if self.root is not None:
            return read_folder(Path(self.root).expanduser())
        if PACKAGE_FOLDER.is_dir():
            return read_folder(PACKAGE_FOLDER)
        loaded = hub.load(
            REPOSITORY,
            name="fashion_mnist",
            instead="digits",
            local="root=FOLDER with its four IDX files, "
            "or the Debian package dataset-fashion-mnist",
        )
        return hub_split(loaded["train"], "image", "L"), hub_split(loaded["test"], "image", "L")
