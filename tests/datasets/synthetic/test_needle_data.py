"""The needle: filler, key and question, and where the needle stands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets import IGNORE
from zoo.datasets.synthetic.needle import MARK, QUERY, needle
from zoo.errors import ZooError


@given(
    seq_len=st.integers(9, 80),
    depth=st.none() | st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_every_rule_holds(seq_len: int, depth: float | None, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = needle(4, generator, seq_len=seq_len, depth=depth)
    assert tokens.shape == targets.shape == (4, seq_len)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        place = row.index(MARK)
        key = row[place + 1 : place + 5]
        assert all(16 <= digit < 26 for digit in key)
        assert row[-4:] == [QUERY, *key[:3]]
        assert wanted == [IGNORE] * (seq_len - 4) + key
        filler = row[:place] + row[place + 5 : -4]
        assert filler == [(filler[0] + i) % 16 if filler else 0 for i in range(seq_len - 9)]
        if depth is not None:
            assert place == round(depth * (seq_len - 9))


def test_an_example_by_hand():
    tokens, targets = needle(1, torch.Generator().manual_seed(3), seq_len=12, depth=1 / 3)
    a, b, c, d = (int(digit) for digit in targets[0, -4:])
    f = int(tokens[0, 0])
    filler = [(f + i) % 16 for i in range(3)]
    expected = [filler[0], MARK, a, b, c, d, filler[1], filler[2], QUERY, a, b, c]
    assert tokens[0].tolist() == expected


def test_places_digits_and_phases_are_uniform():
    tokens, targets = needle(6000, torch.Generator().manual_seed(0), seq_len=13)
    share = (tokens == MARK).double().mean(0)
    torch.testing.assert_close(share[:5], torch.full((5,), 0.2).double(), rtol=0, atol=0.026)
    assert share[5:].sum() == 0
    for column in targets[:, -4:].unbind(1):
        digits = column.bincount(minlength=26)[16:] / 6000
        torch.testing.assert_close(digits, torch.full((10,), 0.1), rtol=0, atol=0.02)
    phases = tokens[tokens[:, 0] != MARK, 0].bincount(minlength=16).double()
    torch.testing.assert_close(
        phases / phases.sum(), torch.full((16,), 1 / 16).double(), atol=0.02, rtol=0
    )


def test_lengths_and_depths_become_test_sets(whole):
    data = datasets.create("needle", test_lengths=[20, 30], test_depths=[0, 0.125, 1], test_size=7)
    assert data.test_names == [
        *("test", "20", "30"),
        *("20_depth0", "20_depth12.5", "20_depth100"),
        *("30_depth0", "30_depth12.5", "30_depth100"),
    ]
    assert data.max_seq_len == 128
    sets = {name: whole(data.eval_dataloader(name))["tokens"] for name in data.test_names}
    assert sets["test"].shape == (7, 128)
    assert sets["20"].shape == (7, 20)
    places = {name: set((rows == MARK).nonzero()[:, 1].tolist()) for name, rows in sets.items()}
    assert places["20_depth0"] == {0}
    assert places["20_depth100"] == {11}
    assert places["30_depth12.5"] == {round(21 / 8)}
    assert len(places["test"]) > 1
    alone = datasets.create("needle", seq_len=20, test_lengths=[], test_depths=[0.5])
    assert alone.test_names == ["test", "20_depth50"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 8}, "seq_len=8 must be a whole number of at least 9"),
        ({"test_lengths": [64, 2]}, r"test_lengths\[1\]=2 must be a whole number of at least 9"),
        ({"test_lengths": [64, 64]}, r"test_lengths=\[64, 64\] must be a list of different values"),
        ({"test_depths": [1.5]}, r"test_depths\[0\]=1.5 must be a number in \[0, 1\]"),
        ({"test_depths": 0.5}, "test_depths=0.5 must be a list"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("needle", **options)
