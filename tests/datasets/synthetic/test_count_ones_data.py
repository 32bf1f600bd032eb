"""Counting ones: every one is numbered, and the last two tokens are ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets import IGNORE
from zoo.datasets.synthetic.count_ones import count_ones
from zoo.errors import ZooError


@given(max_ones=st.integers(2, 12), more=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_every_rule_holds(max_ones: int, more: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = count_ones(4, generator, seq_len=max_ones + more, max_ones=max_ones)
    assert tokens.shape == targets.shape == (4, max_ones + more)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert row[0] == 2
        assert set(row[1:]) <= {0, 1}
        assert row[-2:] == [1, 1]
        assert 2 <= row.count(1) <= max_ones
        number = 0
        for token, target in zip(row, wanted, strict=True):
            number += token == 1
            assert target == (2 + number if token == 1 else IGNORE)


def test_counts_are_uniform_and_so_are_places():
    tokens, _ = count_ones(6000, torch.Generator().manual_seed(0), seq_len=13, max_ones=6)
    counts = (tokens == 1).sum(1).bincount()[2:] / 6000
    torch.testing.assert_close(counts, torch.full((5,), 0.2), rtol=0, atol=0.026)
    places = (tokens[:, 1:-2] == 1).double().mean(0)
    torch.testing.assert_close(places, torch.full((10,), 0.2).double(), rtol=0, atol=0.026)


def test_other_lengths_become_test_sets_with_as_many_ones(whole):
    data = datasets.create("count_ones", test_lengths=[16, 100], test_size=300)
    assert data.test_names == ["test", "16", "100"]
    assert data.max_seq_len == 100
    assert data.vocab_size == 11
    sets = [whole(loader)["tokens"] for loader in data.test_dataloader()]
    assert [tokens.shape for tokens in sets] == [(300, 32), (300, 16), (300, 100)]
    for tokens in sets:
        assert (tokens == 1).sum(1).unique().tolist() == list(range(2, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_ones": 1}, "max_ones=1 must be a whole number of at least 2"),
        ({"seq_len": 8}, "seq_len=8 must be a whole number of at least 9"),
        ({"test_lengths": [64, 8]}, r"test_lengths\[1\]=8 must be a whole number of at least 9"),
        ({"test_lengths": [64, 64]}, r"test_lengths=\[64, 64\] must be a list of different values"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("count_ones", **options)
