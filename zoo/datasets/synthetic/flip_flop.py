"""Flip-flop language FFL(T, p) (Liu et al., 2023, arXiv 2306.00946).

A sequence is T/2 pairs of an instruction and a bit. Write (2) stores its bit, ignore (4) comes
with a random bit, and read (3) is followed by the bit stored last. The first instruction is a
write, the last a read; the others ignore with probability p and read or write with (1 - p)/2
each. The target is the bit after every read, asked for at the read; nothing else has a target.

The paper trains on p = 0.8 with T = 512 and tests on p = 0.98 ("sparse": long gaps) and p = 0.1
("dense").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.base import IGNORE
from zoo.datasets.registry import dataset
from zoo.datasets.synthetic.sequences import SyntheticData

WRITE, READ, PASS = 2, 3, 4


def flip_flop(
    rows: int, generator: torch.Generator, *, seq_len: int, p_ignore: float
) -> tuple[Tensor, Tensor]:
    """Generate examples of the flip-flop language.

    Args:
        rows: Number of examples.
        generator: Source of randomness.
        seq_len: Tokens per example, T.
        p_ignore: Probability of an ignore, p.
    """
    steps = seq_len // 2
    lot = torch.rand(rows, steps, dtype=torch.float64, generator=generator)
    instructions = torch.full((rows, steps), PASS)
    instructions[lot >= p_ignore] = WRITE
    instructions[lot >= p_ignore + (1 - p_ignore) / 2] = READ
    instructions[:, 0], instructions[:, -1] = WRITE, READ

    bits = torch.randint(2, (rows, steps), generator=generator)
    writes = torch.where(instructions == WRITE, torch.arange(steps), 0)
    stored = bits.gather(1, writes.cummax(dim=1).values)
    reads = instructions == READ
    bits = torch.where(reads, stored, bits)

    tokens = torch.stack((instructions, bits), dim=-1).flatten(1)
    asked = torch.where(reads, stored, IGNORE)
    targets = torch.stack((asked, torch.full_like(asked, IGNORE)), dim=-1).flatten(1)
    return tokens, targets


@dataset("flip_flop")
@dataclass(kw_only=True, eq=False, repr=False)
class FlipFlop(SyntheticData):
    """Flip-flop language: remember the last written bit through any number of distractors.

    Liu et al., 2023, arXiv 2306.00946.

    Args:
        seq_len: Tokens per example, even, at least 4.
        p_ignore: Probability of an ignore instruction in training.
        p_sparse: The same in the test set "sparse".
        p_dense: The same in the test set "dense".
        train_size: Number of training examples, repeated in epochs; None draws new ones forever.
        val_size: Number of validation examples.
        test_size: Number of examples in each test set.
        batch_size: Training examples per step.
        eval_batch_size: Examples per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size or probability.
    """

    p_ignore: float = 0.8
    p_sparse: float = 0.98
    p_dense: float = 0.1

    vocab_size: ClassVar[int] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seq_len = checks.multiple("seq_len", self.seq_len, 2, 4)
        for name in ("p_ignore", "p_sparse", "p_dense"):
            setattr(self, name, checks.number(name, getattr(self, name), 0, 1))

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return flip_flop

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the sparse and the dense test set."""
        return {"sparse": {"p_ignore": self.p_sparse}, "dense": {"p_ignore": self.p_dense}}
