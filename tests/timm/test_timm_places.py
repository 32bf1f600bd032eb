"""Modules on feature maps put into timm's convolutional networks: zoo.swap."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import res2net, resnet, senet, sknet
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm_models import Gate, Neutral, Shrink, a_resnet, a_swin, a_vit, registered, rough
from torch import nn
from torch.testing import assert_close

import zoo
from zoo.errors import ZooError
from zoo.timm import check_maps
from zoo.timm.places import places

TINY: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "num_classes": 5}
SENET: dict[str, Any] = {"layers": (1, 1, 1, 1), "reduction": 4, "num_classes": 5}
# Network, number of blocks, and how many of them have a gate at first.
NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet": (lambda: a_resnet(None), 4, 0),
    "resnext": (lambda: timm.create_model("resnext50_32x4d", **TINY), 4, 0),
    "seresnet": (lambda: timm.create_model("seresnet18", **TINY), 4, 4),
    "res2net": (lambda: timm.create_model("res2net50_26w_4s", **TINY), 4, 0),
    "sknet": (lambda: timm.create_model("skresnet18", **TINY), 4, 0),
    "senet": (
        lambda: senet.SENet(senet.SEResNetBlock, groups=1, inplanes=64, **SENET),
        4,
        4,
    ),
    "seresnet of senet": (
        lambda: senet.SENet(senet.SEResNetBottleneck, groups=1, **SENET),
        4,
        4,
    ),
    "regnet": (lambda: timm.create_model("regnetx_002", num_classes=5), 13, 0),
    "efficientnet": (lambda: timm.create_model("efficientnet_b0", num_classes=5), 16, 16),
    "efficientnet lite": (lambda: timm.create_model("efficientnet_lite0", num_classes=5), 16, 0),
    "edge": (lambda: timm.create_model("efficientnet_es", num_classes=5), 18, 0),
    "mobilenet v2": (lambda: timm.create_model("mobilenetv2_050", num_classes=5), 17, 0),
    "mobilenet v3": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=5), 11, 9),
    "mobilenet v4": (lambda: timm.create_model("mobilenetv4_conv_small_050", num_classes=5), 12, 0),
}


@pytest.mark.parametrize("case", list(NETS))
def test_gates_are_replaced_or_put_into_every_block(case: str) -> None:
    make, blocks, gated = NETS[case]
    model = make().eval()
    for norm in model.modules():  # timm starts some branches at zero, where no gate would show
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.ones_(norm.weight)
    assert len(places(model)) == blocks
    assert len([p for p in places(model) if p.module is not None]) == gated
    old = {k: v for k, v in model.state_dict().items() if ".se" not in k}
    x = torch.randn(2, 3, 32, 32)
    report = zoo.swap(model, "identity")  # the network without gates
    assert len(report) == (gated or blocks)
    plain = model(x)
    with registered("test_neutral", "feature", Neutral):
        report = zoo.swap(model, "test_neutral")
        hosted = [p for p in places(model) if isinstance(p.module, Neutral)]
        assert [p.name for p in hosted] == [layer.name for layer in report]
        assert len(hosted) == (gated or blocks)
        # Neutral at the start, and nothing else has changed.
        assert_close(model(x), plain, atol=0, rtol=0)
        kept = {k: v for k, v in model.state_dict().items() if ".se" not in k}
        assert kept.keys() == old.keys()
        assert all(torch.equal(kept[key], old[key]) for key in old)
        assert report[0].fresh == ("gamma", "conv.weight", "conv.bias")
        for place in hosted:
            assert place.module.conv.in_channels == place.channels
            assert not place.module.training
        # In the path: the module sees maps, and gets gradients.
        with torch.no_grad():
            for place in hosted:
                place.module.gamma.fill_(0.5)
        assert (model(x) - plain).abs().max() > 1e-6
        model.train()(x).square().sum().backward()
        assert all(place.module.conv.weight.grad is not None for place in hosted)


@pytest.mark.parametrize("name", [*zoo.list(kind="feature"), "coord", "gc"])
@pytest.mark.parametrize("case", ["resnet", "res2net", "efficientnet"])
def test_every_feature_mechanism_goes_in_and_trains(name: str, case: str) -> None:
    model = NETS[case][0]().double()
    report = zoo.swap(model, name)
    assert {layer.spec for layer in report} == {name}
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).sum().backward()
    for layer in report:
        module = model.get_submodule(layer.name)
        assert all(p.grad is not None for p in module.parameters())
        assert {*layer.fresh, *layer.copied} == {n for n, _ in module.named_parameters()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())


def test_a_gate_of_the_same_kind_keeps_its_weights() -> None:
    model = rough(NETS["seresnet"][0]())
    x = torch.randn(2, 3, 32, 32)
    wanted = model(x)
    report = zoo.swap(model, "se")
    assert report[0].copied == tuple(f"inner.fc{i}.{k}" for i in (1, 2) for k in ("weight", "bias"))
    assert_close(model(x), wanted, atol=0, rtol=0)
    report = zoo.swap(model, "se", copy=False)
    assert report[0].copied == ()
    report = zoo.swap(model, "se", rd_ratio=1.0)  # other sizes
    assert report[0].copied == ()
    model = NETS["efficientnet"][0]()  # whose gates have another activation
    assert zoo.swap(model, "se")[0].copied == ()


def test_layouts_lists_classes_and_options() -> None:
    model = a_resnet(None)
    report = zoo.swap(model, "cbam(kernel_size=3)", layers={"first": "identity"})
    assert [layer.spec for layer in report] == ["identity", *["cbam(kernel_size=3)"] * 3]
    report = zoo.swap(model, ["se", "eca", Gate, "gc"])
    assert [layer.spec for layer in report] == ["se", "eca", "Gate", "gc"]
    assert zoo.swap(model, Gate, slope=2.0)[3].spec == "Gate"
    assert model.layer4[0].se.slope == 2.0
    with pytest.raises(ZooError, match="one entry for each of the 4 places"):
        zoo.swap(model, ["se"])
    with pytest.raises(ZooError, match=r"layers=.+ goes with one name"):
        zoo.swap(model, ["se"] * 4, layers={"first": "eca"})


def bad(model: nn.Module, spec: Any, **options: Any) -> Callable[[], Any]:
    return lambda: zoo.swap(model, spec, **options)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no network": (
        bad(nn.Linear(2, 2), "se"),
        "'se' is of kind 'feature', but Linear has no place",
    ),
    "no host": (bad(nn.Linear(2, 2), "mha"), "Linear has no blocks with attention that 'mha'"),
    "vit": (bad(a_vit(), "se"), "'se' .+ VisionTransformer has no place .+ ResNet, ResNeXt"),
    "swin": (bad(a_swin(), "eca"), "'eca' .+ SwinTransformer has no place"),
    "token mixer": (bad(a_resnet(None), "moh"), "ResNet has no blocks with attention that 'moh'"),
    "mobilenet": (
        bad(timm.create_model("mobilenetv2_035"), "mha"),
        "EfficientNet has no blocks with attention that 'mha' could replace",
    ),
    "convnext": (
        bad(timm.create_model("test_convnext"), "se"),
        "ConvNeXt has no place for a module on feature maps",
    ),
    "swin v2": (
        bad(SwinTransformerV2(img_size=16, patch_size=2, depths=(1,), num_heads=(3,)), "mha"),
        r"attention of block 0 is WindowAttention of timm\.models\.swin_transformer_v2, which",
    ),
    "one layer for all": (
        bad(
            timm.create_model(
                "vit_tiny_patch16_224",
                depth=1,
                block_fn=timm.models.vision_transformer.ParallelScalingBlock,
            ),
            "mha",
        ),
        "attention of block 0 is part of its ParallelScalingBlock",
    ),
    "unknown": (bad(a_resnet(None), "mah"), "unknown mechanism 'mah'"),
    "option": (bad(a_resnet(None), "se", ratio=2), "unknown option of 'se' 'ratio'"),
    "instance": (bad(a_resnet(None), Gate(4)), "swap takes a name, not Gate"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_names_the_model_and_what_is_accepted(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ZooError, match=message):
        call()


def test_nothing_changes_when_a_later_place_fails() -> None:
    class Narrow(Gate):
        """A gate for up to 16 channels."""

        def __init__(self, channels: int) -> None:
            if channels > 16:
                raise ZooError(f"channels={channels} must be at most 16")
            super().__init__(channels)

    model = a_resnet(None)
    with pytest.raises(ZooError, match="channels=32 must be at most 16"):
        zoo.swap(model, Narrow)
    assert [place.module for place in places(model)] == [None] * 4


def test_parallel_layers_of_a_vit_are_found() -> None:
    block = timm.models.vision_transformer.ParallelThingsBlock
    model = rough(a_vit(block_fn=block))
    x = torch.randn(2, 3, 16, 16)
    wanted = model(x)
    report = zoo.swap(model, "mha")
    assert [layer.name for layer in report][:2] == [
        "blocks.0.attns.0.attn",
        "blocks.0.attns.1.attn",
    ]
    assert len(report) == 4
    assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)


def test_a_vit_on_a_resnet_takes_either_kind() -> None:
    sizes = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = rough(timm.create_model("vit_small_resnet26d_224", **sizes).eval())
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x)
    assert len(zoo.swap(model, "mha+rope")) == 2
    assert model.blocks[0].attn.mixer.position.grid == (2, 2)
    zoo.swap(model, "mha")
    assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)
    assert len(zoo.swap(model, "eca")) == 8
    assert model(x).shape == (2, 5)


def test_maps_can_be_checked_before_training() -> None:
    with registered("test_shrink", "feature", Shrink):
        model = a_resnet(None).train()
        zoo.swap(model, "test_shrink(side=2)")
        check_maps(model, (3, 64, 64))
        stats = model.bn1.running_mean.clone()
        with pytest.raises(ZooError, match=r"layer4\.0\.se: maps of 1 x 1 with 64 channels"):
            check_maps(model, (3, 32, 32))
    assert model.training
    assert model.layer1[0].se.training
    assert torch.equal(model.bn1.running_mean, stats)
    assert "forward" not in vars(model.layer4[0].se)


def test_the_places_are_those_of_timms_blocks() -> None:
    """Every class that timm gives `attn_layer` or `se_layer` is known."""
    for module in (resnet, res2net, sknet):
        for cls in vars(module).values():
            own = isinstance(cls, type) and cls.__module__ == module.__name__
            if own and issubclass(cls, nn.Module) and hasattr(cls, "expansion"):
                assert any(cls is known for known in zoo.timm.places._PLACES), cls
