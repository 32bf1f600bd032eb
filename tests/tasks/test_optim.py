"""The optimiser: schedules, groups of parameters, and values that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zoo.errors import ZooError
from zoo.models.language.decoder_lm import DecoderLM
from zoo.tasks import SCHEDULES, Optim, parameter_groups, schedule


def test_warm_up_rises_by_equal_steps_to_the_peak():
    factor = schedule("constant", 4, 10)
    assert [factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_is_at_half_in_the_middle_and_at_zero_at_the_end():
    factor = schedule("cosine", 2, 12)
    assert factor(2) == 1.0
    assert factor(7) == pytest.approx(0.5)
    assert factor(4) == pytest.approx((1 + math.cos(math.pi / 5)) / 2)
    assert factor(12) == 0.0


def test_linear_falls_in_a_line():
    factor = schedule("linear", 0, 10)
    assert [factor(step) for step in (0, 5, 9, 10)] == pytest.approx([1.0, 0.5, 0.1, 0.0])


@given(st.sampled_from(SCHEDULES), st.integers(0, 50), st.integers(1, 50), st.integers(0, 200))
def test_no_schedule_leaves_the_range_or_wastes_a_step(name, warmup, rest, step):
    total = warmup + rest
    value = schedule(name, warmup, total)(step)
    assert 0 <= value <= 1
    if step < total:
        assert value > 0


def test_warm_up_is_steps_or_a_share_of_all_steps():
    assert Optim(lr=1.0, warmup=0.1).warmup_steps(500) == 50
    assert Optim(lr=1.0, warmup=100.0).warmup_steps(500) == 100
    assert Optim(lr=1.0, warmup=1).warmup_steps(500) == 1
    assert Optim(lr=1.0, warmup=0).warmup_steps(500) == 0
    with pytest.raises(ZooError, match=r"warmup=100 steps is longer than trainer.max_steps=50"):
        Optim(lr=1.0, warmup=100).warmup_steps(50)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"lr": -1e-3}, "optim.lr"),
        ({"lr": math.nan}, "optim.lr"),
        ({"lr": math.inf}, "optim.lr"),
        ({"weight_decay": -0.1}, "optim.weight_decay"),
        ({"betas": [0.9]}, "optim.betas"),
        ({"betas": [0.9, 1.0]}, "optim.betas"),
        ({"warmup": -1.0}, "optim.warmup"),
        ({"warmup": 2.5}, "optim.warmup=2.5"),
        ({"warmup": math.nan}, "optim.warmup"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"clip": 0.0}, "optim.clip=0.0 must be a number above 0, or None"),
        ({"clip": math.inf}, "optim.clip=inf"),
    ],
)
def test_impossible_values_are_refused_by_name(values, said):
    with pytest.raises(ZooError, match=said):
        Optim(**{"lr": 1e-3, **values})


def names_in(groups, model):
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = [g for g in groups if g["weight_decay"] > 0]
    spared = [g for g in groups if g["weight_decay"] == 0]
    return (
        {names[id(p)] for g in decayed for p in g["params"]},
        {names[id(p)] for g in spared for p in g["params"]},
    )


@pytest.mark.parametrize("tie", [True, False])
def test_matrices_decay_and_vectors_and_embeddings_do_not(tie):
    model = DecoderLM(11, dim=16, depth=1, heads=2, max_len=8, conv=3, tie=tie, qk_norm=True)
    decayed, spared = names_in(parameter_groups(model, 0.1), model)
    assert decayed | spared == {name for name, _ in model.named_parameters()}
    assert not decayed & spared
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert all(shapes[name] >= 2 for name in decayed)
    assert "embedding.weight" in spared
    assert any("norm" in name for name in spared)
    assert "blocks.0.mlp.up.weight" in decayed
    assert "blocks.0.conv.conv.weight" in decayed
    assert ("head.weight" in decayed) == (not tie)


def test_what_belongs_to_a_position_or_is_listed_by_the_model_does_not_decay():
    model = DecoderLM(11, dim=16, depth=1, heads=2, max_len=8, position="learned")
    _, spared = names_in(parameter_groups(model, 0.1), model)
    assert any(name.startswith("position.") for name in spared)

    class Listing(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 3))
            self.matrix = nn.Parameter(torch.zeros(3, 3))

        def no_weight_decay(self):
            return {"table"}

    listing = Listing()
    assert names_in(parameter_groups(listing, 0.1), listing) == ({"matrix"}, {"table"})


def test_frozen_parameters_are_in_no_group():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert [id(p) for p in group["params"]] == [id(model.bias)]
