"""Counting ones, the probe of representational collapse (Barbero et al. 2024, arXiv 2406.04267).

A beginning token, then zeros among which a few ones stand; at every one the target is its number,
1, 2, ... The k ones of a sequence, 2 to `max_ones` alike, stand at random places but for the last
two tokens, which are always ones. So a sequence without its last token, x, and the whole one, which
is x with its last token repeated, have different answers, and a model whose representations of the
two come ever closer with the length (zoo.tasks.collapse measures how close) fails in the end.

Tokens 0 and 1 are the bits, 2 the beginning, and the answer k is the token 2 + k. The test sets of
other lengths hold as many ones as the training set does, among more zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.base import IGNORE
from zoo.datasets.registry import dataset
from zoo.datasets.synthetic.sequences import SyntheticData

BEGIN = 2


def count_ones(
    rows: int, generator: torch.Generator, *, seq_len: int, max_ones: int
) -> tuple[Tensor, Tensor]:
    """Generate examples of counting ones.

    Args:
        rows: Number of examples.
        generator: Source of randomness.
        seq_len: Tokens per example, the beginning included, T.
        max_ones: Most ones of an example, at least 2 and below `seq_len`.
    """
    body = seq_len - 3
    count = torch.randint(max_ones - 1, (rows, 1), generator=generator)
    order = torch.rand(rows, body, generator=generator).argsort(1)
    tokens = torch.cat(
        [torch.full((rows, 1), BEGIN), (order < count).long(), torch.ones(rows, 2).long()], 1
    )
    ones = tokens == 1
    return tokens, torch.where(ones, BEGIN + ones.cumsum(1), IGNORE)


@dataset("count_ones")
@dataclass(kw_only=True, eq=False, repr=False)
class CountOnes(SyntheticData):
    """Counting ones: number the ones among ever more zeros, a probe of collapse.

    Barbero et al. 2024, arXiv 2406.04267; CoG attention, 2024, arXiv 2411.07176.

    Args:
        seq_len: Tokens per example in training.
        max_ones: Most ones of an example, from 2 to ``seq_len - 1``.
        test_lengths: Lengths of further test sets, named by the length: ``128``.
        train_size: Number of training examples, repeated in epochs; None draws new ones forever.
        val_size: Number of validation examples.
        test_size: Number of examples in each test set.
        batch_size: Training examples per step.
        eval_batch_size: Examples per validation or test batch; fewer of the longer ones.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size.
    """

    seq_len: int = 32
    max_ones: int = 8
    test_lengths: Sequence[int] = (64, 128, 256, 512)
    test_size: int = 512

    task = "collapse"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_ones = checks.whole("max_ones", self.max_ones, 2)
        self.seq_len = checks.whole("seq_len", self.seq_len, self.max_ones + 1)
        self._lengths = checks.each(checks.whole)(
            "test_lengths", self.test_lengths, self.max_ones + 1
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens: the bits, the beginning and the answers."""
        return BEGIN + 1 + self.max_ones

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return count_ones

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the test sets of other lengths."""
        return {str(length): {"seq_len": length} for length in self._lengths}
