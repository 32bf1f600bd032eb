"""Models of sets: what goes where, what each answer depends on, chance, bad sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zoo import models
from zoo.errors import ZooError
from zoo.models.objects.set_prediction import SetModel
from zoo.runs import cost
from zoo.testing.tolerances import assert_close

SPECS = ("slot", "slot(normalizer=sinkhorn)", "mesh", "mesh(init=identical)")


def prediction(**options: Any) -> Any:
    torch.manual_seed(0)
    facts = {"image_shape": (3, 8, 12), "max_objects": 2, "properties": 5}
    return models.create("set_prediction", **{**facts, "dim": 8, "width": 6, **options})


def autoencoder(**options: Any) -> Any:
    torch.manual_seed(0)
    facts = {"max_objects": 4, "properties": 3}
    return models.create("set_autoencoder", **{**facts, "dim": 8, "width": 6, **options})


@pytest.mark.parametrize("attention", SPECS)
@pytest.mark.parametrize("make", [prediction, autoencoder])
def test_all_weights_are_trained(make, attention):
    model = make(attention=attention)
    x = torch.rand(2, 3, 8, 12) if make is prediction else torch.rand(2, 4, 3)
    y = model(x)
    assert y.shape == ((2, 2, 5) if make is prediction else (2, 4, 3))
    (y * torch.randn_like(y)).sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_properties_lie_between_zero_and_one_and_come_from_one_slot_each():
    model = prediction(slots=3)
    slots = torch.randn(1, 3, 8)
    y = model.head(slots).detach()
    assert 0 < float(y.min()) < float(y.max()) < 1
    slots[:, 1] += 1
    again = model.head(slots)
    assert_close(again[:, [0, 2]], y[:, [0, 2]], "others")
    assert (again[:, 1] - y[:, 1]).abs().max() > 1e-3


def test_only_images_are_centred():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    for centred in (True, False):
        slots = nn.Identity()
        slots.forward = lambda x, generator: x  # type: ignore[method-assign]
        SetModel(Look(), slots, nn.Identity(), (2, 3), centred=centred)(torch.full((1, 2, 3), 0.25))
    assert [float(x[0, 0, 0]) for x in seen] == [-0.5, 0.25]


def test_identical_slots_give_one_answer_in_slot_attention_and_several_in_mesh():
    x = torch.randn(2, 4, 3)

    def spread(attention):
        y = autoencoder(attention=attention)(x).detach()
        return float((y - y.mean(1, keepdim=True)).abs().max())

    assert spread("slot(init=identical)") < 1e-6
    assert spread("slot(normalizer=sinkhorn,init=identical)") < 1e-6
    assert spread("mesh(init=identical)") > 1e-2


def test_points_in_another_order_are_the_same_set():
    model = autoencoder(attention="slot").eval()
    x = torch.randn(2, 5, 3)
    assert_close(model(x[:, [3, 1, 4, 0, 2]]), model(x), "set")


@pytest.mark.parametrize("attention", ["slot", "mesh(init=identical)"])
def test_chance_is_repeated_in_evaluation_and_only_there(attention):
    model = autoencoder(attention=attention)
    x = torch.randn(2, 4, 3)
    assert not torch.equal(model(x), model(x))
    model.eval()
    before = torch.get_rng_state()
    assert torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_options_reach_the_slots():
    for make in (prediction, autoencoder):
        slots = make(iterations=2, hidden=9, slots=6).slots
        assert (slots.iterations, slots.mlp[0].out_features, slots.slots) == (2, 9, 6)
    assert prediction().slots.slots == 2


def test_operations_are_counted_for_slots_that_begin_identical():
    assert cost.flops(autoencoder().eval(), torch.zeros(1, 4, 3)) > 0
    assert all(p.requires_grad for p in autoencoder().parameters())


@pytest.mark.parametrize("make", [prediction, autoencoder])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_objects": 4, "slots": 3}, r"slots=3 cannot hold the max_objects=4 .*at least 4$"),
        ({"properties": 0}, "properties=0"),
        ({"width": 0}, "width=0"),
        ({"attention": "se"}, "of kind 'feature'; allowed: 'slots'"),
        ({"attention": "slot(hidden=4)", "hidden": 4}, "'hidden' is an option of the model and"),
        ({"depth": 2}, "unknown option of model"),
    ],
)
def test_impossible_models_are_refused(make, options, message):
    with pytest.raises(ZooError, match=message):
        make(**options)


def test_inputs_of_another_shape_are_refused():
    with pytest.raises(ZooError, match=r"x of shape \(2, 4, 5\) .*allowed: \(batch, any, 3\)"):
        autoencoder()(torch.zeros(2, 4, 5))
    with pytest.raises(ZooError, match=r"allowed: \(batch, 3, 8, 12\)"):
        prediction()(torch.zeros(2, 3, 12, 8))
