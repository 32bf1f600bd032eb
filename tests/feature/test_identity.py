"""The plain trunk as a feature module."""

from __future__ import annotations

import torch

import zoo
from zoo.testing.subject import draw


def test_it_gives_back_its_input():
    module = zoo.create("identity", 3)
    x = draw(2, 3, 4, 5)
    assert module(x) is x
    assert not list(module.parameters())


def test_a_resnet_with_it_is_the_plain_one():
    from zoo.models import create

    options = {"image_shape": (1, 8, 8), "num_classes": 3, "variant": "resnet10t", "width": 4}
    torch.manual_seed(0)
    plain = create("resnet", attention=None, **options).eval()
    torch.manual_seed(0)
    hosted = create("resnet", attention="identity", **options).eval()
    x = draw(2, 1, 8, 8).float()
    assert torch.equal(plain(x), hosted(x))
    assert sum(1 for m in hosted.modules() if type(m).__name__ == "Identity") >= 4
