"""Parity of the bits so far: the smallest task that asks a mechanism to carry a state.

A sequence is T fair bits; the target at every position is whether the ones up to and with it are an
odd number. So each sequence trains on all lengths up to T. The test sets of other lengths ask only
at positions that training never reached, from T on: there chance is one half, and a model that has
not learned to carry a bit has nothing else to go by.

We report the plain accuracy a; the scaled one of Grazzi et al. (2024, arXiv 2411.12537), who train
on lengths up to 40 and test up to 256, is 2a - 1. Where we follow neither: papers ask for the last
parity alone, of sequences whose length varies; with a target at every position a minute of training
is enough to tell mechanisms apart.

Bits are few, so sequences are kept apart by a hash: one in 8 belongs to validation, one to the test
sets, the others to training, at every T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.base import IGNORE
from zoo.datasets.order import generator as seeded
from zoo.datasets.registry import dataset
from zoo.datasets.synthetic.sequences import SyntheticData

SHARES = 8
VAL, TEST = 0, 1
_PRIME = (1 << 31) - 1


def shares(bits: Tensor) -> Tensor:
    """Return which of the 8 shares each sequence belongs to.

    Args:
        bits: Sequences (R, T) of zeros and ones.
    """
    weights = torch.randint(_PRIME, bits.shape[1:], generator=seeded("parity", "shares"))
    mixed = (bits * weights).sum(1) % _PRIME
    # Squaring breaks up the sum, whose low bit would be a parity itself.
    return mixed.square() % _PRIME % SHARES


def parity(
    rows: int,
    generator: torch.Generator,
    *,
    seq_len: int,
    asked_from: int = 0,
    kept: Sequence[int] = tuple(range(SHARES)),
) -> tuple[Tensor, Tensor]:
    """Generate examples of parity.

    Args:
        rows: Number of examples.
        generator: Source of randomness.
        seq_len: Bits per example, T.
        asked_from: First position with a target.
        kept: Shares, from 0 to 7, whose sequences are allowed.
    """
    found: list[Tensor] = []
    while sum(map(len, found)) < rows:
        bits = torch.randint(2, (rows, seq_len), generator=generator)
        found.append(bits[torch.isin(shares(bits), torch.tensor(kept))])
    tokens = torch.cat(found)[:rows]
    targets = tokens.cumsum(1) % 2
    targets[:, :asked_from] = IGNORE
    return tokens, targets


@dataset("parity")
@dataclass(kw_only=True, eq=False, repr=False)
class Parity(SyntheticData):
    """Parity: is the number of ones so far odd, at longer sequences too.

    Grazzi et al., 2024, arXiv 2411.12537; Deletang et al., 2022, arXiv 2207.02098.

    Args:
        seq_len: Bits per example in training, at least 8.
        test_lengths: Lengths, above ``seq_len``, of further test sets that ask only at positions
            beyond those of training; named by the length: ``256``.
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

    seq_len: int = 40
    test_lengths: Sequence[int] = (64, 128, 256)
    test_size: int = 512

    vocab_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seq_len = checks.whole("seq_len", self.seq_len, 8)
        self._lengths = checks.each(checks.whole)(
            "test_lengths", self.test_lengths, self.seq_len + 1
        )

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return parity

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the test sets of other lengths."""
        return {str(n): {"seq_len": n, "asked_from": self.seq_len} for n in self._lengths}

    def arguments(self, split: str) -> dict[str, Any]:
        """Return the parameters of a split, the shares that it may take among them."""
        kept = {"train": range(2, SHARES), "val": [VAL]}.get(split, [TEST])
        return {**super().arguments(split), "kept": tuple(kept)}
