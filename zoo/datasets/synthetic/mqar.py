"""Multi-query associative recall (Zoology, 2023, arXiv 2312.04927).

A sequence starts with K key-value pairs ``k1 v1 k2 v2 ...``. The rest is cut into slots of two
tokens, and every key comes back once, at the head of a slot; there, and only there, the target is
the key's value. Slot g = 1, 2, ... is drawn without replacement with probability proportional to
g^(a-1): a = 0.01 favours early slots, as the distance between repeated bigrams in text does;
a = 1 is uniform. All other positions hold noise from the whole vocabulary, or zeros.

The published sizes are (seq_len, pairs) = (64, 4), (128, 8), (256, 16), (512, 64) with 8192 tokens
and 100,000 training examples. The default is a smaller task that still separates mechanisms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.datasets import checks
from zoo.datasets.base import IGNORE
from zoo.datasets.registry import dataset
from zoo.datasets.synthetic.sequences import SyntheticData, distinct
from zoo.errors import ZooError


def mqar(
    rows: int,
    generator: torch.Generator,
    *,
    vocab_size: int,
    seq_len: int,
    pairs: int,
    power_a: float,
    random_non_queries: bool,
) -> tuple[Tensor, Tensor]:
    """Generate examples of multi-query associative recall.

    Args:
        rows: Number of examples.
        generator: Source of randomness.
        vocab_size: Keys are the tokens from 1, values those from ``vocab_size // 2``.
        seq_len: Tokens per example, T.
        pairs: Key-value pairs per example, K.
        power_a: Exponent a of the law of the slots.
        random_non_queries: Fill the remaining positions with noise instead of zeros.
    """
    keys = distinct(rows, pairs, 1, vocab_size // 2, generator)
    values = distinct(rows, pairs, vocab_size // 2, vocab_size, generator)
    context = 2 * pairs
    slots = torch.arange(1, (seq_len - context) // 2 + 1, dtype=torch.float64)
    law = (slots ** (power_a - 1)).expand(rows, -1)
    places = context + 2 * torch.multinomial(law, pairs, generator=generator)

    tokens = torch.zeros(rows, seq_len, dtype=torch.int64)
    tokens[:, 0:context:2] = keys
    tokens[:, 1:context:2] = values
    tokens.scatter_(1, places, keys)
    targets = torch.full_like(tokens, IGNORE).scatter_(1, places, values)
    if random_non_queries:
        noise = torch.randint(vocab_size, tokens.shape, generator=generator)
        # No key or value is 0, so a zero is an unused position.
        tokens = torch.where(tokens == 0, noise, tokens)
    return tokens, targets


@dataset("mqar")
@dataclass(kw_only=True, eq=False, repr=False)
class MQAR(SyntheticData):
    """Multi-query associative recall: give every repeated key the value it came with.

    Zoology, 2023, arXiv 2312.04927, appendix on MQAR.

    Args:
        vocab_size: Number of tokens, more than ``seq_len``.
        seq_len: Tokens per example, even.
        pairs: Key-value pairs per example, at most ``seq_len / 4``.
        power_a: Exponent a > 0 of the law of the slots; 1 is uniform.
        random_non_queries: Noise instead of zeros between the queries.
        test_sizes: Further test sets as (seq_len, pairs), named ``len128_pairs8``.
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

    vocab_size: int = 256
    pairs: int = 8
    power_a: float = 0.01
    random_non_queries: bool = True
    test_sizes: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole("vocab_size", self.vocab_size, 4)
        checks.number("power_a", self.power_a, 0)
        if self.power_a == 0:
            raise ZooError(f"power_a must be greater than 0; got {self.power_a!r}")
        checks.flag("random_non_queries", self.random_non_queries)
        self._check_size(self.seq_len, self.pairs, "seq_len", "pairs")
        self._sizes: list[tuple[int, int]] = []
        for item in checks.several("test_sizes", self.test_sizes):
            size = checks.several("test_sizes", item, distinct=False)
            if len(size) != 2:
                raise ZooError(f"test_sizes must hold pairs (seq_len, pairs); got {item!r}")
            self._check_size(size[0], size[1], "seq_len in test_sizes", "pairs in test_sizes")
            self._sizes.append((size[0], size[1]))

    def _check_size(self, seq_len: int, pairs: int, length_name: str, pairs_name: str) -> None:
        checks.whole(length_name, seq_len, 4)
        if seq_len % 2:
            raise ZooError(
                f"{length_name} must be even; got {seq_len} (nearest: {seq_len - 1}, {seq_len + 1})"
            )
        checks.whole(pairs_name, pairs, 1)
        if 4 * pairs > seq_len:
            raise ZooError(
                f"{pairs_name} must be at most {length_name} / 4 = {seq_len // 4}; got {pairs}"
            )
        if self.vocab_size <= seq_len:
            raise ZooError(
                f"vocab_size must be greater than {length_name} = {seq_len}; got {self.vocab_size}"
            )

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return mqar

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the further test sizes."""
        return {f"len{n}_pairs{k}": {"seq_len": n, "pairs": k} for n, k in self._sizes}
