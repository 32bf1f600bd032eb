"""Squeeze and excitation against its equation, and against timm's module."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.errors import ZooError
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [{}, {"rd_ratio": 0.5}]


def test_equals_the_equation():
    module = zoo.create("se", 12, dtype=torch.float64)
    x = draw(2, 12, 3, 5)
    inner = module.inner
    w1, w2 = inner.fc1.weight[..., 0, 0], inner.fc2.weight[..., 0, 0]
    z = x.mean((2, 3))
    s = ((z @ w1.T + inner.fc1.bias).relu() @ w2.T + inner.fc2.bias).sigmoid()
    assert_close(module(x), s[..., None, None] * x, "output")


def test_the_bottleneck_is_a_multiple_of_eight():
    assert zoo.create("se", 64).inner.fc1.out_channels == 8
    assert zoo.create("se", 256).inner.fc1.out_channels == 16
    assert zoo.create("se(rd_ratio=0.25)", 256).inner.fc1.out_channels == 64


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5])
def test_an_impossible_ratio_is_named(ratio):
    with pytest.raises(ZooError, match=r"rd_ratio=.* must be a number in \(0, 1\]"):
        zoo.create("se", 8, rd_ratio=ratio)


def test_no_channels_are_refused():
    with pytest.raises(ZooError, match="channels=0 must be a whole number of at least 1"):
        zoo.create("se", 0)
