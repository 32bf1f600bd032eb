"""Delete and copy: the signed bag of items, which a signed head gives and a softmax head cannot."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import datasets
from zoo.datasets.synthetic.delete_and_copy import delete_and_copy
from zoo.errors import ZooError
from zoo.models.language.decoder_lm import DecoderLM
from zoo.tasks.regression import RegressionFigures


@given(
    seq_len=st.integers(2, 30),
    types=st.integers(2, 4),
    items=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_every_rule_holds(seq_len: int, types: int, items: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = delete_and_copy(4, generator, seq_len=seq_len, types=types, items=items)
    assert tokens.shape == (4, seq_len)
    assert targets.shape == (4, seq_len, items)
    assert targets[:, :-1].isnan().all()
    for row, wanted in zip(tokens.tolist(), targets[:, -1], strict=True):
        command = row[-1] - types * items
        assert 0 <= command < types
        bag = torch.zeros(items)
        for token in row[:-1]:
            assert 0 <= token < types * items
            bag[token % items] += -1 if token // items == command else 1
        torch.testing.assert_close(wanted, bag * (items / (seq_len - 1)) ** 0.5)


def test_targets_have_a_variance_of_one():
    source = torch.Generator().manual_seed(0)
    _, targets = delete_and_copy(8000, source, seq_len=16, types=2, items=8)
    last = targets[:, -1]
    torch.testing.assert_close(last.var(0), torch.ones(8), rtol=0, atol=0.08)
    torch.testing.assert_close(last.mean(0), torch.zeros(8), rtol=0, atol=0.06)


def test_a_signed_average_gives_the_target():
    data = datasets.create("delete_and_copy", test_size=50)
    data.setup()
    batch = data.source("test").take(torch.arange(50))
    content, command = batch["tokens"][:, :-1], batch["tokens"][:, -1:] - 16
    scores = torch.where(content // 8 == command, -9.0, 9.0)
    weights = scores.sign() * scores.abs().softmax(-1)
    heads = torch.einsum("bj,bjm->bm", weights, torch.eye(8)[content % 8])
    torch.testing.assert_close(heads * (8 * 15) ** 0.5, batch["targets"][:, -1])


def trained(attention, steps=200):
    """Share of the variance that a model of one layer explains after a short training."""
    torch.manual_seed(0)
    data = datasets.create("delete_and_copy", seq_len=8, batch_size=32, test_size=256)
    model = DecoderLM(
        data.vocab_size,
        num_outputs=data.num_outputs,
        dim=32,
        depth=1,
        heads=1,
        attention=attention,
        position="none",
        mlp=0,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for batch in islice(iter(data.train_dataloader()), steps):
        optimizer.zero_grad()
        asked = ~batch["targets"].isnan().any(-1)
        error = model(batch["tokens"])[asked] - batch["targets"][asked]
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
    figures = RegressionFigures()
    with torch.no_grad():
        for batch in data.test_dataloader()[0]:
            figures.update(model(batch["tokens"]), batch)
    return float(figures.compute()["r2"])


def test_one_signed_head_learns_it_and_one_softmax_head_does_not():
    assert trained("cog") > 0.98
    assert 0.2 < trained("mha") < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len=1 must be a whole number of at least 2"),
        ({"types": 1}, "types=1 must be a whole number of at least 2"),
        ({"items": 3}, "items=3 must be a whole number of at least 4"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        datasets.create("delete_and_copy", **options)
