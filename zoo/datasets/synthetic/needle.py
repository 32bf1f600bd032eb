"""Needle in a haystack, or passkey (landmark attention, 2023, arXiv 2305.16300), with tokens.

The haystack is a cycle of 16 filler tokens, entered anywhere and repeated. At some place of it
stands the needle, a marker and a key of four digits; the sequence ends with the question, the
marker of the query and the key again::

    f7 f8 f9 MARK 3 0 3 9 f10 f11 ... f2 QUERY 3 0 3
                                         3     0 3 9    <- targets

Tokens 0 to 15 are the filler, 16 to 25 the digits, 26 the marker, 27 the query; no other occurs.
The digits are asked for with the ones before them in sight (teacher forcing), so that "exact", all
four at once, is the share of keys that greedy decoding would give in full; "accuracy" counts
digits, of which guessing gets one in ten.

A depth of 0 puts the needle at the beginning, 1 right before the query; training, validation and
the test sets of a length draw all places alike. The paper hides a number below 50,000 in repeated
sentences.
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

CYCLE, DIGITS, KEY = 16, 10, 4
MARK = CYCLE + DIGITS
QUERY = MARK + 1
SHORTEST = 2 * KEY + 1


def needle(
    rows: int, generator: torch.Generator, *, seq_len: int, depth: float | None = None
) -> tuple[Tensor, Tensor]:
    """Generate examples of a needle in a haystack.

    Args:
        rows: Number of examples.
        generator: Source of randomness.
        seq_len: Tokens per example, T.
        depth: Where the needle stands, 0 at the beginning to 1 at the end; None for anywhere.
    """
    haystack = seq_len - SHORTEST
    phase = torch.randint(CYCLE, (rows, 1), generator=generator)
    key = torch.randint(DIGITS, (rows, KEY), generator=generator) + CYCLE
    place = torch.randint(haystack + 1, (rows, 1), generator=generator)
    if depth is not None:
        place = torch.full_like(place, round(depth * haystack))
    filler = (phase + torch.arange(haystack)) % CYCLE
    marked = torch.cat([torch.full_like(place, MARK), key], 1)
    # Where each token of the haystack goes: those from the needle's place on make room for it.
    moved = torch.arange(haystack) + (torch.arange(haystack) >= place) * (KEY + 1)
    tokens = torch.full((rows, seq_len), QUERY)
    tokens.scatter_(1, moved, filler)
    tokens.scatter_(1, place + torch.arange(KEY + 1), marked)
    tokens[:, seq_len - KEY + 1 :] = key[:, :-1]
    targets = torch.full_like(tokens, IGNORE)
    targets[:, seq_len - KEY :] = key
    return tokens, targets


@dataset("needle")
@dataclass(kw_only=True, eq=False, repr=False)
class Needle(SyntheticData):
    """Needle in a haystack: repeat the four digits that stand somewhere in the filler.

    Landmark attention, 2023, arXiv 2305.16300, passkey retrieval.

    Args:
        seq_len: Tokens per example in training, at least 9.
        test_lengths: Lengths of further test sets, named by the length: ``256``.
        test_depths: Depths, from 0 to 1, of further test sets for every test length (for `seq_len`
            if there is none), named by length and percentage: ``256_depth50``.
        train_size: Number of training examples, repeated in epochs; None draws new ones forever.
        val_size: Number of validation examples.
        test_size: Number of examples in each test set.
        batch_size: Training examples per step.
        eval_batch_size: Examples per validation or test batch; fewer of the longer ones.
        seed: Seed of the training stream and order.
        num_workers: Processes that prepare batches.

    Raises:
        ZooError: An impossible size or depth.
    """

    seq_len: int = 128
    test_lengths: Sequence[int] = (256, 512, 1024)
    test_depths: Sequence[float] = ()
    test_size: int = 512

    vocab_size = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seq_len = checks.whole("seq_len", self.seq_len, SHORTEST)
        self._lengths = checks.each(checks.whole)("test_lengths", self.test_lengths, SHORTEST)
        self._depths = checks.each(checks.number)("test_depths", self.test_depths, 0, 1)

    def generate(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the generator."""
        return needle

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return the test sets of other lengths, and those of one depth."""
        found: dict[str, dict[str, Any]] = {str(n): {"seq_len": n} for n in self._lengths}
        for n in self._lengths or [self.seq_len]:
            for depth in self._depths:
                found[f"{n}_depth{100 * depth:g}"] = {"seq_len": n, "depth": depth}
        return found
