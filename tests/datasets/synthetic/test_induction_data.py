"""Induction: the second special token asks for what followed the first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets import IGNORE
from zoo.datasets.synthetic.induction import induction
from zoo.errors import ZooError


@given(vocab_size=st.integers(3, 30), seq_len=st.integers(3, 40), seed=st.integers(0, 2**32))
def test_every_rule_holds(vocab_size: int, seq_len: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = induction(4, generator, vocab_size=vocab_size, seq_len=seq_len)
    special = vocab_size - 1
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert all(0 <= token <= special for token in row)
        places = [place for place, token in enumerate(row) if token == special]
        assert len(places) == 2
        assert places[1] == seq_len - 1
        assert wanted == [IGNORE] * (seq_len - 1) + [row[places[0] + 1]]
        assert wanted[-1] != special


def test_the_first_special_token_stands_anywhere():
    tokens, targets = induction(6000, torch.Generator().manual_seed(0), vocab_size=5, seq_len=8)
    share = (tokens[:, :-1] == 4).double().mean(dim=0)
    torch.testing.assert_close(share[:6], torch.full((6,), 1 / 6).double(), rtol=0, atol=0.025)
    assert share[6] == 0
    answers = targets[:, -1].bincount(minlength=4) / 6000
    torch.testing.assert_close(answers, torch.full((4,), 0.25), rtol=0, atol=0.03)


def test_other_lengths_become_test_sets(whole):
    data = datasets.create("induction", test_lengths=[8, 100], test_size=7)
    assert data.test_names == ["test", "len8", "len100"]
    lengths = [whole(loader)["tokens"].shape for loader in data.test_dataloader()]
    assert lengths == [(7, 32), (7, 8), (7, 100)]
    assert data.max_seq_len == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 2}, "vocab_size=2 must be a whole number of at least 3"),
        ({"seq_len": 2}, "seq_len=2 must be a whole number of at least 3"),
        ({"test_lengths": [64, 2]}, r"test_lengths\[1\]=2 must be a whole number of at least 3"),
        ({"test_lengths": 64}, "test_lengths=64 must be a list"),
        ({"test_lengths": [64, 64]}, r"test_lengths=\[64, 64\] must be a list of different values"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("induction", **options)
