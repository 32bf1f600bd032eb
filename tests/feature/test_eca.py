"""Efficient channel attention against its equation."""

from __future__ import annotations

import math

import pytest
import torch

import zoo
from zoo.errors import ZooError
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

CONTRACT_OPTIONS = [{}, {"kernel_size": 5}]


@pytest.mark.parametrize("options", [{}, {"kernel_size": 1}, {"kernel_size": 5}])
def test_equals_the_equation(options):
    module = zoo.create("eca", 12, dtype=torch.float64, **options)
    x = draw(2, 12, 3, 5)
    weight = module.inner.conv.weight.flatten()
    reach = len(weight) // 2
    z = torch.nn.functional.pad(x.mean((2, 3)), (reach, reach))
    gates = (z.unfold(1, len(weight), 1) @ weight).sigmoid()
    assert_close(module(x), gates[..., None, None] * x, "output")


@pytest.mark.parametrize("channels", [1, 3, 4, 8, 12, 16, 64, 100, 128, 256, 512, 2048])
def test_the_number_of_weights_follows_the_paper(channels):
    near = int(abs(math.log2(channels) + 1) / 2)
    due = max(near if near % 2 else near + 1, 3)
    assert sum(p.numel() for p in zoo.create("eca", channels).parameters()) == due
    formula = zoo.info("eca").parameters
    assert eval(formula, {"channels": channels, "kernel_size": None}) == due


@pytest.mark.parametrize("size", [0, 2, -3])
def test_an_even_or_empty_kernel_is_refused(size):
    with pytest.raises(ZooError, match=f"kernel_size={size} must be an odd number"):
        zoo.create("eca", 8, kernel_size=size)
