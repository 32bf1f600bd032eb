"""Labelled images of the hub that are distributed as files of another format as well.

A set is read from a local folder, with its own files or with a copy of the hub's parquet files,
from the folder of a package of the system where there is one, else from the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from zoo.datasets import hub
from zoo.datasets.vision.images import LargeImageData, Split, hub_split, parquet_split
from zoo.errors import ZooError


@dataclass(kw_only=True, eq=False, repr=False)
class LabelledImages(LargeImageData):
    """Base of the image sets that are read from files or from the hub.

    Args:
        root: Folder with the set's own files or with the hub's parquet files; None asks the hub.
        val_size: Training images set aside for validation, by a fixed permutation.
        standardize: Give every channel mean 0 and standard deviation 1 over the training images;
            otherwise pixels lie between 0 and 1.
        few_shot: Train on the first so many images of the training split; None takes all.
        batch_size: Training images per step.
        eval_batch_size: Images per validation or test batch.
        seed: Seed of the training order.
        num_workers: Processes that prepare batches.

    Attributes:
        title: What the set is called.
        repository: Its name on the hub.
        column: Name of the column with the pictures there.
        local: How to use a local copy.

    Raises:
        ZooError: The folder is missing, or an impossible size.
    """

    root: str | None = None

    title: ClassVar[str]
    repository: ClassVar[str]
    column: ClassVar[str]
    local: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root is not None and not Path(self.root).expanduser().is_dir():
            raise ZooError(
                f"root {self.root!r} is not a folder; allowed: a folder with {self.title}"
            )

    # What a subclass provides.

    def own_files(self, folder: Path, split: str) -> list[Path] | None:
        """Return the files of a part in the set's own format, None if they are not all there.

        Args:
            folder: Where to look.
            split: "train" or "test".
        """
        raise NotImplementedError

    def read_own(self, files: list[Path]) -> Split:
        """Read the files of a part in the set's own format.

        Args:
            files: What `own_files` found.

        Raises:
            ZooError: A file is malformed.
        """
        raise NotImplementedError

    def own_names(self, split: str) -> str:
        """Say how the files of a part in the set's own format are called.

        Args:
            split: "train" or "test".
        """
        raise NotImplementedError

    def package_folder(self) -> Path | None:
        """Return where a package of the system has put the set, None if there is none."""
        return None

    # What is common to all.

    @property
    def mode(self) -> str:
        """Mode of the pictures: "L" for grey, "RGB" for colour."""
        return "L" if self.image_shape[0] == 1 else "RGB"

    def parts(self) -> tuple[Split, Split]:
        """Return the training and the test part."""
        root = None if self.root is None else Path(self.root).expanduser()
        folder = root or self.package_folder()
        if folder is not None:
            return self.read_part(folder, "train"), self.read_part(folder, "test")
        loaded = hub.load(self.repository, name=str(self.name), instead="digits", local=self.local)
        train, test = (hub_split(loaded[s], self.column, self.mode) for s in ("train", "test"))
        return train, test

    def read_part(self, folder: Path, split: str) -> Split:
        """Read a part from a folder.

        Args:
            folder: Folder with the set's own files, or a copy of the hub's.
            split: "train" or "test".

        Raises:
            ZooError: A file is missing or malformed.
        """
        files = self.own_files(folder, split)
        if files is not None:
            return self.read_own(files)
        found = parquet_split(folder, split, self.column, self.mode)
        if found is None:
            raise ZooError(
                f"root {str(folder)!r} has no {self.title} {split} part; allowed: a folder with "
                f"{self.own_names(split)}, or with {split}*.parquet"
            )
        return found
