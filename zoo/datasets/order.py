"""Which examples make up which batch: deterministic functions of a step, and their seeds.

Every order answers ``order(step) -> indices`` whatever was asked before, so that a run that was
killed goes on with the batch it would have seen.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor


def generator(*key: object) -> torch.Generator:
    """Return a random generator whose seed is a hash of the key.

    Args:
        key: What the numbers belong to, e.g. ``("mqar", seed, "train", block)``; only values
            whose ``repr`` is stable, i.e. strings, numbers and tuples of them.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # torch takes seeds of 64 bits with a sign; 63 bits are positive everywhere.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Order(Protocol):
    """Indices of the examples in the batch of a step."""

    def __call__(self, step: int) -> Tensor:
        """Return the indices of a step."""


class Stream:
    """An endless stream: batch ``step`` holds the next ``batch_size`` examples.

    Args:
        batch_size: Examples per batch.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __call__(self, step: int) -> Tensor:
        """Indices (batch_size,) of a step."""
        return torch.arange(step * self.batch_size, (step + 1) * self.batch_size)


class Epochs:
    """A finite set in a new permutation every epoch; batches run over the end of an epoch.

    Args:
        size: Number of examples.
        batch_size: Examples per batch.
        seed: Seed of the permutations.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._permutations: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        """Indices (batch_size,) of a step."""
        place = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        first, last = int(place[0]) // self.size, int(place[-1]) // self.size
        kept = self._permutations
        self._permutations = {
            epoch: kept[epoch] if epoch in kept else self._permutation(epoch)
            for epoch in range(first, last + 1)
        }
        return torch.cat(list(self._permutations.values()))[place - first * self.size]

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.size, generator=generator("epoch", self.seed, epoch))


class Draws:
    """Independent uniform draws with replacement, a new set of them every step.

    Args:
        size: Number of examples.
        batch_size: Examples per batch.
        seed: Seed of the draws.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed

    def __call__(self, step: int) -> Tensor:
        """Indices (batch_size,) of a step."""
        source = generator("draw", self.seed, step)
        return torch.randint(self.size, (self.batch_size,), generator=source)


class Chunks:
    """A finite set once through, in its own order; the last batch may be shorter.

    Args:
        size: Number of examples.
        batch_size: Examples per batch.
    """

    def __init__(self, size: int, batch_size: int) -> None:
        self.size, self.batch_size = size, batch_size

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __call__(self, step: int) -> Tensor:
        """Indices (at most batch_size,) of a step."""
        start = step * self.batch_size
        return torch.arange(start, min(start + self.batch_size, self.size))


class Shard:
    """One process's share of every batch of another order.

    Args:
        order: Order of the whole batches.
        rank: Number of this process.
        world: Number of processes.
    """

    def __init__(self, order: Order, rank: int, world: int) -> None:
        self.order, self.rank, self.world = order, rank, world

    def __call__(self, step: int) -> Tensor:
        """Indices (batch_size / world,) of a step."""
        return self.order(step)[self.rank :: self.world]
