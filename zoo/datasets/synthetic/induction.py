"""Induction heads (Olsson et al., 2022, arXiv 2209.11895; in the form of Mamba, 2023, 2312.00752).

Random tokens; a special token stands once at a random place, followed by x, and once more at the
end, where x is the target. The special token is V-1, x and the filler are uniform over the others.
Mamba trains with V = 16 at length 256 and tests at other lengths.
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


def induction(
    rows: int, generator: torch.Generator, *, vocab_size: int, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Generate examples of the induction task.

    Args:
        rows: Number of examples.
        generator: Source of randomness.
        vocab_size: Number of tokens, V.
        seq_len: Tokens per example, T.
    """
    special = vocab_size - 1
    tokens = torch.randint(special, (rows, seq_len), generator=generator)
    place = torch.randint(seq_len - 2, (rows, 1), generator=generator)
    tokens.scatter_(1, place, special)
    tokens[:, -1] = special
    targets = torch.full_like(tokens, IGNORE)
    targets[:, -1:] = tokens.gather(1, place + 1)
    return tokens, targets


@dataset("induction")
@dataclass(kw_only=True, eq=False, repr=False)
class Induction(SyntheticData):
    """Induction: at the second special token, repeat what followed the first.

    Olsson et al., 2022, arXiv 2209.11895; Mamba, 2023, arXiv 2312.00752.

    Args:
        vocab_size: Number of tokens, the special one included.
        seq_len: Tokens per example in training, at least 3.
        test_lengths: Lengths of further test sets, named ``len128``.
        train_size: Number of training examples, repeated in epochs; None draws new ones forever.
        val_size: Number of validation examples.
        test_size: Number of examples in each test set.
        batch_size: Training examples per step.
        eval_batch_size: Examples per validation or test batch.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size.
    """

    vocab_size: int = 16
    seq_len: int = 32
    test_lengths: Sequence[int] = (64, 128)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vocab_size = checks.whole("vocab_size", self.vocab_size, 3)
        self.seq_len = checks.whole("seq_len", self.seq_len, 3)
        self._lengths = checks.each(checks.whole)("test_lengths", self.test_lengths, 3)

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return induction

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the test sets of other lengths."""
        return {f"len{length}": {"seq_len": length} for length in self._lengths}
