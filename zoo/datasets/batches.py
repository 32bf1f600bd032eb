"""Batches by step number, in the shapes that a DataLoader and Lightning take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from zoo.datasets.order import Chunks, Order


class Steps(DistributedSampler[int]):
    """The step numbers from a start to an end.

    It is a DistributedSampler by type because Lightning then leaves it alone when it trains on
    several devices; it would otherwise shuffle the steps and deal them out one per process. The
    batches themselves are shared out by :class:`Shard`.

    Args:
        start: First step.
        stop: Step after the last.
    """

    def __init__(self, start: int, stop: int) -> None:
        self.steps = range(start, stop)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: what a step holds does not depend on a loop's count of epochs."""


class Source(Protocol):
    """Examples by index."""

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the batch of these examples."""


class Batches(Dataset[dict[str, Tensor]]):
    """Whole batches by step number: an order over a source.

    Args:
        source: Examples by index.
        order: Indices by step.
    """

    def __init__(self, source: Source, order: Order) -> None:
        self.source, self.order = source, order

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step."""
        return self.source.take(self.order(step))


class EvalBatches(Batches):
    """The batches of a finite set, counted.

    Args:
        source: Examples by index.
        order: Indices by step.
    """

    def __init__(self, source: Source, order: Chunks) -> None:
        super().__init__(source, order)
        self._length = len(order)

    def __len__(self) -> int:
        return self._length
