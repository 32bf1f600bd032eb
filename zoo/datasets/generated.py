"""Generated examples of any form: example i is a function of (data set, seed, split, i) alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.base import DataModule, content_hash
from zoo.datasets.batches import Source
from zoo.datasets.order import Epochs, Order, Stream, generator

EVAL_SEED = 0

Draw = Callable[[int, torch.Generator], dict[str, Tensor]]


class Table:
    """A finite set of examples, held in memory.

    Args:
        columns: Tensors with one row per example.
    """

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = dict(columns)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the examples at these indices."""
        return {name: column[indices] for name, column in self.columns.items()}


class Blocks:
    """An endless stream of examples, drawn a block at a time.

    Args:
        draw: From (rows, random generator) to tensors by name, each with so many rows.
        key: What seeds the blocks: data set, seed and split.
        block: Examples per block.
    """

    def __init__(self, draw: Draw, key: tuple[object, ...], block: int) -> None:
        self.draw, self.key, self.block = draw, key, block
        self._recent: dict[int, dict[str, Tensor]] = {}

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the examples at these indices."""
        numbers, inverse = (indices // self.block).unique(return_inverse=True)
        recent = self._recent
        self._recent = {
            n: recent[n] if n in recent else self.draw(self.block, generator(*self.key, n))
            for n in numbers.tolist()
        }
        blocks = list(self._recent.values())
        rows = indices % self.block
        if len(blocks) == 1:
            return {name: column[rows] for name, column in blocks[0].items()}
        return {
            name: torch.stack([block[name] for block in blocks])[inverse, rows]
            for name in blocks[0]
        }


@dataclass(kw_only=True, eq=False, repr=False)
class GeneratedData(DataModule):
    """Base of the drawn data sets: fresh training examples, fixed validation and test sets.

    Training, validation and test are disjoint random streams; only the training stream depends on
    ``seed``.

    Args:
        train_size: Number of training examples, repeated in epochs; None draws new ones forever.
        val_size: Number of validation examples.
        test_size: Number of test examples.
        batch_size: Training examples per step.
        eval_batch_size: Examples per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.
    """

    train_size: int | None = None
    val_size: int = 512
    test_size: int = 512

    version: ClassVar[int] = 1
    """Raised whenever the generator gives other examples for the same options."""
    block: ClassVar[int] = 256
    """Examples drawn at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train_size = checks.optional(checks.whole)("train_size", self.train_size, 1)
        self.val_size = checks.whole("val_size", self.val_size, 1)
        self.test_size = checks.whole("test_size", self.test_size, 1)
        self._tables: dict[str, Table] = {}

    def draw(self, rows: int, source: torch.Generator) -> dict[str, Tensor]:
        """Return so many examples.

        Args:
            rows: Number of examples.
            source: Source of randomness.
        """
        raise NotImplementedError

    def drawn_by(self, split: str) -> Draw:
        """Return what draws the examples of a split; here `draw` draws those of all splits.

        Args:
            split: "train", "val" or a test set.
        """
        return self.draw

    def parameters(self) -> dict[str, Any]:
        """Return all that `draw` depends on, as JSON can hold it."""
        raise NotImplementedError

    def load(self) -> None:
        """Draw a finite training set; the other splits are drawn when first asked for."""
        if self.train_size is not None:
            self.source("train")

    def stream(self, split: str) -> Blocks:
        """Return the endless stream that a split is the beginning of."""
        seed = self.seed if split == "train" else EVAL_SEED
        return Blocks(self.drawn_by(split), (self.name, self.version, seed, split), self.block)

    def size(self, split: str) -> int:
        """Return the number of examples of a finite split."""
        if split == "train" and self.train_size is not None:
            return self.train_size
        return self.val_size if split == "val" else self.test_size

    def source(self, split: str) -> Source:
        """Return the examples of a split."""
        if split == "train" and self.train_size is None:
            return self.stream(split)
        if split not in self._tables:
            self._tables[split] = Table(self.stream(split).take(torch.arange(self.size(split))))
        return self._tables[split]

    def order(self) -> Order:
        """Return the order of training: the stream, or epochs over the finite set."""
        if self.train_size is None:
            return Stream(self.batch_size)
        return Epochs(self.train_size, self.batch_size, self.seed)

    def digest(self) -> str:
        """Return the hash of generator version, parameters and sizes."""
        facts = {
            **self.digested(),
            "version": self.version,
            "parameters": self.parameters(),
            "sizes": [self.train_size, self.val_size, self.test_size],
            "seed": EVAL_SEED,
            "block": self.block,
        }
        return content_hash(str(self.name), json.dumps(facts, sort_keys=True))

    def digested(self) -> dict[str, Any]:
        """Return what else the examples depend on, as JSON can hold it."""
        return {}
