"""The small EfficientNet: every mechanism on feature maps."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from timm_models import Shrink, registered
from torch import nn
from torch.testing import assert_close

import zoo
from zoo import models
from zoo.errors import ZooError
from zoo.models.vision.efficientnet import efficientnet
from zoo.timm import feature, swap

TINY: dict[str, Any] = {"image_shape": (1, 8, 8), "num_classes": 10, "stages": 3}
FEATURES = [None, "gc", "coord", *zoo.list(kind="feature")]


def gates(model: nn.Module) -> list[nn.Module]:
    return [m.se for m in model.modules() if hasattr(m, "se")]


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_mechanism_trains(name: str | None) -> None:
    model = efficientnet(name, **TINY)
    x, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    assert_close(model(x[2:3]), model(x)[2:3], atol=1e-5, rtol=1e-5)
    plain = [isinstance(gate, nn.Identity) for gate in gates(model)]
    assert plain == [name is None] * 3


def test_it_is_efficientnet_b0_with_other_gates() -> None:
    model = efficientnet(
        SqueezeExcite, image_shape=(3, 64, 64), num_classes=1000, width=1, depth=1, stem="large"
    )
    known = timm.create_model("efficientnet_b0")
    model.load_state_dict(known.state_dict())
    x = torch.randn(1, 3, 64, 64)
    model.eval(), known.eval()
    assert_close(model(x), known(x), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in known.parameters()) == 5_288_548


@pytest.mark.parametrize(("stem", "side"), [("small", 8), ("large", 2)])
def test_stems(stem: str, side: int) -> None:
    sizes = {**TINY, "image_shape": (2, 64, 64), "stages": 7}
    model = efficientnet(None, **sizes, stem=stem)
    assert model.forward_features(torch.randn(1, 2, 64, 64)).shape[2:] == (side, side)


def test_the_ratio_goes_to_those_that_have_one_and_a_given_one_stays() -> None:
    sizes = {**TINY, "width": 1.0, "depth": 1.0, "stages": 2}
    assert [g.inner.fc1.out_channels for g in gates(efficientnet("se", **sizes))] == [8, 8, 8]
    model = efficientnet("se", **sizes, ratio=0.5)  # of 16 or 24 channels into the block
    assert [g.inner.fc1.out_channels for g in gates(model)] == [16, 8, 16]
    model = efficientnet("se(rd_ratio=1.0)", **sizes)
    assert [g.inner.fc1.out_channels for g in gates(model)] == [32, 96, 144]
    with pytest.raises(TypeError, match="no option rd_ratio"):
        feature("eca")(8, rd_ratio=0.5)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_lite0", "mnasnet_small"])
@pytest.mark.parametrize("spec", ["se", "eca", "cbam", "coord"])
def test_se_layer_of_timms_own_factories(name: str, spec: str) -> None:
    model = timm.create_model(name, num_classes=3, se_layer=feature(spec))
    expected = type(feature(spec)(8))
    found = [type(gate) for gate in gates(model) if not isinstance(gate, nn.Identity)]
    assert set(found) == (set() if "lite" in name else {expected})
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_mobilenet_takes_it_by_its_class() -> None:
    stages = decode_arch_def([["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r1_k3_s2_e4_c24"]])
    model = MobileNetV3(stages, num_classes=3, num_features=32, se_layer=feature("cbam"))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert gates(model)[0].inner.channel.fc1.out_channels == 4


def test_activations_are_told_to_modules_that_take_one() -> None:
    model = efficientnet("ese", **TINY, activation="relu6")
    assert isinstance(model.blocks[0][0].bn1.act, nn.ReLU6)
    act = feature("coord")(16, act_layer="relu6").act
    assert isinstance(act, nn.ReLU6)


def test_small_maps_and_gates_put_in_later() -> None:
    with registered("test_shrink", "feature", Shrink):
        message = r"blocks\.2\.0\.se: maps of 2 x 2 with .+ do not suit Shrink"
        with pytest.raises(ZooError, match=message):
            efficientnet("test_shrink(side=4)", **{**TINY, "stages": 4, "image_shape": (1, 4, 4)})
    model = efficientnet(None, **TINY)
    assert len(swap(model, "eca")) == 3


def test_by_name() -> None:
    model = models.create("efficientnet", attention="eca", **TINY)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "stages": ({"stages": 8}, "stages=8 must be a whole number from 1 to 7"),
    "no stage": ({"stages": 0}, "stages=0"),
    "width": ({"width": 0}, r"width=0 must be a number in \(0, 10\]"),
    "depth": ({"depth": -1}, "depth=-1"),
    "ratio": ({"ratio": 2}, r"ratio=2 must be a number in \(0, 1\]"),
    "stem": ({"stem": "tiny"}, "unknown stem 'tiny'"),
    "activation": ({"activation": "rleu"}, "unknown activation 'rleu'; did you mean 'relu"),
    "rate": ({"dropout": 1.0}, "dropout=1.0"),
    "shape": ({"image_shape": (1, 8)}, "image_shape"),
    "token mixer": ({"attention": "mha"}, r"'mha' is of kind 'project'.+zoo\.timm\.bind"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_of_efficientnet(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ZooError, match=message):
        efficientnet(**{**TINY, **options})
