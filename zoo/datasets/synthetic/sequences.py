"""Generated token tasks: example i is a function of (task, seed, split, i) and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.datasets.generated import Draw, GeneratedData

BLOCK = GeneratedData.block

Generate = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def _columns(generate: Generate, rows: int, source: torch.Generator) -> dict[str, Tensor]:
    tokens, targets = generate(rows, source)
    return {"tokens": tokens, "targets": targets}


@dataclass(kw_only=True, eq=False, repr=False)
class SyntheticData(GeneratedData):
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
    val_size: int = 1024
    test_size: int = 1024

    task = "tagging"

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the task's function ``(rows, generator, **parameters) -> tokens, targets``."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of training, validation and the test set "test".

        These are the options that the task's function asks for by name; what has a default there
        belongs to further test sets.
        """
        asked = inspect.signature(self.generate()).parameters.values()
        return {
            parameter.name: getattr(self, parameter.name)
            for parameter in asked
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        }

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

    def arguments(self, split: str) -> dict[str, Any]:
        """Return the parameters of a split."""
        return {**self.parameters(), **self.variants().get(split, {})}

    def drawn_by(self, split: str) -> Draw:
        """Return what draws the examples of a split."""
        return partial(_columns, partial(self.generate(), **self.arguments(split)))

    def eval_rows(self, split: str) -> int:
        """Return the examples per batch of a finite split, fewer where they are longer."""
        length = self.variants().get(split, {}).get("seq_len", self.seq_len)
        return self.eval_batch_size * self.seq_len // max(length, self.seq_len) or 1

    def digested(self) -> dict[str, Any]:
        """Return the parameters of the further test sets."""
        return {"variants": self.variants()}


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
