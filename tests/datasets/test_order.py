"""Orders: what a step holds, whatever was asked before."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.datasets.order import Chunks, Draws, Epochs, Shard, Stream, generator


def numbers(*key: object) -> list[int]:
    return torch.randint(10**9, (4,), generator=generator(*key)).tolist()


def test_generator_depends_on_every_part_of_its_key():
    keys = [("a", 0, 1), ("a", 1, 0), ("a", 0, "1"), ("b", 0, 1), ("a", 0), ("a", (0, 1))]
    drawn = [tuple(numbers(*key)) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert numbers("a", 0, 1) == numbers("a", 0, 1)


def test_seeds_do_not_change_between_releases():
    # Records name generated data by its parameters, so another hash would be another data set.
    assert generator("mqar", 1, 0, "train", 0).initial_seed() == 3003651902628705789


@given(size=st.integers(1, 20), batch=st.integers(1, 50), seed=st.integers(0, 5))
def test_epochs_show_every_example_once_per_epoch(size: int, batch: int, seed: int):
    order = Epochs(size, batch, seed)
    steps = -(-3 * size // batch)
    seen = torch.cat([order(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_epochs_use_another_permutation_each_time_and_for_each_seed():
    order = Epochs(50, 50, 0)
    permutations = [order(0), order(1), Epochs(50, 50, 1)(0)]
    assert len({tuple(p.tolist()) for p in permutations}) == 3


@given(
    kind=st.sampled_from(["stream", "epochs", "draws"]),
    steps=st.lists(st.integers(0, 300), min_size=1, max_size=8),
)
def test_a_step_is_the_same_whatever_was_asked_before(kind: str, steps: list[int]):
    def make():
        kinds = {"stream": Stream(7), "epochs": Epochs(30, 7, 3), "draws": Draws(30, 7, 3)}
        return kinds[kind]

    order = make()
    for step in steps:
        assert order(step).tolist() == make()(step).tolist()


def test_draws_cover_the_range_and_differ_between_steps_and_seeds():
    order = Draws(5, 1000, 0)
    assert sorted(order(0).unique().tolist()) == [0, 1, 2, 3, 4]
    assert not torch.equal(order(0), order(1))
    assert not torch.equal(order(0), Draws(5, 1000, 1)(0))


@given(size=st.integers(1, 40), batch=st.integers(1, 50))
def test_chunks_go_once_through_in_order(size: int, batch: int):
    order = Chunks(size, batch)
    parts = [order(step) for step in range(len(order))]
    assert torch.cat(parts).tolist() == list(range(size))
    assert all(len(part) == batch for part in parts[:-1])
    assert 1 <= len(parts[-1]) <= batch


def test_shards_divide_every_batch():
    order = Epochs(30, 12, 0)
    shards = [Shard(order, rank, 3)(5) for rank in range(3)]
    assert [len(shard) for shard in shards] == [4, 4, 4]
    assert sorted(torch.cat(shards).tolist()) == sorted(order(5).tolist())
