"""What all generated tasks share: examples by index, disjoint streams, sizes, fingerprints."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets import IGNORE
from zoo.datasets.registry import _find
from zoo.datasets.synthetic.sequences import BLOCK, SyntheticData, distinct
from zoo.errors import ZooError


def test_every_generated_task_is_tested_here(tasks):
    names = [name for name in datasets.list() if issubclass(_find(name), SyntheticData)]
    assert tasks == names


def test_batches_have_the_promised_form(task, small, first):
    data = small(task, batch_size=6)
    (batch,) = first(data, 1)
    assert batch.keys() == {"tokens", "targets"}
    assert batch["tokens"].shape == (6, data.seq_len)
    assert batch["tokens"].dtype == torch.int64
    assert 0 <= batch["tokens"].min() <= batch["tokens"].max() < data.vocab_size
    if data.task == "regression":
        assert batch["targets"].shape == (6, data.seq_len, data.num_outputs)
        assert batch["targets"].dtype == torch.float32
        assert (~batch["targets"].isnan()).all(dim=2).any(dim=1).all()
        return
    assert batch["targets"].shape == (6, data.seq_len)
    assert batch["targets"].dtype == torch.int64
    targets = batch["targets"][batch["targets"] != IGNORE]
    assert 0 <= targets.min() <= targets.max() < data.vocab_size
    assert (batch["targets"] != IGNORE).any(dim=1).all()


@pytest.mark.parametrize("sizes", [(1, 300), (7, 43), (BLOCK, 2), (BLOCK + 1, 2), (600, 1)])
def test_examples_do_not_depend_on_the_batch_size(task, small, first, sizes):
    size, steps = sizes
    batches = first(small(task, batch_size=size), steps)
    tokens = torch.cat([batch["tokens"] for batch in batches])
    data = small(task)
    expected = data.stream("train").take(torch.arange(len(tokens)))["tokens"]
    assert torch.equal(tokens, expected)


def test_examples_by_index_in_any_order(small):
    stream = small("mqar").stream("train")
    indices = torch.tensor([700, 3, 3, 300, 0])
    taken = stream.take(indices)
    for row, index in enumerate(indices.tolist()):
        alone = small("mqar").stream("train").take(torch.tensor([index]))
        assert torch.equal(taken["tokens"][row], alone["tokens"][0])
        assert torch.equal(taken["targets"][row], alone["targets"][0])


def test_splits_have_their_sizes_and_lengths(task, small, whole):
    data = small(task)
    assert whole(data.val_dataloader())["tokens"].shape == (50, data.seq_len)
    lengths = []
    for loader in data.test_dataloader():
        tokens = whole(loader)["tokens"]
        assert len(tokens) == 40
        lengths.append(tokens.shape[1])
    assert lengths[0] == data.seq_len
    assert data.max_seq_len == max(lengths)


def test_batches_of_longer_sequences_hold_fewer_of_them(small):
    data = small("needle", eval_batch_size=16, test_lengths=[40, 400])
    rows = {name: len(next(iter(data.eval_dataloader(name)))["tokens"]) for name in data.test_names}
    assert rows == {"test": 16, "40": 8, "400": 1, "40_depth50": 8, "400_depth50": 1}
    assert len(next(iter(data.val_dataloader()))["tokens"]) == 16
    assert small("induction", test_lengths=[4]).eval_rows("len4") == 256


def test_streams_are_disjoint_where_the_task_is_large(small, first, whole):
    options = {"vocab_size": 4096, "batch_size": 500, "val_size": 500, "test_size": 500}
    data = small("mqar", **options)
    parts = {"train": first(data, 2), "val": list(data.val_dataloader())}
    parts["test"] = list(data.test_dataloader()[0])
    parts["another seed"] = first(small("mqar", **options, seed=1), 2)
    rows = [
        tuple(row) for batches in parts.values() for b in batches for row in b["tokens"].tolist()
    ]
    assert len(rows) == 3000
    assert len(set(rows)) == len(rows)


def test_a_larger_test_set_begins_with_the_smaller(task, small, whole):
    few, more = (small(task, test_size=size) for size in (20, 35))
    left, right = (whole(data.test_dataloader()[0])["tokens"] for data in (few, more))
    assert torch.equal(left, right[:20])


def test_a_finite_training_set_is_the_beginning_of_the_stream(task, small, first):
    data = small(task, train_size=30, batch_size=10)
    endless = small(task, batch_size=30)
    (expected,) = first(endless, 1)
    batches = first(data, 6)
    rows = sorted(expected["tokens"].tolist())
    for epoch in (batches[:3], batches[3:]):
        seen = [row for batch in epoch for row in batch["tokens"].tolist()]
        assert sorted(seen) == rows
    assert batches[0]["tokens"].tolist() != batches[3]["tokens"].tolist()


def test_fingerprints_notice_every_parameter(task, small):
    def fingerprint(**options: object) -> str:
        data = small(task, **options)
        data.setup()
        return data.fingerprint

    changes = {
        "mqar": [{"pairs": 3}, {"power_a": 1.0}, {"random_non_queries": False}, {"seq_len": 34}],
        "selective_copy": [{"copies": 3}, {"sparse_blanks": 31}, {"vocab_size": 17}],
        "flip_flop": [{"p_ignore": 0.7}, {"p_sparse": 0.9}, {"p_dense": 0.2}],
        "counting": [{"variables": 3}, {"pass_weight": 9}, {"max_value": 9}],
        "induction": [{"vocab_size": 17}, {"test_lengths": [25]}],
        "needle": [{"seq_len": 21}, {"test_lengths": [41]}, {"test_depths": [0.25]}],
        "count_ones": [{"seq_len": 13}, {"max_ones": 3}, {"test_lengths": [21]}],
        "noisy_recall": [
            {"vocab_size": 20},
            {"noise": 0.5},
            {"test_noise": [0.5]},
            {"seq_len": 22},
        ],
        "parity": [{"seq_len": 17}, {"test_lengths": [25]}],
        "delete_and_copy": [{"seq_len": 11}, {"types": 3}, {"items": 5}],
    }[task]
    changes += [{}, {"val_size": 51}, {"test_size": 41}, {"train_size": 9}]
    found = [fingerprint(**change) for change in changes]
    assert len(set(found)) == len(found)
    assert fingerprint() == fingerprint(seed=5)


def test_a_new_version_gives_another_fingerprint_and_other_examples(task, small, monkeypatch):
    data = small(task)
    data.setup()
    old = data.fingerprint, data.stream("train").take(torch.arange(20))["tokens"]
    monkeypatch.setattr(type(data), "version", data.version + 1)
    new = data.fingerprint, data.stream("train").take(torch.arange(20))["tokens"]
    assert old[0] != new[0]
    assert not torch.equal(old[1], new[1])


@pytest.mark.parametrize("option", ["train_size", "val_size", "test_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "9"])
def test_impossible_sizes_are_refused(task, small, option, value):
    with pytest.raises(ZooError, match=f"^{option}={value!r} must be a whole number of at least 1"):
        small(task, **{option: value})


@given(
    rows=st.integers(1, 5),
    low=st.integers(0, 9),
    extent=st.integers(1, 20),
    data=st.data(),
)
def test_distinct_draws_differ_within_a_row(rows, low, extent, data):
    count = data.draw(st.integers(1, extent))
    drawn = distinct(rows, count, low, low + extent, torch.Generator().manual_seed(0))
    assert drawn.shape == (rows, count)
    for row in drawn.tolist():
        assert len(set(row)) == count
        assert all(low <= value < low + extent for value in row)


def test_distinct_draws_are_uniform_in_every_place():
    drawn = distinct(6000, 2, 0, 5, torch.Generator().manual_seed(0))
    for column in drawn.unbind(1):
        share = column.bincount(minlength=5) / 6000
        # Five standard errors.
        torch.testing.assert_close(share, torch.full((5,), 0.2), rtol=0, atol=0.026)


def test_the_base_class_asks_for_a_generator():
    base = SyntheticData()
    with pytest.raises(NotImplementedError):
        base.generate()


# What a fingerprint names the data by; another set of names would orphan the published records.
PARAMETERS = {
    "count_ones": "max_ones seq_len",
    "counting": "increment_weight max_statements max_value min_statements pass_weight seq_len "
    "set_weight variables",
    "delete_and_copy": "items seq_len types",
    "flip_flop": "p_ignore seq_len",
    "induction": "seq_len vocab_size",
    "mqar": "pairs power_a random_non_queries seq_len vocab_size",
    "needle": "seq_len",
    "noisy_recall": "noise seq_len vocab_size",
    "parity": "seq_len",
    "selective_copy": "copies seq_len vocab_size",
}


def test_parameters_are_the_options_that_every_split_starts_from(task, small):
    data = small(task)
    found = data.parameters()
    assert sorted(found) == PARAMETERS[task].split()
    assert found == {name: getattr(data, name) for name in found}
