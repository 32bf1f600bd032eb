"""RASM: the released network's numbers, its layers one by one, and what may take their place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_files import read, under
from torch import Tensor, nn

import zoo
from zoo import models
from zoo.feature.regional import RegionalAttention
from zoo.models.vision._rasm_blocks import CAB, ChannelAttention, OnTokens, RASMBlock
from zoo.models.vision.rasm import RASM, from_official, rasm
from zoo.normalize.differential import initial_lambda
from zoo.ops.tiling import tiled
from zoo.tasks._restoration_losses import charbonnier
from zoo.testing.subject import draw
from zoo.testing.tolerances import assert_close

TINY: dict[str, Any] = {"width": 4, "depths": 1, "attention": "regional(kernel=3)"}


def tiny(**options: Any) -> RASM:
    torch.manual_seed(0)
    return rasm(**{**TINY, **options}).eval()


def pair(height: int = 16, width: int = 24, samples: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    image, mask = torch.rand(samples, 4, height, width).split((3, 1), 1)
    return image, (mask < 0.4).float()


def state_of(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return from_official({name: x.float() for name, x in under(tensors, start).items()})


def golden_layers(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> list[str]:
    """Layers of a file; its other cases are attention alone."""
    return [tag for tag, case in metadata["config"].items() if isinstance(case, dict)]


def compare_layer(tensors: dict[str, Tensor], metadata: dict[str, Any], tag: str) -> None:
    case = metadata["config"][tag]
    assert case["mlp"] == "leff"
    attn = None
    if "kernel_size" in case:
        attn = RegionalAttention(case["dim"], case["heads"], case["kernel_size"], case["dilation"])
    block = RASMBlock(case["dim"], attn, case["mlp_ratio"])
    state = state_of(tensors, f"param.{tag}")
    block.load_state_dict({name.removeprefix("."): x for name, x in state.items()})
    x = tensors[f"in.{tag}.x"].unflatten(1, (case["H"], case["W"])).permute(0, 3, 1, 2)
    y = block(x).permute(0, 2, 3, 1).flatten(1, 2)
    assert_close(y, tensors[f"out.{tag}.y"], "output")


def compare_network(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Layers of a level and their heads are seen from the parameters: nine entries to seven."""
    config, state = metadata["config"], state_of(tensors, "param.")
    assert config["token_mlp"] == "leff"
    layers = {tuple(name.split(".")[1:3]) for name in state if name.startswith("levels.")}
    levels = [level for level, _ in layers]
    options: dict[str, Any] = {"depths": [levels.count(str(n)) for n in range(7)]}
    options["heads"] = [len(state[f"levels.{n}.0.attn.rpb"]) for n in (2, 3, 4)]
    options["mlp_ratio"] = config["mlp_ratio"]
    attention = f"regional(kernel={config['kernel_size']}, dilation={config['dilation']})"
    net = rasm(attention, width=config["embed_dim"], **options).eval()
    net.load_state_dict(state)
    y = net(tensors["in.x"], tensors["in.mask"])
    assert_close(y, tensors["out.y"], "output")
    assert_close(y - tensors["in.x"], tensors["out.y"] - tensors["in.x"], "what is added")


@pytest.mark.parametrize("tag", golden_layers(*read("regional")))
def test_golden_layers(golden, tag):
    compare_layer(*golden("regional"), tag)


def test_golden_network(golden):
    compare_network(*golden("regional_rasm"))


def test_another_golden_file(other_golden):
    file = other_golden("regional")
    for tag in golden_layers(*file):
        compare_layer(*file, tag)
    compare_network(*other_golden("regional_rasm"))


def test_official_names_are_all_ours_and_come_once():
    net = rasm(width=2, depths=2, heads=(4, 4, 4))
    cards = {f"module.{n}": x for n, x in net.state_dict().items()}
    assert from_official(cards).keys() == net.state_dict().keys()
    assert from_official({"conv.blocks.1.attn.rpb": torch.zeros(1)}).keys() == {
        "levels.3.1.attn.rpb"
    }


