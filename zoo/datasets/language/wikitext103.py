"""WikiText-103 (Merity et al., 2016, arXiv 1609.07843) as a byte-level text.

The raw form, from the hub or from a local folder. The rows of the hub's form are lines; each gets
one newline back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.datasets import hub
from zoo.datasets.language.text import ByteText, join, limits
from zoo.datasets.parquet import checked, parquet_batches
from zoo.datasets.registry import dataset
from zoo.errors import ZooError

if TYPE_CHECKING:
    import datasets

REPOSITORY = "Salesforce/wikitext"
CONFIGURATION = "wikitext-103-raw-v1"
_PARTS = {"train": "train", "val": "valid", "test": "test"}


def split_files(root: Path) -> dict[str, list[Path]]:
    """List the files of each split in a folder, by the words train, valid and test in their names.

    Args:
        root: Folder, or the folder above it as the hub's repository is laid out.

    Raises:
        ZooError: The folder or a split is missing.
    """
    folder = root / CONFIGURATION
    folder = folder if folder.is_dir() else root
    if not folder.is_dir():
        raise ZooError(f"root {str(root)!r} is not a folder; allowed: a folder with WikiText-103")
    found: dict[str, list[Path]] = {}
    for split, word in _PARTS.items():
        found[split] = sorted(f for f in folder.iterdir() if f.is_file() and word in f.name)
        if not found[split]:
            names = sorted(f.name for f in folder.iterdir())
            raise ZooError(
                f"root {str(root)!r} has no file for {split!r}; it has {names[:6]}, allowed: "
                f"parquet or text files with {', '.join(_PARTS.values())} in their names"
            )
    return found


@dataset("wikitext103")
@dataclass(kw_only=True, eq=False, repr=False)
class WikiText103(ByteText):
    """WikiText-103 in raw form, byte by byte, from the hub or a local folder.

    Merity et al., 2016, arXiv 1609.07843.

    Args:
        root: Folder with the parquet files of the hub or with raw text files; None asks the hub.
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
        ZooError: The folder is missing or incomplete, or an impossible size.
    """

    needs = "files or the hub"

    root: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._files = None if self.root is None else split_files(Path(self.root).expanduser())

    def read(self) -> Mapping[str, bytes]:
        """Return the bytes of each split.

        Raises:
            ZooError: The hub cannot be reached, or a file is not as it should be.
        """
        most = limits(self.max_bytes)
        if self._files is not None:
            return {s: join(_contents(files), most[s]) for s, files in self._files.items()}
        loaded = hub.load(
            REPOSITORY,
            CONFIGURATION,
            name="wikitext103",
            instead="bytes_stdlib",
            local="root=FOLDER with its parquet or raw text files, or 'text_files'",
        )
        hub_names = {"train": "train", "val": "validation", "test": "test"}
        return {s: join(_rows(loaded[name], name), most[s]) for s, name in hub_names.items()}


def _lines(batches: Iterable[Iterable[object]], table: str) -> Iterator[bytes]:
    first = 0
    for batch in batches:
        lines = [
            checked(text, str, f"row {row}, counted from 0, of {table}, column 'text',")
            for row, text in enumerate(batch, first)
        ]
        first += len(lines)
        yield b"".join(line.rstrip("\n").encode() + b"\n" for line in lines)


def _rows(split: datasets.Dataset, name: str) -> Iterator[bytes]:
    batches = (batch["text"] for batch in split.iter(batch_size=4096))
    yield from _lines(batches, f"split {name!r} of {REPOSITORY}")


def _contents(files: list[Path]) -> Iterator[bytes]:
    for file in files:
        if file.suffix == ".parquet":
            columns = parquet_batches(file, ["text"])
            yield from _lines((batch["text"] for batch in columns), repr(file.name))
        else:
            yield file.read_bytes()
