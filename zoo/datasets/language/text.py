"""Byte-level language data: windows over the bytes of a training, validation and test text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.base import DataModule, content_hash
from zoo.datasets.batches import Source
from zoo.datasets.order import Draws, Order
from zoo.errors import ZooError

SHARES = {"train": 0.9, "val": 0.05, "test": 0.05}
"""How a limit on the bytes is divided among the splits."""


def path_hash(path: str) -> int:
    """Return 64 bits of the SHA-256 of a relative path, the same on every machine."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")


def limits(max_bytes: int | None) -> Mapping[str, int | None]:
    """Return the most bytes of each split, or None for all of them."""
    if max_bytes is None:
        return dict.fromkeys(SHARES)
    return {split: round(share * max_bytes) for split, share in SHARES.items()}


def join(pieces: Iterable[bytes], limit: int | None) -> bytes:
    """Concatenate pieces up to a number of bytes, asking for no more of them than it takes."""
    parts = []
    left = limit
    for piece in pieces:
        parts.append(piece if left is None else piece[:left])
        if left is not None:
            left -= len(parts[-1])
            if left <= 0:
                break
    return b"".join(parts)


class Windows:
    """Windows of a text with the next byte as target.

    Args:
        text: Bytes (L,).
        seq_len: Bytes per window, T.
        starts: Where the windows start; None for a window at every position.
    """

    def __init__(self, text: Tensor, seq_len: int, starts: Tensor | None = None) -> None:
        self.text, self.seq_len, self.starts = text, seq_len, starts

    def __len__(self) -> int:
        return len(self.text) - self.seq_len if self.starts is None else len(self.starts)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return tokens and targets (B, T) of the windows at these indices."""
        starts = indices if self.starts is None else self.starts[indices]
        window = self.text[starts[:, None] + torch.arange(self.seq_len + 1)].long()
        return {"tokens": window[:, :-1].contiguous(), "targets": window[:, 1:].contiguous()}


def _spread(length: int, size: int, most: int | None) -> Tensor:
    """Return where windows of a size start, side by side or as many as wanted spread evenly."""
    count = (length - 1) // size
    chosen = count if most is None else min(most, count)
    return torch.arange(chosen) * count // chosen * size


@dataclass(kw_only=True, eq=False, repr=False)
class ByteText(DataModule):
    """Base of the byte-level texts: the next byte is the target at every position.

    Training windows start anywhere, drawn from (seed, step). Validation and test windows follow
    each other without overlap; the last one that is not full is left out.

    The test sets of `test_lengths` ask how a model does beyond the length that it was trained at:
    stretches as long as the longest are cut into windows of each length, so that every set holds
    the same bytes (but for what remains of a stretch where a length does not divide the longest).
    With `test_windows` they hold as many tokens as the set "test".

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
    """

    seq_len: int = 128
    max_bytes: int | None = None
    val_windows: int | None = None
    test_windows: int | None = None
    test_lengths: Sequence[int] = ()

    task = "language"
    vocab_size: ClassVar[int] = 256
    bytes_per_token: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seq_len = checks.whole("seq_len", self.seq_len, 1)
        self._lengths = checks.each(checks.whole)("test_lengths", self.test_lengths, 1)
        self.max_bytes = checks.optional(checks.whole)("max_bytes", self.max_bytes, 1)
        if self.max_bytes is not None:
            asked = {"seq_len": ("validation", self.seq_len)}
            if self._lengths:
                asked["test_lengths"] = ("test", max(self._lengths))
            for option, (split, length) in asked.items():
                need = math.ceil((length + 1) / min(SHARES.values()))
                if self.max_bytes < need:
                    raise ZooError(
                        f"max_bytes {self.max_bytes} leaves no window of {option} {length} for "
                        f"{split}; allowed: at least {need}"
                    )
        for name in ("val_windows", "test_windows"):
            setattr(self, name, checks.optional(checks.whole)(name, getattr(self, name), 1))
        self._windows: dict[str, Windows] = {}
        self._digest = ""

    @property
    def max_seq_len(self) -> int:
        """Longest sequence of any split."""
        return max([self.seq_len, *self._lengths])

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, "test" first."""
        return ["test", *map(str, self._lengths)]

    def model_facts(self) -> dict[str, Any]:
        """Return vocab_size."""
        return {"vocab_size": self.vocab_size}

    def task_facts(self) -> dict[str, Any]:
        """Return bytes_per_token."""
        return {"bytes_per_token": self.bytes_per_token}

    def example(self) -> tuple[Tensor, ...]:
        """Return tokens (1, T)."""
        return (torch.zeros(1, self.seq_len, dtype=torch.int64),)

    def read(self) -> Mapping[str, bytes]:
        """Return the bytes of "train", "val" and "test"."""
        raise NotImplementedError

    def load(self) -> None:
        """Read the text and cut the evaluation windows.

        Raises:
            ZooError: A split is shorter than a window.
        """
        texts = self.read()
        asked = [("seq_len", self.seq_len, split) for split in texts]
        asked += [("test_lengths", length, "test") for length in self._lengths]
        for option, length, split in asked:
            if len(texts[split]) <= length:
                raise ZooError(
                    f"{option} {length} is too long for the {split} split of data set "
                    f"{self.name!r}, which has {len(texts[split])} bytes; allowed: at most "
                    f"{max(len(texts[split]) - 1, 0)}"
                )
        most = {"train": None, "val": self.val_windows, "test": self.test_windows}
        for split, text in texts.items():
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            starts = None if split == "train" else _spread(len(text), self.seq_len, most[split])
            self._windows[split] = Windows(data, self.seq_len, starts)
            if split == "test" and self._lengths:
                self._window_lengths(data)
        self._digest = content_hash(*(item for pair in texts.items() for item in pair))

    def _window_lengths(self, text: Tensor) -> None:
        """Cut the test sets of other lengths out of the same stretches."""
        longest, most = max(self._lengths), self.test_windows
        stretches = None if most is None else max(1, most * self.seq_len // longest)
        begins = _spread(len(text), longest, stretches)
        for length in self._lengths:
            inside = torch.arange(longest // length) * length
            starts = (begins[:, None] + inside).flatten()
            self._windows[str(length)] = Windows(text, length, starts)

    def eval_rows(self, split: str) -> int:
        """Return the windows per batch of a finite split, fewer where they are longer."""
        length = self._windows[split].seq_len
        return self.eval_batch_size * self.seq_len // max(length, self.seq_len) or 1

    def source(self, split: str) -> Source:
        """Return the windows of a split."""
        return self._windows[split]

    def size(self, split: str) -> int:
        """Return the number of windows of a split."""
        return len(self._windows[split])

    def order(self) -> Order:
        """Return the order of training: independent draws of a starting position."""
        return Draws(self.size("train"), self.batch_size, self.seed)

    def digest(self) -> str:
        """Return the hash of the bytes of all splits."""
        return self._digest

    @staticmethod
    def encode(text: str) -> list[int]:
        """Return the tokens of a string, its UTF-8 bytes."""
        return list(text.encode())

    @staticmethod
    def decode(tokens: list[int]) -> str:
        """Return the string of tokens; bytes that are no UTF-8 become replacement characters."""
        return bytes(tokens).decode(errors="replace")
