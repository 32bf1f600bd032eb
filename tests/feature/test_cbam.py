"""CBAM against its equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zoo
from zoo.errors import ZooError
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [{}, {"rd_ratio": 0.5, "kernel_size": 3}]


@pytest.mark.parametrize("options", [{}, {"rd_ratio": 0.5, "kernel_size": 3}])
def test_equals_the_equations(options):
    module = zoo.create("cbam", 16, dtype=torch.float64, **options).eval()
    x = draw(2, 16, 5, 6)
    channel, spatial = module.inner.channel, module.inner.spatial.conv

    def mlp(z):
        w1, w2 = channel.fc1.weight[..., 0, 0], channel.fc2.weight[..., 0, 0]
        return (z @ w1.T).relu() @ w2.T

    gate = (mlp(x.mean((2, 3))) + mlp(x.amax((2, 3)))).sigmoid()
    y = gate[..., None, None] * x
    pooled = torch.stack([y.mean(1), y.amax(1)], 1)
    weight = spatial.conv.weight
    scores = F.conv2d(pooled, weight, padding=weight.shape[-1] // 2)
    bn = spatial.bn
    scores = (scores - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
    assert_close(module(x), scores.sigmoid() * y, "output")


def test_options_out_of_range_are_named():
    with pytest.raises(ZooError, match="kernel_size=4 must be an odd number"):
        zoo.create("cbam", 8, kernel_size=4)
    with pytest.raises(ZooError, match="rd_ratio=2"):
        zoo.create("cbam", 8, rd_ratio=2)
