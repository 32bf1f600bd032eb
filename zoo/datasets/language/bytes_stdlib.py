"""The source of Python's standard library as a text: the language corpus that is always there.

What it holds differs between Python versions, so records carry its fingerprint. Files are assigned
to training, validation and test by a hash of their relative path, and read in the order of that
hash, which mixes the packages.
"""

from __future__ import annotations

import fnmatch
import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from zoo.datasets.language.text import SHARES, ByteText, join, limits, path_hash
from zoo.datasets.registry import dataset
from zoo.errors import ZooError

# Tests, installed packages, whole applications, and tables or generated text that would drown
# the code; the names of the last group hold paths of the machine that built Python.
EXCLUDED = (
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("ensurepip", "idlelib", "lib2to3", "turtledemo", "distutils", "encodings", "pydoc_data"),
    *("config-*", "_sysconfigdata*", "_sysconfig_vars*"),
)


def library_root() -> Path:
    """Return the folder of the standard library."""
    return Path(sysconfig.get_path("stdlib") or Path(os.__file__).parent)


def library_files(root: Path) -> dict[str, list[str]]:
    """List the files of each split by their path relative to the root, in reading order.

    Args:
        root: Folder of the standard library.
    """
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _excluded(name)]
        for name in files:
            path = Path(folder, name)
            # Distributions link files of their own configuration into the library.
            if name.endswith(".py") and not _excluded(name) and not path.is_symlink():
                found.append(path.relative_to(root).as_posix())
    found.sort(key=lambda path: (path_hash(path), path))
    splits: dict[str, list[str]] = {split: [] for split in SHARES}
    for name in found:
        place = path_hash(name) / 2**64
        if place < SHARES["val"]:
            splits["val"].append(name)
        elif place < SHARES["val"] + SHARES["test"]:
            splits["test"].append(name)
        else:
            splits["train"].append(name)
    return splits


def _excluded(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in EXCLUDED)


@dataset("bytes_stdlib")
@dataclass(kw_only=True, eq=False, repr=False)
class StandardLibrary(ByteText):
    """Bytes of the Python standard library's own source, needing no download.

    Args:
        seq_len: Bytes per window.
        max_bytes: Most bytes to use, 90 % of them for training; None uses everything.
        val_windows: Most validation windows, spread evenly over the text; None uses all.
        test_windows: Most test windows, spread evenly over the text; None uses all.
        test_lengths: Lengths of further test sets, all over the same bytes of the test text and
            named by the length: ``256``.
        batch_size: Training windows per step.
        eval_batch_size: Windows per validation or test batch.
        seed: Seed of the training windows.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size.
    """

    def read(self) -> Mapping[str, bytes]:
        """Return the bytes of each split.

        Raises:
            ZooError: This Python comes without the source of its library.
        """
        root = library_root()
        splits = library_files(root)
        if not all(splits.values()):
            raise ZooError(
                "data set 'bytes_stdlib' found too few .py files in the standard library of this "
                "Python, which seems to come without source; use 'text_files' with local paths"
            )
        most = limits(self.max_bytes)
        return {split: join(_contents(root, paths), most[split]) for split, paths in splits.items()}


def _contents(root: Path, paths: list[str]) -> Iterator[bytes]:
    for path in paths:
        yield (root / path).read_bytes()
