"""Losses and precision of predicted sets, against all permutations and a plain loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.metrics.sets import (
    SetError,
    SetPrecision,
    fill,
    matching,
    set_errors,
)


@given(
    slots=st.integers(1, 4),
    wanted=st.integers(1, 4),
    cost=st.sampled_from(["huber", "mse"]),
    seed=st.integers(0, 2**32),
)
def test_the_match_is_the_best_of_all(slots, wanted, cost, seed):
    wanted = min(slots, wanted)
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(3, slots, 5, generator=generator)
    y = 2 * torch.randn(3, wanted, 5, generator=generator)
    loss = {"huber": F.smooth_l1_loss, "mse": F.mse_loss}[cost]
    for row, found in enumerate(set_errors(x, y, cost).sum(1)):
        choices = itertools.permutations(range(slots), wanted)
        best = min(float(loss(x[row, list(p)], y[row])) for p in choices)
        assert float(found) == pytest.approx(best * wanted, rel=1e-5)


def test_a_set_in_another_order_is_matched_and_the_gradient_is_that_of_the_pairs():
    y = torch.randn(2, 4, 3, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    x = (y[:, order] + 0.01).requires_grad_()
    assert torch.equal(matching(x, y), order.argsort().expand(2, 4))
    set_errors(x, y, "mse").sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2 * 0.01 / 3), rtol=1e-4, atol=0)


def test_the_loss_by_hand():
    x = torch.tensor([[[0.0, 0.0], [3.0, 1.0]]])
    y = torch.tensor([[[1.0, 1.0], [0.5, 0.0]]])
    # The second prediction is nearest to the first target, 2 and 0 away; the first 0.5 and 0.
    torch.testing.assert_close(set_errors(x, y, "mse"), torch.tensor([[2.0, 0.125]]))
    torch.testing.assert_close(set_errors(x, y, "huber"), torch.tensor([[0.75, 0.0625]]))


def test_set_error_averages_over_targets_of_all_batches():
    x, y = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    metric = SetError()
    metric.update(x[:2], y[:2])
    metric.update(x[2:], y[2:])
    assert float(metric.compute()) == pytest.approx(float(set_errors(x, y, "mse").mean()), rel=1e-5)
    huber = SetError("huber")
    huber.update(x, y)
    assert float(huber.compute()) < float(metric.compute())


def test_filling_up_a_set():
    y = torch.ones(2, 3, 4)
    assert fill(y, 5).shape == (2, 5, 4)
    assert torch.equal(fill(y, 5)[:, :3], y)
    assert not fill(y, 5)[:, 3:].any()
    with pytest.raises(ZooError, match="up to 3 objects, but there are only slots=2"):
        fill(y, 2)


def plain_precision(predicted, wanted, coordinates, classes, threshold):
    """Go through the predictions one by one, the surest first."""
    predicted, wanted = predicted.double().numpy(), wanted.double().numpy()
    ends = np.cumsum([coordinates, *classes])

    def kinds(vector):
        return [int(vector[a:b].argmax()) for a, b in itertools.pairwise(ends)]

    ranked = sorted(
        ((image, slot) for image in range(len(predicted)) for slot in range(predicted.shape[1])),
        key=lambda place: -predicted[place][-1],
    )
    taken, hits = set(), []
    for image, slot in ranked:
        mine = predicted[image, slot]
        options = []
        for index, other in enumerate(wanted[image]):
            if other[-1] == 1 and kinds(other) == kinds(mine):
                away = np.linalg.norm(6 * (mine[:coordinates] - other[:coordinates]))
                options.append((away, index))
        right = False
        if options:
            away, index = min(options)
            right = (away < threshold or threshold == np.inf) and (image, index) not in taken
            if right:
                taken.add((image, index))
        hits.append(right)
    area, objects = 0.0, wanted[..., -1].sum()
    for place, hit in enumerate(hits):
        if hit:
            # The best precision from here on, times one more object found.
            area += max(sum(hits[: n + 1]) / (n + 1) for n in range(place, len(hits))) / objects
    return area


@given(
    slots=st.integers(1, 6),
    objects=st.integers(1, 4),
    noise=st.sampled_from([0.02, 0.1, 0.4]),
    classes=st.sampled_from([(2, 3), (2,), ()]),
    seed=st.integers(0, 2**32),
)
def test_precision_is_that_of_a_plain_loop(slots, objects, noise, classes, seed):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    parts = [uniform(4, objects, 2)]
    parts += [F.one_hot((uniform(4, objects) * n).long(), n).float() for n in classes]
    wanted = torch.cat([*parts, torch.ones(4, objects, 1)], -1)
    wanted *= (uniform(4, objects, 1) < 0.7).float()
    wanted[0, 0, -1] = 1
    near = wanted[:, torch.randint(objects, (slots,), generator=generator)]
    predicted = near + noise * torch.randn(near.shape, generator=generator)
    metric = SetPrecision(2, classes)
    metric.update(predicted[:1], wanted[:1])
    metric.update(predicted[1:], wanted[1:])
    found = metric.compute()
    assert list(found) == ["ap_inf", "ap_1", "ap_0.5", "ap_0.25", "ap_0.125"]
    for threshold, value in zip((np.inf, 1, 0.5, 0.25, 0.125), found.values(), strict=True):
        expected = plain_precision(predicted, wanted, 2, classes, threshold)
        assert float(value) == pytest.approx(expected, abs=1e-5)


def test_precision_by_hand():
    # One coordinate, one class of two, the flag. Two objects in the image, three predictions.
    wanted = torch.tensor([[[0.5, 1, 0, 1], [0.9, 0, 1, 1], [0, 0, 0, 0]]])
    predicted = torch.tensor(
        [
            [
                [0.5, 0.9, 0.1, 0.9],  # right: the first object
                [0.6, 0.9, 0.1, 0.8],  # the first object once more: wrong
                [0.8, 0.2, 0.7, 0.1],  # the second object, 0.6 away
            ]
        ]
    )
    metric = SetPrecision(1, (2,))
    metric.update(predicted, wanted)
    found = {name: float(value) for name, value in metric.compute().items()}
    both = (1 + 2 / 3) / 2
    expected = {"ap_inf": both, "ap_1": both, "ap_0.5": 0.5, "ap_0.25": 0.5, "ap_0.125": 0.5}
    assert found == pytest.approx(expected)


def test_of_two_equally_sure_predictions_the_first_takes_the_object():
    wanted = torch.tensor([[[0.5, 1.0]]])
    metric = SetPrecision(1, ())
    metric.update(wanted.expand(1, 2, 2), wanted)
    assert metric.right[0].tolist() == [[True] * 5, [False] * 5]


def test_a_perfect_prediction_has_precision_one_in_any_order():
    wanted = torch.cat([torch.rand(3, 4, 2), torch.eye(4)[None].expand(3, 4, 4)], -1)
    wanted = torch.cat([wanted, torch.ones(3, 4, 1)], -1)
    predicted = F.pad(wanted[:, torch.randperm(4)], (0, 0, 0, 2))
    metric = SetPrecision(2, (4,))
    metric.update(predicted, wanted)
    assert all(float(value) == 1 for value in metric.compute().values())
    assert metric._reductions["scores"] is not None
    metric.reset()
    metric.update(torch.zeros_like(predicted), wanted)
    assert float(metric.compute()["ap_0.125"]) < 1


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(2, 3, 4), torch.rand(2, 4, 4), "with K at least M"),
        (torch.rand(2, 3, 4), torch.rand(2, 3, 5), "does not fit wanted"),
        (torch.rand(3, 3, 4), torch.rand(2, 3, 4), "does not fit wanted"),
        (torch.rand(3, 4), torch.rand(3, 4), "does not fit wanted"),
        (torch.full((2, 3, 4), torch.nan), torch.rand(2, 3, 4), "not finite"),
    ],
)
def test_sets_that_do_not_fit_are_refused(x, y, message):
    with pytest.raises(ZooError, match=message):
        set_errors(x, y)
    with pytest.raises(ZooError, match=message):
        SetError().update(x, y)


def test_unknown_costs_and_other_widths_are_refused():
    with pytest.raises(ZooError, match="unknown cost 'l1'; allowed: huber, mse"):
        SetError("l1")
    with pytest.raises(ZooError, match="did you mean 'huber'"):
        set_errors(torch.rand(1, 2, 3), torch.rand(1, 2, 3), "hubert")
    with pytest.raises(ZooError, match="must have vectors of 6 numbers: 2 coordinates"):
        SetPrecision(2, (3,)).update(torch.rand(1, 2, 6), torch.rand(1, 2, 7))
