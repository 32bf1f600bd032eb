"""Selective copying (Mamba, 2023, arXiv 2312.00752; in the form of MAD, 2024, arXiv 2403.17844).

Content tokens stand scattered among blanks, then comes the copy token, then as many blanks as
there was content, at which the content must be given in its order. Tokens 0 .. V-3 are content,
V-2 is the blank and V-1 the copy token. Every set of places for the content is equally likely
(MAD's code always ends the scattered part with content; we follow the paper).

CoPE (2024, arXiv 2405.18719) trains with 128 blanks and 128 content tokens and tests with 64
blanks ("dense") and 256 ("sparse").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo import checks
from zoo.datasets.base import IGNORE
from zoo.datasets.registry import dataset
from zoo.datasets.synthetic.sequences import SyntheticData, distinct


def selective_copy(
    rows: int, generator: torch.Generator, *, vocab_size: int, seq_len: int, copies: int
) -> tuple[Tensor, Tensor]:
    """Generate examples of selective copying.

    Args:
        rows: Number of examples.
        generator: Source of randomness.
        vocab_size: Number of tokens, V.
        seq_len: Tokens per example, T.
        copies: Content tokens per example.
    """
    blank, copy = vocab_size - 2, vocab_size - 1
    body = seq_len - copies - 1
    content = torch.randint(blank, (rows, copies), generator=generator)
    places = distinct(rows, copies, 0, body, generator).sort(dim=-1).values
    tokens = torch.full((rows, seq_len), blank)
    tokens.scatter_(1, places, content)
    tokens[:, body] = copy
    targets = torch.full_like(tokens, IGNORE)
    targets[:, body + 1 :] = content
    return tokens, targets


@dataset("selective_copy")
@dataclass(kw_only=True, eq=False, repr=False)
class SelectiveCopy(SyntheticData):
    """Selective copying: repeat the content tokens in order, leaving out the blanks.

    Mamba, 2023, arXiv 2312.00752; MAD, 2024, arXiv 2403.17844.

    Args:
        vocab_size: Number of tokens, the blank and the copy token included.
        seq_len: Tokens per example, at least ``2 * copies + 1``.
        copies: Content tokens per example.
        dense_blanks: Blanks among the content in a further test set "dense"; None for no such set.
        sparse_blanks: Blanks among the content in a further test set "sparse"; None for no such
            set.
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
    copies: int = 8
    dense_blanks: int | None = None
    sparse_blanks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vocab_size = checks.whole("vocab_size", self.vocab_size, 4)
        self.copies = checks.whole("copies", self.copies, 1)
        self.seq_len = checks.whole("seq_len", self.seq_len, 3)
        least = 2 * self.copies + 1
        if self.seq_len < least:
            raise checks.wrong("seq_len", self.seq_len, f"at least 2 * copies + 1 = {least}")
        for name in ("dense_blanks", "sparse_blanks"):
            setattr(self, name, checks.optional(checks.whole)(name, getattr(self, name), 0))

    def _blanks(self) -> dict[str, int]:
        given = {"dense": self.dense_blanks, "sparse": self.sparse_blanks}
        return {name: blanks for name, blanks in given.items() if blanks is not None}

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return selective_copy

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the test sets with another number of blanks."""
        return {
            name: {"seq_len": blanks + 2 * self.copies + 1}
            for name, blanks in self._blanks().items()
        }
