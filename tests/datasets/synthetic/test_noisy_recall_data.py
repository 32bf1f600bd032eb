"""Noisy recall: every rule of the definition, recomputed from the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets import IGNORE
from zoo.datasets.synthetic.noisy_recall import noisy_recall
from zoo.errors import ZooError


@given(
    quarter=st.integers(2, 12),
    slots=st.integers(2, 30),
    noise=st.sampled_from([0.0, 0.2, 0.4, 0.8, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_every_rule_holds(quarter: int, slots: int, noise: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = noisy_recall(
        4, generator, vocab_size=4 * quarter, seq_len=2 * slots, noise=noise
    )
    assert tokens.shape == targets.shape == (4, 2 * slots)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        book: dict[int, int] = {}
        for place in range(0, 2 * slots, 2):
            head, tail = row[place : place + 2]
            assert wanted[place + 1] == IGNORE
            if head >= 2 * quarter:
                assert 2 * quarter <= tail < 4 * quarter
                assert wanted[place] == IGNORE
            else:
                assert 0 <= head < quarter <= tail < 2 * quarter
                assert wanted[place] == (tail if head in book else IGNORE)
                assert book.setdefault(head, tail) == tail
        assert row[0] < quarter
        assert wanted[-2] != IGNORE


def test_an_example_by_hand():
    # All slots between the first and the last are noise, so the last brings the first back.
    tokens, targets = noisy_recall(
        50, torch.Generator().manual_seed(0), vocab_size=16, seq_len=8, noise=1.0
    )
    assert torch.equal(tokens[:, :2], tokens[:, 6:])
    assert (tokens[:, 2:6] >= 8).all()
    ignored = torch.full((50, 8), IGNORE)
    ignored[:, 6] = tokens[:, 1]
    assert torch.equal(targets, ignored)


def test_the_same_seed_gives_the_same_examples(small, first):
    left, right = (first(small("noisy_recall", batch_size=5), 3) for _ in range(2))
    other = first(small("noisy_recall", batch_size=5, seed=1), 3)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(left, right, strict=True))
    assert not torch.equal(left[0]["tokens"], other[0]["tokens"])


def test_no_sequence_is_in_two_splits(first, whole):
    data = datasets.create("noisy_recall", batch_size=800, val_size=800, test_size=800)
    parts = [first(data, 2)[0], whole(data.val_dataloader()), whole(data.test_dataloader()[0])]
    parts.append(first(datasets.create("noisy_recall", batch_size=800, seed=1), 1)[0])
    rows = [tuple(row) for part in parts for row in part["tokens"].tolist()]
    assert len(set(rows)) == len(rows) == 3200


@pytest.mark.parametrize("noise", [0.0, 0.4, 0.8])
def test_slots_are_noise_with_the_probability_and_all_tokens_come_alike(noise: float):
    tokens, _ = noisy_recall(
        2000, torch.Generator().manual_seed(0), vocab_size=32, seq_len=32, noise=noise
    )
    middle = tokens[:, 2:-2:2]
    assert (middle >= 16).double().mean().item() == pytest.approx(noise, abs=0.015)
    for low, tokens_of in ((0, middle[middle < 8]), (16, middle[middle >= 16])):
        count = 8 if low == 0 else 16
        share = tokens_of.bincount(minlength=32).double()[low : low + count] / max(
            len(tokens_of), 1
        )
        if len(tokens_of):
            assert (share - 1 / count).abs().max() < 0.02


def test_guessing_a_value_gets_what_chance_gets():
    _, targets = noisy_recall(
        4000, torch.Generator().manual_seed(0), vocab_size=64, seq_len=32, noise=0.4
    )
    answers = targets[targets != IGNORE].bincount(minlength=64).double()
    share = answers[16:32] / answers.sum()
    assert (share - 1 / 16).abs().max() < 0.01
    assert answers[:16].sum() == answers[32:].sum() == 0


def test_the_last_slot_comes_back_to_any_pair_alike():
    tokens, _ = noisy_recall(
        6000, torch.Generator().manual_seed(0), vocab_size=400, seq_len=10, noise=0.0
    )
    # With a hundred keys for five slots, two of them are seldom the same.
    same = (tokens[:, 0:8:2] == tokens[:, 8:9]).double().mean(0)
    assert (same - 0.25 - 0.75 * 0.01).abs().max() < 0.03


def test_noise_and_lengths_become_test_sets(whole):
    data = datasets.create("noisy_recall", test_noise=[0.8, 0.125], test_lengths=[128], test_size=9)
    assert data.test_names == ["test", "noise80", "noise12.5", "128"]
    assert data.max_seq_len == 128
    sets = [whole(loader)["tokens"] for loader in data.test_dataloader()]
    assert [s.shape for s in sets] == [(9, 64), (9, 64), (9, 64), (9, 128)]
    shares = [(s[:, 2:-2:2] >= 32).double().mean().item() for s in sets]
    assert shares == pytest.approx([0.4, 0.8, 0.125, 0.4], abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 30}, r"vocab_size=30 must be a multiple of 4.* \(nearest: 28, 32\)"),
        ({"vocab_size": 4}, "vocab_size=4 must be a multiple of 4 of at least 8"),
        ({"seq_len": 33}, r"seq_len=33 must be an even number.* \(nearest: 32, 34\)"),
        ({"seq_len": 2}, "seq_len=2 must be an even number of at least 4"),
        ({"noise": 1.5}, r"noise=1.5 must be a number in \[0, 1\]"),
        ({"test_noise": 0.5}, "test_noise=0.5 must be a list"),
        ({"test_noise": [0.5, -1]}, r"test_noise\[1\]=-1 must be a number in \[0, 1\]"),
        ({"test_lengths": [65]}, r"test_lengths\[0\]=65 must be an even .* \(nearest: 64, 66\)"),
        ({"test_lengths": [64, 64]}, r"test_lengths=\[64, 64\] must be a list of different values"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("noisy_recall", **options)
