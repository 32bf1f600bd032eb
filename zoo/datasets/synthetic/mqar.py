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

from zoo import checks
from zoo.datasets.base import IGNORE
from zoo.datasets.registry import dataset
from zoo.datasets.synthetic.sequences import SyntheticData, distinct


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
        self.vocab_size = checks.whole("vocab_size", self.vocab_size, 4)
        self.power_a = checks.number("power_a", self.power_a, above=0)
        self.random_non_queries = checks.flag("random_non_queries", self.random_non_queries)
        self.seq_len, self.pairs = self._size("", self.seq_len, self.pairs)
        self._sizes = checks.each(self._pair)("test_sizes", self.test_sizes)

    def _pair(self, name: str, value: object) -> tuple[int, int]:
        items = checks.several(name, value, distinct=False)
        if len(items) != 2:
            raise checks.wrong(name, value, "a pair (seq_len, pairs)")
        return self._size(f" in {name}", *items)

    def _size(self, where: str, seq_len: object, pairs: object) -> tuple[int, int]:
        length = checks.multiple(f"seq_len{where}", seq_len, 2, 4)
        count = checks.whole(f"pairs{where}", pairs, 1)
        if 4 * count > length:
            raise checks.wrong(f"pairs{where}", count, f"at most seq_len / 4 = {length // 4}")
        if self.vocab_size <= length:
            raise checks.wrong("vocab_size", self.vocab_size, f"above seq_len{where}={length}")
        return length, count

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return mqar

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the further test sizes."""
        return {f"len{n}_pairs{k}": {"seq_len": n, "pairs": k} for n, k in self._sizes}
