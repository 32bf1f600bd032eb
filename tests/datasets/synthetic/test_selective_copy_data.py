"""Selective copying: content in order, everything else in its place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets import IGNORE
from zoo.datasets.synthetic.selective_copy import selective_copy
from zoo.errors import ZooError


@given(
    vocab_size=st.integers(4, 30),
    copies=st.integers(1, 8),
    blanks=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_every_rule_holds(vocab_size: int, copies: int, blanks: int, seed: int):
    seq_len = blanks + 2 * copies + 1
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = selective_copy(
        4, generator, vocab_size=vocab_size, seq_len=seq_len, copies=copies
    )
    blank, copy = vocab_size - 2, vocab_size - 1
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        body, end = row[: -copies - 1], row[-copies - 1 :]
        assert end == [copy] + [blank] * copies
        assert copy not in body
        content = [token for token in body if token != blank]
        assert len(content) == copies
        assert wanted == [IGNORE] * (len(body) + 1) + content


def test_content_stands_anywhere_and_is_uniform():
    generator = torch.Generator().manual_seed(0)
    tokens, _ = selective_copy(6000, generator, vocab_size=7, seq_len=12, copies=3)
    body = tokens[:, :8]
    share = (body != 5).double().mean(dim=0)
    torch.testing.assert_close(share, torch.full((8,), 3 / 8).double(), rtol=0, atol=0.032)
    kinds = body[body != 5].bincount(minlength=5) / 18000
    torch.testing.assert_close(kinds, torch.full((5,), 0.2), rtol=0, atol=0.015)


def test_dense_and_sparse_sets_have_their_blanks(whole):
    data = datasets.create(
        "selective_copy", copies=4, seq_len=17, dense_blanks=0, sparse_blanks=30, test_size=9
    )
    assert data.test_names == ["test", "dense", "sparse"]
    blanks = [
        set((whole(loader)["tokens"][:, :-5] == 14).sum(dim=1).tolist())
        for loader in data.test_dataloader()
    ]
    assert blanks == [{8}, {0}, {30}]
    assert data.max_seq_len == 39


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 3}, "vocab_size=3 must be a whole number of at least 4"),
        ({"copies": 0}, "copies=0 must be a whole number of at least 1"),
        ({"copies": 32}, r"seq_len=64 must be at least 2 \* copies \+ 1 = 65"),
        ({"dense_blanks": -1}, "dense_blanks=-1 must be a whole number of at least 0"),
        ({"sparse_blanks": 2.5}, "sparse_blanks=2.5 must be a whole number of at least 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("selective_copy", **options)
