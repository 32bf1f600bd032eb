"""The losses of RASM, by hand and against the layers of VGG-19 written out."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from torch import nn

import zoo
from zoo.tasks._restoration_losses import (
    MEAN,
    STD,
    Perceptual,
    charbonnier,
    shadow_loss,
    vgg19_features,
)


def test_charbonnier_by_hand():
    pred, target = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
    pred[0, 0, 0, 0], target[0, 2, 0, 1] = 0.3, 0.4
    sizes = [math.sqrt(0.09 + 1e-6), math.sqrt(0.16 + 1e-6), *[1e-3] * 4]
    assert charbonnier(pred, target).item() == pytest.approx(sum(sizes) / 6)
    assert charbonnier(pred, pred).item() == pytest.approx(1e-3)
    assert charbonnier(pred, target, epsilon=0.0).item() == pytest.approx(0.7 / 6)
    mask = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    inside = (math.sqrt(0.09 + 1e-6) + 2e-3) / 3
    assert charbonnier(pred, target, mask).item() == pytest.approx(inside)
    assert charbonnier(pred, target, mask > 0).item() == pytest.approx(inside)
    assert charbonnier(pred, target, mask * 0).item() == 0.0


def test_its_gradient_at_equal_images_is_zero_and_not_nan():
    x = torch.rand(1, 3, 4, 4).requires_grad_()
    charbonnier(x, x.detach()).backward()
    assert not x.grad.any()


def test_perceptual_by_hand():
    """Two layers that double and shift: distances of the normalised images, weighted."""
    double, shift = nn.Conv2d(3, 3, 1, groups=3, bias=False), nn.Conv2d(3, 3, 1, groups=3)
    with torch.no_grad():
        double.weight.fill_(2.0)
        shift.weight.fill_(1.0)
        shift.bias.fill_(5.0)
    features = nn.Sequential(double, shift, nn.ReLU(inplace=True))
    pred, target = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    pred[:, 1] = 0.112  # half a deviation of green
    loss = Perceptual(features, (1, 2), (0.1, 1.0))(pred, target)
    assert loss.item() == pytest.approx((0.1 + 1.0) * 2 * 0.5 / 3)
    # Behind the ReLU only what is above -5 counts: (x - mean) / std doubled is never below.
    loss = Perceptual(features, (1, 3), (0.1, 1.0))(pred, target)
    assert loss.item() == pytest.approx((0.1 + 1.0) * 2 * 0.5 / 3)


def test_the_layers_of_vgg_are_the_first_relus_of_its_stages():
    torch.manual_seed(0)
    features = vgg19_features(pretrained=False)
    chosen = [features[n - 1] for n in (2, 7, 12, 21, 30)]
    assert all(isinstance(module, nn.ReLU) for module in chosen)
    pools = [i for i, module in enumerate(features) if isinstance(module, nn.MaxPool2d)]
    assert [n - 3 for n in (7, 12, 21, 30)] == [p + 0 for p in pools[:4]]
    pred, target = torch.rand(2, 1, 3, 32, 32).unbind(0)
    outs = []
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    with torch.no_grad():
        for x in (pred, target):
            y, kept = (x - mean) / std, []
            for n, module in enumerate(features, 1):
                y = module(y)
                if n in (2, 7, 12, 21, 30):
                    kept.append(y.clone())
            outs.append(kept)
    weights = (0.1, 0.1, 1.0, 1.0, 1.0)
    due = sum(w * (a - b).abs().mean() for w, a, b in zip(weights, *outs, strict=True))
    perceptual = Perceptual(features)
    assert perceptual(pred, target).item() == pytest.approx(due.item(), rel=1e-4)
    assert perceptual(pred, pred).item() == 0.0


def tiny_perceptual():
    torch.manual_seed(0)
    return Perceptual(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), (1, 2), (1.0, 1.0))


def test_the_network_stays_as_it_is_and_hands_gradients_on():
    perceptual = nn.ModuleList([tiny_perceptual()]).train()[0]
    assert not any(module.training for module in perceptual.modules())
    assert not any(p.requires_grad for p in perceptual.parameters())
    pred, target = torch.rand(2, 1, 3, 5, 5).requires_grad_().unbind(0)
    dpred, dtarget = torch.autograd.grad(
        perceptual(pred, target), (pred, target), allow_unused=True
    )
    assert dpred.any()
    assert dtarget is None


def test_the_whole_loss():
    perceptual = tiny_perceptual()
    pred, target = torch.rand(2, 2, 3, 6, 6).unbind(0)
    pred = pred * 3 - 1
    inside = pred.clamp(0, 1)
    due = charbonnier(inside, target) + 0.001 * perceptual(inside, target)
    assert shadow_loss(pred, target, perceptual).item() == pytest.approx(due.item())
    assert shadow_loss(pred, target).item() == pytest.approx(charbonnier(inside, target).item())
    due = charbonnier(inside, target) + 2 * perceptual(inside, target)
    assert shadow_loss(pred, target, perceptual, weight=2).item() == pytest.approx(due.item())


def test_bad_input():
    x = torch.rand(1, 3, 4, 4)
    for bad in (x[..., 1:], x[0], x[:, :1]):
        with pytest.raises(zoo.ZooError, match="one shape"):
            charbonnier(x, bad)
    with pytest.raises(zoo.ZooError, match="mask of shape"):
        charbonnier(x, x, x)
    features = nn.Sequential(nn.ReLU(), nn.ReLU())
    for layers, weights, words in (
        ((1, 3), (1.0, 1.0), "at most 2"),
        ((2, 1), (1.0, 1.0), r"layers=\(2, 1\) must be .* rise"),
        ((), (), r"layers=\(\) must be .* rise"),
        ((1, 2), (1.0,), "2 numbers"),
    ):
        with pytest.raises(zoo.ZooError, match=words):
            Perceptual(features, layers, weights)


def test_weights_that_cannot_be_had():
    with (
        patch("timm.create_model", side_effect=OSError("no network")),
        pytest.raises(zoo.ZooError, match=r"neither in the hub's cache.*OSError"),
    ):
        vgg19_features()
