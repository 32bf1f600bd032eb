"""Small things that the tests of the data sets share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from zoo import datasets
from zoo.datasets import DataModule

# One small set of options for each generated task; a new task must be added here.
SMALL = {
    "mqar": {"vocab_size": 64, "seq_len": 32, "pairs": 4, "test_sizes": [(16, 2)]},
    "selective_copy": {"seq_len": 20, "copies": 4, "dense_blanks": 3, "sparse_blanks": 30},
    "flip_flop": {"seq_len": 32},
    "counting": {"seq_len": 40, "max_statements": 16, "test_statements": [24], "variables": 2},
    "induction": {"seq_len": 16, "test_lengths": [24]},
    "needle": {"seq_len": 20, "test_lengths": [40], "test_depths": [0.5]},
    "count_ones": {"seq_len": 12, "max_ones": 4, "test_lengths": [20]},
    "delete_and_copy": {"seq_len": 10, "items": 4},
    "noisy_recall": {"vocab_size": 16, "seq_len": 20, "test_lengths": [30]},
    "parity": {"seq_len": 16, "test_lengths": [24]},
}


@pytest.fixture
def tasks() -> list[str]:
    return sorted(SMALL)


@pytest.fixture(params=sorted(SMALL))
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small():
    """Build a small generated data set by name."""

    def build(name: str, **options: object) -> DataModule:
        return datasets.create(name, **{"val_size": 50, "test_size": 40, **SMALL[name], **options})

    return build


@pytest.fixture
def first():
    """Return the first training batches of a data module."""

    def take(data: DataModule, count: int) -> list[dict[str, Tensor]]:
        return list(islice(iter(data.train_dataloader()), count))

    return take


@pytest.fixture
def whole():
    """Concatenate the batches of a loader."""

    def join(loader: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        batches = list(loader)
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    return join


@pytest.fixture
def same():
    """Require two batches to be equal, entry by entry."""

    def check(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], rtol=0, atol=0)

    return check
