"""Regression: its loss and figures against a plain computation, and what is not asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.models.language.decoder_lm import DecoderLM
from zoo.tasks import Optim, Regression


class Fixed(nn.Module):
    """Gives the numbers it was told to give, batch after batch."""

    def __init__(self, *outputs):
        super().__init__()
        self.queue = list(outputs)

    def forward(self, x):
        return self.queue.pop(0)


def regression(model):
    return Regression(model, Optim(lr=1.0), max_steps=10, test_names=["test", "long"])


def test_figures_are_taken_over_all_numbers_asked_for():
    outputs = [torch.randn(2, 3, 2), torch.randn(1, 3, 2)]
    targets = [torch.randn(2, 3, 2), torch.randn(1, 3, 2)]
    targets[0][0, :2] = torch.nan
    targets[1][0, 1] = torch.nan
    task = regression(Fixed(*outputs))
    for output, target in zip(outputs, targets, strict=True):
        task.test_step({"tokens": output, "targets": target}, 0, 1)
    found = {name: float(value) for name, value in task.split(2).compute().items()}

    wanted, given = (
        torch.cat([t.flatten() for t in targets]),
        torch.cat([o.flatten() for o in outputs]),
    )
    asked = ~wanted.isnan()
    assert asked.sum() == 12
    residual = (wanted - given)[asked].square()
    spread = (wanted[asked] - wanted[asked].mean()).square()
    assert found["mse"] == found["loss"] == pytest.approx(float(residual.mean()), rel=1e-5)
    assert found["r2"] == pytest.approx(1 - float(residual.sum() / spread.sum()), rel=1e-4)


def test_the_loss_by_hand_and_its_gradient_where_nothing_is_asked():
    output = torch.tensor([[[1.0, 2.0], [5.0, 5.0]]], requires_grad=True)
    target = torch.tensor([[[0.0, 4.0], [torch.nan, 1.0]]])
    batch = {"tokens": output, "targets": target}
    task = regression(Fixed(output))
    loss = task.loss(task.logits(batch), batch)
    assert loss.item() == (1 + 4) / 2
    loss.backward()
    assert output.grad.tolist() == [[[1.0, -2.0], [0.0, 0.0]]]


def test_a_perfect_and_a_constant_prediction():
    target = torch.tensor([[[1.0], [2.0], [6.0]]])
    for output, r2 in ((target, 1.0), (torch.full_like(target, 3.0), 0.0)):
        task = regression(Fixed(output))
        task.validation_step({"tokens": output, "targets": target}, 0)
        assert float(task.split(0).compute()["r2"]) == pytest.approx(r2, abs=1e-6)


def test_the_decoder_gives_as_many_numbers_as_it_is_told():
    model = DecoderLM(10, dim=16, depth=1, num_outputs=3, max_len=8)
    assert model.head.weight is not model.embedding.weight
    tokens = torch.randint(10, (2, 5))
    batch = {"tokens": tokens, "targets": torch.randn(2, 5, 3)}
    task = regression(model)
    assert task.logits(batch).shape == (2, 5, 3)
    task.loss(task.logits(batch), batch).backward()
    assert model.head.weight.grad.abs().sum() > 0
