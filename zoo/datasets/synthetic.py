"""Generated token tasks: example i is a function of (task, seed, split, i) and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.datasets import checks
from zoo.datasets.base import DataModule, content_hash
from zoo.datasets.batches import Source
from zoo.datasets.order import Epochs, Order, Stream, generator

BLOCK = 256
EVAL_SEED = 0

Generate = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


class Blocks:
    """An endless stream of examples, generated a block of 256 at a time.

    Args:
        generate: From (rows, random generator) to tokens and targets, both (rows, T).
        key: What seeds the blocks: task, seed and split.
    """

    def __init__(self, generate: Generate, key: tuple[object, ...]) -> None:
        self.generate, self.key = generate, key
        self._recent: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the examples at these indices."""
        numbers, inverse = (indices // BLOCK).unique(return_inverse=True)
        recent = self._recent
        self._recent = {
            n: recent[n] if n in recent else self.generate(BLOCK, generator(*self.key, n))
            for n in numbers.tolist()
        }
        tokens, targets = (
            torch.stack(column) for column in zip(*self._recent.values(), strict=True)
        )
        rows = indices % BLOCK
        return {"tokens": tokens[inverse, rows], "targets": targets[inverse, rows]}


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


@dataclass(kw_only=True, eq=False, repr=False)
class SyntheticData(DataModule):
    """Base of the generated tasks: fresh training examples, fixed validation and test sets.

    Training, validation and every test set are disjoint random streams; only the training
    stream depends on ``seed``.

    Args:
        seq_len: Tokens per example.
        train_size: Number of training examples, repeated in epochs; None draws new ones forever.
        val_size: Number of validation examples.
        test_size: Number of examples in each test set.
        batch_size: Training examples per step.
        eval_batch_size: Examples per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.
    """

    seq_len: int = 64
    train_size: int | None = None
    val_size: int = 1024
    test_size: int = 1024

    task = "tagging"
    version: ClassVar[int] = 1
    """Raised whenever the generator gives other examples for the same options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_size is not None:
            checks.whole("train_size", self.train_size, 1)
        checks.whole("val_size", self.val_size, 1)
        checks.whole("test_size", self.test_size, 1)
        self._tables: dict[str, Table] = {}

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the task's function ``(rows, generator, **parameters) -> tokens, targets``."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of training, validation and the test set "test"."""
        raise NotImplementedError

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the further test sets, each with the parameters that differ."""
        return {}

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, "test" first."""
        return ["test", *self.variants()]

    @property
    def max_seq_len(self) -> int:
        """Longest sequence of any split, which a model with learned positions must hold."""
        lengths = [variant.get("seq_len", self.seq_len) for variant in self.variants().values()]
        return max([self.seq_len, *lengths])

    def model_facts(self) -> dict[str, Any]:
        """Return vocab_size, and num_outputs where numbers are to be predicted."""
        facts: dict[str, Any] = {"vocab_size": self.vocab_size}  # type: ignore[attr-defined]
        if hasattr(self, "num_outputs"):
            facts["num_outputs"] = self.num_outputs
        return facts

    def example(self) -> tuple[Tensor, ...]:
        """Return tokens (1, T)."""
        return (torch.zeros(1, self.seq_len, dtype=torch.int64),)

    def load(self) -> None:
        """Generate a finite training set; the other splits are made when first asked for."""
        if self.train_size is not None:
            self.source("train")

    def stream(self, split: str) -> Blocks:
        """Return the endless stream that a split is the beginning of."""
        changed = self.variants().get(split, {})
        seed = self.seed if split == "train" else EVAL_SEED
        function = partial(self.generate(), **{**self.parameters(), **changed})
        return Blocks(function, (self.name, self.version, seed, split))

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
            rows = torch.arange(self.size(split))
            self._tables[split] = Table(self.stream(split).take(rows))
        return self._tables[split]

    def eval_rows(self, split: str) -> int:
        """Return the examples per batch of a finite split, fewer where they are longer."""
        length = self.variants().get(split, {}).get("seq_len", self.seq_len)
        return self.eval_batch_size * self.seq_len // max(length, self.seq_len) or 1

    def order(self) -> Order:
        """Return the order of training: the stream, or epochs over the finite set."""
        if self.train_size is None:
            return Stream(self.batch_size)
        return Epochs(self.train_size, self.batch_size, self.seed)

    def digest(self) -> str:
        """Return the hash of generator version, parameters and sizes."""
        facts = {
            "version": self.version,
            "parameters": self.parameters(),
            "variants": self.variants(),
            "sizes": [self.train_size, self.val_size, self.test_size],
            "seed": EVAL_SEED,
            "block": BLOCK,
        }
        return content_hash(str(self.name), json.dumps(facts, sort_keys=True))


def distinct(rows: int, count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Draw different numbers for every row, uniformly and in random order.

    Args:
        rows: Number of rows.
        count: Numbers per row, at most ``high - low``.
        low: Smallest number.
        high: Number after the largest.
        generator: Source of randomness.
    """
    lots = torch.rand(rows, high - low, generator=generator)
    return lots.topk(count, dim=-1).indices + low
