"""Local files as a byte-level text."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo import checks
from zoo.datasets.language.text import ByteText, join, limits, path_hash
from zoo.datasets.registry import dataset
from zoo.errors import ZooError


def find_files(paths: Sequence[str], pattern: str) -> list[Path]:
    """List the files that paths, folders and wildcards stand for, in an order of their own.

    The order is that of a hash of the path relative to the folder given (or of the file's name),
    so that it mixes a collection and does not depend on where it lies.

    Args:
        paths: Files, folders, or wildcards such as ``"notes/**/*.md"``.
        pattern: Which files of a folder count, at any depth.

    Raises:
        ZooError: A path does not exist, or stands for no file.
    """
    labels: dict[Path, str] = {}
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            found = {file: file.relative_to(path).as_posix() for file in path.rglob(pattern)}
            hint = f"the folder has no file {pattern!r}; change the option 'pattern'"
        elif path.exists():
            found, hint = {path: path.name}, ""
        elif glob.has_magic(text):
            names = glob.glob(str(path), recursive=True)
            found, hint = {Path(name): Path(name).name for name in names}, "no file matches"
        else:
            raise ZooError(f"paths: {text!r} does not exist; allowed: a file, folder or wildcard")
        found = {file: label for file, label in found.items() if file.is_file()}
        if not found:
            raise ZooError(f"paths: {text!r} stands for no file: {hint or 'it is not a file'}")
        for file, label in found.items():
            labels.setdefault(file.resolve(), label)
    return sorted(labels, key=lambda file: (path_hash(labels[file]), labels[file], str(file)))


@dataset("text_files")
@dataclass(kw_only=True, eq=False, repr=False)
class TextFiles(ByteText):
    """Bytes of local files, folders or wildcards.

    Args:
        paths: One path or several: files, folders, or wildcards such as ``"notes/**/*.md"``.
        pattern: Which files of a folder count, at any depth.
        split: "file" gives whole files to training, validation and test; "position" cuts every
            file into beginning, middle and end; "auto" takes "file" from three files on.
        val_fraction: Part of the files, or of every file, for validation.
        test_fraction: Part of the files, or of every file, for test.
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
        ZooError: A path is missing, the files cannot be split so, or an impossible size.
    """

    needs = "files"

    paths: str | Sequence[str]
    pattern: str = "*.txt"
    split: str = "auto"
    val_fraction: float = 0.05
    test_fraction: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("split", self.split, ("auto", "file", "position"))
        for name in ("val_fraction", "test_fraction"):
            setattr(self, name, checks.number(name, getattr(self, name), 0.001, 0.4))
        given = [self.paths] if isinstance(self.paths, str) else list(self.paths)
        if not given:
            raise ZooError("paths is empty; allowed: a file, folder or wildcard, or several")
        self._files = find_files(given, self.pattern)
        if self.split == "file" and len(self._files) < 3:
            raise ZooError(
                f"split 'file' needs at least 3 files; got {len(self._files)} "
                "(nearest: split 'position')"
            )

    def read(self) -> Mapping[str, bytes]:
        """Return the bytes of each split.

        Raises:
            ZooError: A file cannot be read.
        """
        most = limits(self.max_bytes)
        files = self._files
        if self.split == "position" or len(files) < 3:
            parts = [self._cut(content) for content in _contents(files)]
            return {
                split: join((part[split] for part in parts), most[split])
                for split in ("train", "val", "test")
            }
        val = max(1, round(len(files) * self.val_fraction))
        test = max(1, round(len(files) * self.test_fraction))
        return {
            "train": join(_contents(files[val + test :]), most["train"]),
            "val": join(_contents(files[:val]), most["val"]),
            "test": join(_contents(files[val : val + test]), most["test"]),
        }

    def _cut(self, content: bytes) -> dict[str, bytes]:
        size = len(content)
        end = size - round(size * self.test_fraction)
        middle = end - round(size * self.val_fraction)
        return {"train": content[:middle], "val": content[middle:end], "test": content[end:]}


def _contents(files: Sequence[Path]) -> Iterator[bytes]:
    for file in files:
        try:
            yield file.read_bytes()
        except OSError as error:
            raise ZooError(f"paths: {file.name!r} cannot be read: {error.strerror}") from error