def test_the_papers_sizes():
    net = models.create("rasm")
    assert sum(p.numel() for p in net.parameters()) == 5_180_489
    parts = [[block.attn for block in level] for level in net.levels]
    assert [len(level) for level in parts] == [2] * 7
    assert [n for n, level in enumerate(parts) if level[0] is not None] == [2, 3, 4]
    assert [level[0].heads for level in parts[2:5]] == [4, 16, 8]
    assert [level[0].channels for level in parts[2:5]] == [128, 256, 256]
    assert {(level[0].kernel, level[0].dilation) for level in parts[2:5]} == {(11, 2)}
    rates = [round(b.drop_path.drop_prob * 70, 4) for level in net.levels for b in level]
    assert rates == [0, 1, 2, 3, 4, 5, 7, 7, 5, 4, 3, 2, 1, 0]  # of 0.1, by sevenths
    weights = net.levels[3][0].attn.qkv
    assert abs(float(weights.weight.detach().std()) - 0.02) < 0.001
    assert not weights.bias.any()


def test_channel_attention_by_hand():
    gate = ChannelAttention(2, reduction=2)
    with torch.no_grad():
        gate.down.weight.copy_(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
        gate.up.weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
    x = torch.tensor([[1.0, 5.0], [2.0, 0.0]]).view(1, 2, 1, 2)  # means 3 and 1, so 2 inside
    y = gate(x).view(2, 2)
    sigmoid = [1 / (1 + math.exp(-z)) for z in (2, -4)]
    assert_close(y, torch.tensor([[1.0, 5.0], [2.0, 0.0]]) * torch.tensor(sigmoid)[:, None], "gate")


def test_a_cab_whose_last_convolution_is_zero_changes_nothing():
    cab = CAB(4)
    x = draw(1, 4, 5, 6, dtype=torch.float32)
    assert not torch.equal(cab(x), x)
    nn.init.zeros_(cab.conv2.weight)
    assert torch.equal(cab(x), x)


@pytest.mark.parametrize("size", [(16, 24), (9, 14), (8, 8)])
def test_without_an_output_the_image_stays(size):
    net = tiny()
    for x in net.output_proj.parameters():
        nn.init.zeros_(x)
    image, mask = pair(*size)
    assert torch.equal(net(image, mask), image)


@pytest.mark.parametrize("size", [(13, 21), (8, 15)])
def test_sides_are_filled_up_with_the_last_pixels(size):
    net = tiny()
    image, mask = pair(*size)
    rows = [min(i, size[0] - 1) for i in range(-(-size[0] // 8) * 8)]
    columns = [min(j, size[1] - 1) for j in range(-(-size[1] // 8) * 8)]
    whole = [x[:, :, rows][..., columns] for x in (image, mask)]
    y = net(image, mask)
    assert y.shape == image.shape
    assert_close(y, net(*whole)[..., : size[0], : size[1]], "cut")


def test_the_mask_is_a_fourth_channel_and_may_be_boolean():
    net = tiny()
    image, mask = pair()
    y = net(image, mask)
    assert torch.equal(net(torch.cat([image, mask], 1)), y)
    assert torch.equal(net(image, mask > 0), y)
    assert not torch.allclose(net(image, 1 - mask), y)
    nn.init.zeros_(net.input_proj.weight[:, 3:])
    assert torch.equal(net(image, 1 - mask), net(image, mask))  # it enters nowhere else


def test_a_variant_lets_the_attention_see_the_mask():
    net = tiny(attention="regional(kernel=3, key_mask_bias=-3.0)")
    image, mask = pair()
    nn.init.zeros_(net.input_proj.weight[:, 3:])
    for block in (net.levels[2][0], net.levels[3][0]):
        nn.init.normal_(block.attn.qkv.weight)
    mask = torch.zeros_like(mask)
    mask[..., :8, :8] = 1.0
    assert not torch.allclose(net(image, mask), net(image, 1 - mask))
    # A constant on all keys is none; the maps of 16 x 24 and the levels below fill up windows.
    net = tiny(attention="regional(kernel=3, dilation=1, key_mask_bias=-3.0)")
    image, mask = pair(24, 24)
    nn.init.zeros_(net.input_proj.weight[:, 3:])
    assert_close(net(image, mask * 0), net(image, mask * 0 + 1), "no shadow, all shadow")


@pytest.mark.parametrize(
    "attention",
    [None, "regional", "mha", "mha+alibi", "uniform_mean", "neighborhood(kernel=2, stride=2)"],
)
def test_what_may_take_the_place_of_regional_attention(attention):
    net = tiny(attention=attention, image_shape=(3, 16, 30))
    image, mask = pair(16, 30, samples=2)
    net.train()
    loss = charbonnier(net(image, mask), image / 2)
    loss.backward()
    for name, x in net.named_parameters():
        assert x.grad is not None, name
        assert bool(x.grad.isfinite().all()), name
    trunk = {n: x.shape for n, x in net.state_dict().items() if ".attn." not in n}
    assert trunk == {n: x.shape for n, x in tiny().state_dict().items() if ".attn." not in n}


def test_other_attention_gets_heads_and_the_grid_of_its_level():
    net = tiny(attention="neighborhood(kernel=2)", image_shape=(4, 20, 30))
    found = [net.levels[n][0].attn.mixer for n in (2, 3, 4)]
    assert [m.select.grid for m in found] == [(6, 8), (3, 4), (6, 8)]
    assert [m.heads for m in found] == [4, 16, 8]
    assert isinstance(net.levels[2][0].attn, OnTokens)
    net = tiny(attention="differential", depths=(1, 1, 2, 1, 1, 1, 1))
    lambdas = [b.attn.mixer.normalize.lambda_init for x in net.levels for b in x if b.attn]
    assert lambdas == [initial_lambda(n) for n in range(4)]
    assert tiny(attention="regional(heads=2)").levels[3][0].attn.heads == 2


def test_global_attention_is_global_and_none_keeps_to_its_means():
    image, mask = pair(16, 64)
    other = image.clone()
    other[..., 0, 0] += 0.5
    changes = {}
    for attention in (None, "mha"):
        net = tiny(attention=attention)
        for block in (b for level in net.levels for b in level):
            nn.init.zeros_(block.cab.gate.down.weight)  # no means, so that only attention is far
            if block.attn is not None:
                nn.init.normal_(block.attn.mixer.project.qkv.weight)
        change = (net(other, mask) - net(image, mask)).abs().amax(1)
        changes[attention] = change[..., -1].max().item()
    assert changes["mha"] > 0 == changes[None]


def test_autocast_computes_attention_in_float32():
    net = tiny()
    seen = []
    net.levels[3][0].attn.register_forward_hook(
        lambda module, given, y: seen.extend((given[0].dtype, y.dtype))
    )
    image, mask = pair()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(image, mask)
    assert seen == [torch.float32, torch.float32]
    assert_close(y, net(image, mask), "autocast", backend="autocast", dtype=torch.bfloat16)


def test_training_on_random_pairs():
    net = tiny(width=8, drop_path=0.0).train()
    target = torch.rand(2, 3, 16, 16)
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, 2:9, 3:12] = mask[1, :, 6:14, 1:7] = 1.0
    image = target * (1 - 0.6 * mask)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = charbonnier(net(image, mask), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_tiles_of_the_network():
    net = tiny()
    image, mask = pair(21, 30)
    whole = net(image, mask)
    assert torch.equal(tiled(net, image, mask, tile=32, overlap=8), whole)
    image, mask = pair(40, 43)
    y = tiled(net, image, mask, tile=24, overlap=8)
    with torch.no_grad():
        whole = net(image, mask) - image
    assert y.shape == image.shape
    # Means over a tile are not means over the image, so this is close and no more.
    assert float((y - image - whole).square().mean()) < 0.25 * float(whole.square().mean())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "width=0"),
        ({"depths": (1, 2)}, "2 entries"),
        ({"depths": 0}, "depths=0"),
        ({"heads": 4}, "heads=4"),
        ({"heads": (3, 16, 8)}, "heads=3 must divide channels=16"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"drop_path": 1.0}, r"drop_path=1\.0"),
        ({"attention": "regionl"}, "regional"),
        ({"attention": "regional(kernel=4)"}, "kernel=4 must be an odd number"),
        ({"attention": 3}, "attention=3"),
        ({"image_shape": (1, 16, 16)}, "image_shape"),
        ({"image_shape": (3, 4, 16)}, "image_shape: height=4 must be"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(zoo.ZooError, match=words):
        tiny(**options)


def test_bad_input():
    net = tiny()
    image, mask = pair()
    cases = [
        ((image, mask[..., 1:]), "mask of shape"),
        ((image, mask.expand(-1, 3, -1, -1)), "mask of shape"),
        ((image,), "without a mask"),
        ((image[:, :2], mask), "image of shape"),
        ((image[..., :7], mask[..., :7]), "sides of at least 8"),
        ((image, 255 * mask), "mask has values from 0 to 255"),
        ((image.long(), mask), "floating point"),
        ((image, mask * torch.nan), "mask has values"),
    ]
    for given, words in cases:
        with pytest.raises(zoo.ZooError, match=words):
            net(*given)
