"""Multi-query associative recall: every rule of the definition, recomputed from the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets import IGNORE
from zoo.datasets.synthetic.mqar import mqar
from zoo.errors import ZooError


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, object]:
    pairs = draw(st.integers(1, 6))
    seq_len = 4 * pairs + 2 * draw(st.integers(0, 10))
    return {
        "pairs": pairs,
        "seq_len": seq_len,
        "vocab_size": seq_len + draw(st.integers(1, 40)),
        "power_a": draw(st.sampled_from([0.01, 0.5, 1.0, 3.0])),
        "random_non_queries": draw(st.booleans()),
    }


@given(options=sizes(), seed=st.integers(0, 2**32))
def test_every_rule_holds(options: dict, seed: int):
    tokens, targets = mqar(4, torch.Generator().manual_seed(seed), **options)
    half, context = options["vocab_size"] // 2, 2 * options["pairs"]
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        keys, values = row[0:context:2], row[1:context:2]
        assert len(set(keys)) == len(set(values)) == options["pairs"]
        assert all(1 <= key < half for key in keys)
        assert all(half <= value < options["vocab_size"] for value in values)
        book = dict(zip(keys, values, strict=True))
        asked = [place for place, target in enumerate(wanted) if target != IGNORE]
        assert all(place >= context and place % 2 == 0 for place in asked)
        assert sorted(row[place] for place in asked) == sorted(keys)
        assert all(wanted[place] == book[row[place]] for place in asked)
        rest = [row[p] for p in range(context, len(row)) if p not in asked]
        if options["random_non_queries"]:
            assert all(0 <= token < options["vocab_size"] for token in rest)
        else:
            assert not any(rest)


def slots(power_a: float, rows: int = 4000) -> torch.Tensor:
    """Share of examples with a query in each of 6 slots, of which 2 are used."""
    options = {"vocab_size": 64, "seq_len": 16, "pairs": 2, "random_non_queries": False}
    generator = torch.Generator().manual_seed(0)
    _, targets = mqar(rows, generator, power_a=power_a, **options)
    return (targets[:, 4::2] != IGNORE).double().mean(dim=0)


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0])
def test_slots_are_drawn_one_after_the_other_by_the_power_law(power_a: float):
    law = torch.arange(1, 7, dtype=torch.float64) ** (power_a - 1)
    p = law / law.sum()
    # First draw, or second after any other first.
    expected = torch.stack(
        [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(6) if j != i) for i in range(6)]
    )
    # Five standard errors of a share near one half.
    torch.testing.assert_close(slots(power_a), expected, rtol=0, atol=0.04)


def test_the_default_favours_early_slots_and_one_is_uniform():
    early, uniform = slots(0.01), slots(1.0)
    assert (early[:-1] > early[1:]).all()
    assert early[0] > 2 * early[-1]
    assert uniform.max() - uniform.min() < 0.06


def test_which_key_comes_first_does_not_follow_the_context():
    generator = torch.Generator().manual_seed(0)
    options = {"vocab_size": 64, "seq_len": 16, "pairs": 2, "power_a": 1.0}
    tokens, targets = mqar(4000, generator, random_non_queries=False, **options)
    first = (targets != IGNORE).double().argmax(dim=1, keepdim=True)
    same = (tokens.gather(1, first)[:, 0] == tokens[:, 0]).double().mean()
    assert abs(same - 0.5) < 0.04


def test_noise_covers_the_whole_vocabulary():
    options = {"vocab_size": 20, "seq_len": 16, "pairs": 1, "power_a": 1.0}
    tokens, targets = mqar(
        2000, torch.Generator().manual_seed(0), random_non_queries=True, **options
    )
    noise = tokens[:, 2:][targets[:, 2:] == IGNORE]
    assert set(noise.tolist()) == set(range(20))


def test_further_sizes_become_test_sets(whole):
    data = datasets.create("mqar", test_sizes=[[128, 8], (32, 4)], test_size=10)
    assert data.test_names == ["test", "len128_pairs8", "len32_pairs4"]
    shapes = [whole(loader)["targets"] for loader in data.test_dataloader()]
    assert [t.shape[1] for t in shapes] == [64, 128, 32]
    assert [int((t[0] != IGNORE).sum()) for t in shapes] == [8, 8, 4]
    assert data.max_seq_len == 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 63}, r"seq_len=63 must be an even number.* \(nearest: 62, 64\)"),
        ({"pairs": 17}, "pairs=17 must be at most seq_len / 4 = 16"),
        ({"pairs": 0}, "pairs=0 must be a whole number of at least 1"),
        ({"vocab_size": 64}, "vocab_size=64 must be above seq_len=64"),
        ({"vocab_size": 3}, "vocab_size=3 must be a whole number of at least 4"),
        ({"power_a": 0}, "power_a=0 must be a number above 0"),
        ({"power_a": -1.0}, "power_a=-1.0 must be a number above 0"),
        ({"power_a": float("nan")}, "power_a=nan must be a number"),
        ({"random_non_queries": "false"}, "random_non_queries='false' must be True or False"),
        ({"test_sizes": 64}, "test_sizes=64 must be a list"),
        ({"test_sizes": [64]}, r"test_sizes\[0\]=64 must be a list"),
        ({"test_sizes": [(64, 8, 1)]}, r"\[0\]=\(64, 8, 1\) must be a pair \(seq_len, pairs\)"),
        ({"test_sizes": [(64, 17)]}, r"pairs in test_sizes\[0\]=17 must be at most .* = 16"),
        ({"test_sizes": [(512, 8)]}, r"must be above seq_len in test_sizes\[0\]=512"),
        ({"test_sizes": [(32, 4), (32, 4)]}, r"test_sizes=.* must be a list of different values"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("mqar", **options)


def test_the_smallest_task_works(first):
    data = datasets.create("mqar", vocab_size=5, seq_len=4, pairs=1, batch_size=2)
    (batch,) = first(data, 1)
    assert batch["tokens"][:, 0].tolist() == batch["tokens"][:, 2].tolist() == [1, 1]
