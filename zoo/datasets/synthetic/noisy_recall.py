"""Noisy recall (MAD, 2024, arXiv 2403.17844): pairs of a key and its value, and noise between them.

A sequence is T/2 slots of two tokens. A slot holds a key and its value or, with probability p, two
tokens of noise. Which value belongs to which key is drawn anew for every sequence and then stays:
a key that comes again comes with the value it came with before. The target at a key that has been
there before is its value. The first slot is a pair, and the last slot asks for one of the keys that
came before it::

    k3 v7 | n1 n9 | k5 v2 | n4 n4 | k3 v7 | k5 v2
                                    v7      v2      <- targets

Of V tokens the first quarter are keys, the second values, the others noise. Several keys may have
the same value. Guessing any value is right one time in V/4.

Where we follow neither code nor paper: MAD trains on every next token, noise included, and asks
only in the test; here training has the targets of the test, so that a short run learns them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import checks
from zoo.datasets.base import IGNORE
from zoo.datasets.registry import dataset
from zoo.datasets.synthetic.sequences import SyntheticData


def noisy_recall(
    rows: int, generator: torch.Generator, *, vocab_size: int, seq_len: int, noise: float
) -> tuple[Tensor, Tensor]:
    """Generate examples of noisy recall.

    Args:
        rows: Number of examples.
        generator: Source of randomness.
        vocab_size: Number of tokens, V.
        seq_len: Tokens per example, T.
        noise: Probability that a slot holds noise, p.
    """
    kinds, slots = vocab_size // 4, seq_len // 2
    book = torch.randint(kinds, (rows, kinds), generator=generator) + kinds
    keys = torch.randint(kinds, (rows, slots), generator=generator)
    paired = torch.rand(rows, slots, generator=generator) >= noise
    paired[:, 0] = paired[:, -1] = True

    # The last slot comes back to a pair that stands before it, any of them alike.
    lots = torch.rand(rows, slots - 1, generator=generator).masked_fill(~paired[:, :-1], -1)
    keys[:, -1:] = keys.gather(1, lots.argmax(1, keepdim=True))

    values = book.gather(1, keys)
    pairs = torch.stack((keys, values), dim=-1)
    distractors = torch.randint(2 * kinds, vocab_size, pairs.shape, generator=generator)
    tokens = torch.where(paired[..., None], pairs, distractors).flatten(1)

    seen = F.one_hot(keys, kinds) * paired[..., None]
    before = (seen.cumsum(1) - seen).gather(2, keys[..., None])[..., 0]
    asked = torch.where(paired & (before > 0), values, IGNORE)
    targets = torch.stack((asked, torch.full_like(asked, IGNORE)), dim=-1).flatten(1)
    return tokens, targets


@dataset("noisy_recall")
@dataclass(kw_only=True, eq=False, repr=False)
class NoisyRecall(SyntheticData):
    """Noisy recall: give the value that a key came with, whatever noise stands between.

    MAD, 2024, arXiv 2403.17844, noisy in-context recall.

    Args:
        vocab_size: Number of tokens, a multiple of 4: a quarter keys, a quarter values, the
            others noise.
        seq_len: Tokens per example in training, even, at least 4.
        noise: Probability that a slot of two tokens holds noise in training.
        test_noise: The same in further test sets, named by the percentage: ``noise80``.
        test_lengths: Lengths of further test sets, named by the length: ``256``.
        train_size: Number of training examples, repeated in epochs; None draws new ones forever.
        val_size: Number of validation examples.
        test_size: Number of examples in each test set.
        batch_size: Training examples per step.
        eval_batch_size: Examples per validation or test batch; fewer of the longer ones.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size or probability.
    """

    vocab_size: int = 64
    noise: float = 0.4
    test_noise: Sequence[float] = (0.8,)
    test_lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vocab_size = checks.multiple("vocab_size", self.vocab_size, 4, 8)
        self.noise = checks.number("noise", self.noise, 0, 1)
        self._noises = checks.each(checks.number)("test_noise", self.test_noise, 0, 1)
        self.seq_len = checks.multiple("seq_len", self.seq_len, 2, 4)
        self._lengths = checks.each(checks.multiple)("test_lengths", self.test_lengths, 2, 4)

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return noisy_recall

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the test sets with other noise, and those of other lengths."""
        found: dict[str, dict[str, Any]] = {f"noise{100 * p:g}": {"noise": p} for p in self._noises}
        return found | {str(n): {"seq_len": n} for n in self._lengths}
