"""Parity: a replay of every sequence, splits that share none, and what chance gets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets import IGNORE
from zoo.datasets.synthetic.parity import SHARES, parity, shares
from zoo.errors import ZooError


@given(
    seq_len=st.integers(8, 60),
    asked_from=st.integers(0, 7),
    kept=st.sets(st.integers(0, SHARES - 1), min_size=1),
    seed=st.integers(0, 2**32),
)
def test_every_rule_holds(seq_len: int, asked_from: int, kept: set[int], seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = parity(
        4, generator, seq_len=seq_len, asked_from=asked_from, kept=sorted(kept)
    )
    assert tokens.shape == targets.shape == (4, seq_len)
    assert set(shares(tokens).tolist()) <= kept
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        odd = False
        for place, (bit, target) in enumerate(zip(row, wanted, strict=True)):
            odd ^= bool(bit)
            assert target == (IGNORE if place < asked_from else odd)


def test_an_example_by_hand():
    tokens, targets = parity(500, torch.Generator().manual_seed(0), seq_len=8)
    row = tokens.tolist().index([1, 0, 1, 1, 0, 0, 1, 0])
    assert targets[row].tolist() == [1, 1, 0, 1, 1, 1, 0, 0]


def test_the_same_seed_gives_the_same_examples(small, first):
    left, right = (first(small("parity", batch_size=5), 3) for _ in range(2))
    other = first(small("parity", batch_size=5, seed=1), 3)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(left, right, strict=True))
    assert not torch.equal(left[0]["tokens"], other[0]["tokens"])


def test_no_sequence_is_in_two_splits_however_few_there_are(first, whole):
    data = datasets.create("parity", seq_len=8, batch_size=500, val_size=300, test_size=300)
    found = {
        "train": torch.cat([batch["tokens"] for batch in first(data, 8)]),
        "another seed": first(datasets.create("parity", seq_len=8, seed=3, batch_size=500), 1)[0][
            "tokens"
        ],
        "val": whole(data.val_dataloader())["tokens"],
        "test": whole(data.test_dataloader()[0])["tokens"],
    }
    rows = {name: set(map(tuple, tokens.tolist())) for name, tokens in found.items()}
    train = rows["train"] | rows["another seed"]
    assert not train & rows["val"]
    assert not train & rows["test"]
    assert not rows["val"] & rows["test"]
    # All 256 sequences are somewhere, three quarters of them in training.
    assert len(train | rows["val"] | rows["test"]) == 256
    assert len(rows["train"]) == pytest.approx(192, abs=25)


@pytest.mark.parametrize("split", ["train", "val", "test", "128", "256"])
def test_no_position_favours_an_answer(split):
    data = datasets.create("parity", test_lengths=[128, 256])
    batch = data.stream(split).take(torch.arange(3000))
    bits, targets = batch["tokens"].double(), batch["targets"]
    # Five standard errors of a share of one half.
    assert (bits.mean(0) - 0.5).abs().max() < 0.046
    asked = targets[0] != IGNORE
    assert (targets[:, asked].double().mean(0) - 0.5).abs().max() < 0.046
    # Nor does the bit itself, or the one before: chance is one half.
    if split != "train":
        same = (targets == batch["tokens"])[:, asked][:, 1:].double().mean(0)
        assert (same - 0.5).abs().max() < 0.046


def test_longer_test_sets_ask_where_training_never_went(whole):
    data = datasets.create("parity", test_size=6, test_lengths=[41, 100])
    assert data.test_names == ["test", "41", "100"]
    assert data.max_seq_len == 100
    asked = [
        (whole(loader)["targets"] != IGNORE).nonzero()[:, 1] for loader in data.test_dataloader()
    ]
    assert [(int(a.min()), int(a.max())) for a in asked] == [(0, 39), (40, 40), (40, 99)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 7}, "seq_len=7 must be a whole number of at least 8"),
        ({"seq_len": 40.0}, "seq_len=40.0 must be a whole number"),
        ({"test_lengths": 64}, "test_lengths=64 must be a list"),
        ({"test_lengths": [64, 64]}, r"test_lengths=\[64, 64\] must be a list of different values"),
        ({"test_lengths": [40]}, r"test_lengths\[0\]=40 must be a whole number of at least 41"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("parity", **options)
