"""Flip-flop language: replay every sequence with one bit of memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets import IGNORE
from zoo.datasets.synthetic.flip_flop import PASS, READ, WRITE, flip_flop
from zoo.errors import ZooError


@given(
    pairs=st.integers(2, 20),
    p_ignore=st.sampled_from([0.0, 0.1, 0.8, 0.98, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_a_replay_gives_every_read_bit(pairs: int, p_ignore: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = flip_flop(4, generator, seq_len=2 * pairs, p_ignore=p_ignore)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert (row[0], row[-2]) == (WRITE, READ)
        stored = None
        for place in range(0, 2 * pairs, 2):
            instruction, bit = row[place : place + 2]
            assert instruction in (WRITE, READ, PASS)
            assert bit in (0, 1)
            assert wanted[place + 1] == IGNORE
            if instruction == WRITE:
                stored = bit
            if instruction == READ:
                assert bit == wanted[place] == stored
            else:
                assert wanted[place] == IGNORE


@pytest.mark.parametrize("p_ignore", [0.1, 0.8, 0.98])
def test_instructions_have_their_probabilities(p_ignore: float):
    tokens, _ = flip_flop(2000, torch.Generator().manual_seed(0), seq_len=64, p_ignore=p_ignore)
    middle = tokens[:, 2:-2:2]
    for instruction, expected in ((PASS, p_ignore), (WRITE, (1 - p_ignore) / 2)):
        share = (middle == instruction).double().mean().item()
        assert share == pytest.approx(expected, abs=0.01)


def test_bits_that_are_not_read_are_fair():
    tokens, _ = flip_flop(2000, torch.Generator().manual_seed(0), seq_len=64, p_ignore=0.8)
    for instruction in (PASS, WRITE):
        bits = tokens[:, 1::2][tokens[:, 0::2] == instruction]
        assert bits.double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_sparse_and_dense_sets_differ_in_their_ignores(whole):
    data = datasets.create("flip_flop", test_size=500)
    assert data.test_names == ["test", "sparse", "dense"]
    shares = [
        (whole(loader)["tokens"][:, 2:-2:2] == PASS).double().mean().item()
        for loader in data.test_dataloader()
    ]
    assert shares == pytest.approx([0.8, 0.98, 0.1], abs=0.02)
    assert data.vocab_size == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 33}, r"seq_len=33 must be an even number.* \(nearest: 32, 34\)"),
        ({"seq_len": 2}, "seq_len=2 must be an even number of at least 4"),
        ({"p_ignore": 1.1}, r"p_ignore=1.1 must be a number in \[0, 1\]"),
        ({"p_sparse": -0.1}, r"p_sparse=-0.1 must be a number in \[0, 1\]"),
        ({"p_dense": "0.1"}, r"p_dense='0.1' must be a number in \[0, 1\]"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("flip_flop", **options)
