"""The representation gap: what it measures, that it shrinks where theory says, and the task."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo import datasets
from zoo.errors import ZooError
from zoo.models.language.decoder_lm import DecoderLM
from zoo.tasks import CollapseProbe, Optim, representation_gap


class Mean(nn.Module):
    """Represents each position by the mean of the tokens so far, and one."""

    def hidden(self, tokens):
        so_far = tokens.cumsum(1) / torch.arange(1, tokens.shape[1] + 1)
        return torch.stack([so_far, torch.ones_like(so_far)], -1)


def test_the_gap_by_hand():
    # (0, 0, 1) has the mean 1/3, (0, 0, 1, 1) the mean 1/2; a constant sequence does not change.
    gap = representation_gap(Mean(), torch.tensor([[0, 0, 1], [1, 1, 1]]))
    expected = (1 / 2 - 1 / 3) / (1 + 1 / 9) ** 0.5
    torch.testing.assert_close(gap, torch.tensor([expected, 0.0]))


@pytest.mark.parametrize("attention", ["mha", "mha+rope", "linear"])
def test_the_gap_is_that_of_two_passes(attention):
    torch.manual_seed(0)
    model = DecoderLM(5, dim=16, heads=2, attention=attention, position="none", max_len=8).eval()
    tokens = torch.randint(5, (3, 7))
    before = model.hidden(tokens)[:, -1]
    after = model.hidden(torch.cat([tokens, tokens[:, -1:]], 1))[:, -1]
    expected = (after - before).norm(dim=-1) / before.norm(dim=-1)
    gap = representation_gap(model, tokens)
    torch.testing.assert_close(gap, expected.detach(), rtol=1e-4, atol=1e-5)
    assert not gap.requires_grad
    assert (gap > 1e-3).all()


def test_the_gap_of_averaging_shrinks_with_the_length():
    torch.manual_seed(0)
    model = DecoderLM(3, dim=16, attention="mha", position="none").eval()
    lengths = (8, 64, 512)
    rows = [torch.cat([torch.zeros(1, n - 1).long(), torch.ones(1, 1).long()], 1) for n in lengths]
    gaps = [float(representation_gap(model, row)) for row in rows]
    assert gaps[1] < gaps[0] / 4
    assert gaps[2] < gaps[1] / 4


def test_a_model_without_hidden_and_empty_sequences_are_refused():
    with pytest.raises(ZooError, match=r"Linear has no method hidden.*decoder_lm"):
        representation_gap(nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ZooError, match=r"tokens of shape \(1, 0\)"):
        representation_gap(Mean(), torch.zeros(1, 0, dtype=torch.int64))


def test_the_task_measures_the_sequence_without_its_last_token():
    torch.manual_seed(0)
    data = datasets.create(
        "count_ones", val_size=6, test_size=5, test_lengths=[40], eval_batch_size=4
    )
    model = DecoderLM(data.vocab_size, dim=16, position="none").eval()
    task = CollapseProbe(model, Optim(lr=1.0), max_steps=10, test_names=data.test_names)
    found = {}
    with torch.no_grad():
        for split, name in enumerate(["val", "test", "40"]):
            tokens = []
            for number, batch in enumerate(data.eval_dataloader(name)):
                if split == 0:
                    task.validation_step(batch, number)
                else:
                    task.test_step(batch, number, split - 1)
                tokens.append(batch["tokens"])
            found[name] = task.split(split).compute()
            rows = torch.cat(tokens)
            # The data end in a one and its repetition, so the pair is in the data themselves.
            h = model.hidden(rows)
            expected = ((h[:, -1] - h[:, -2]).norm(dim=-1) / h[:, -2].norm(dim=-1)).mean()
            torch.testing.assert_close(found[name]["representation_gap"], expected)
    assert set(found["val"]) == set(CollapseProbe.names)
    assert found["40"]["representation_gap"] != found["test"]["representation_gap"]
