"""Feature-map mechanisms in timm's ResNets: zoo.timm.feature."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm_models import (
    Deep,
    Gate,
    a_resnet,
    registered,
)

import zoo
from zoo.errors import ZooError
from zoo.timm import TIMM_FEATURES, bind, feature


def test_a_feature_mechanism_stands_at_the_end_of_each_residual_branch() -> None:
    with registered("test_gate", "feature", Gate):
        Gate.made.clear()
        model = a_resnet(feature("test_gate(slope=2.0)"))
        assert Gate.made == [8, 16, 32, 64]
        assert model.layer3[0].se.slope == 2.0
        assert feature("test_gate", slope=3.0)(4).slope == 3.0
        model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
        gradients = [p.grad for p in model.layer4[0].se.parameters()]
        assert all(g is not None and g.abs().sum() > 0 for g in gradients)
        deep = timm.create_model("resnet50", block_args={"attn_layer": feature("test_gate")})
        assert deep.layer1[0].se.conv.in_channels == 256
        with pytest.raises(ZooError, match="'test_gate' is of kind 'feature', but a ViT needs"):
            bind("test_gate")
        with pytest.raises(ZooError, match=r"unknown option of 'test_gate' 'slop'.*'slope'"):
            feature("test_gate", slop=1.0)
        with pytest.raises(ZooError, match="'slope' is given twice"):
            feature("test_gate(slope=2.0)", slope=1.0)


def test_classes_with_and_without_device_arguments() -> None:
    assert feature(Gate)(4, dtype=torch.float64).conv.weight.dtype == torch.float64
    assert feature("se")(16, dtype=torch.float64).inner.fc1.weight.dtype == torch.float64
    assert feature("cbam")(16, device="meta").inner.channel.fc1.weight.device.type == "meta"
    pickle.loads(pickle.dumps(a_resnet(feature(Gate))))


@pytest.mark.parametrize("name", TIMM_FEATURES)
def test_timms_own_modules_by_name(name: str) -> None:
    module = feature(name)(32)
    x = torch.randn(2, 32, 6, 6)
    assert module(x).shape == x.shape
    assert not torch.equal(module(x), x)


def test_options_of_timms_own_modules() -> None:
    assert feature("se", rd_ratio=0.5)(32).inner.fc1.out_channels == 16
    assert feature("ceca", gamma=1)(32).conv.kernel_size == (7,)


BAD_FEATURES: dict[str, tuple[Callable[[], Any], str]] = {
    "token mixer": (
        lambda: feature("mha"),
        r"'mha' is of kind 'project'.*ResNet.*cbam.*zoo\.timm\.bind",
    ),
    "specification": (lambda: feature("mha+rope"), "but a ResNet needs"),
    "whole mixer": (lambda: feature("gru"), "'gru' is of kind 'mixer'"),
    "bound class": (lambda: feature(bind("mha")), "is of kind 'mixer'"),
    "host": (lambda: feature(zoo.Attention), "is of kind 'mixer'"),
    "part": (lambda: feature(Deep), "is of kind 'normalize'"),
    "unknown": (lambda: feature("cbma"), "unknown feature mechanism 'cbma'.*'cbam'"),
    "instance": (lambda: feature(Gate(4)), "feature takes a name"),
    "partial": (lambda: feature(functools.partial(Gate, slope=2.0)), "options beside it"),
    "option": (
        lambda: feature("se", rd_ration=0.5),
        "unknown option of 'se' 'rd_ration'.*rd_ratio",
    ),
    "swallowed option": (lambda: feature("ese", rd_ratio=0.5), "unknown option of 'ese'"),
    "option of timm": (lambda: feature("se", device="cpu"), "unknown option of 'se' 'device'"),
}


@pytest.mark.parametrize("case", list(BAD_FEATURES))
def test_bad_input_of_feature_is_refused_with_the_way_out(case: str) -> None:
    call, message = BAD_FEATURES[case]
    with pytest.raises(ZooError, match=message):
        call()
