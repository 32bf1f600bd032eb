"""A small EfficientNet on timm over any mechanism on feature maps.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019), table
1: a stem, seven stages of inverted residual blocks, a 1 x 1 convolution and a classifier. Each
block has one gate, on the widened map in front of its projection; the paper has squeeze and
excitation there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import get_act_layer
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import nn

from zoo import checks
from zoo.models import model
from zoo.timm import check_maps, feature, init_special

# Type of block, repeats, side of the kernel, stride, expansion, channels.
_STAGES = (
    ("ds", 1, 3, 1, 1, 16),
    ("ir", 2, 3, 2, 6, 24),
    ("ir", 2, 5, 2, 6, 40),
    ("ir", 3, 3, 2, 6, 80),
    ("ir", 3, 5, 1, 6, 112),
    ("ir", 4, 5, 2, 6, 192),
    ("ir", 1, 3, 1, 6, 320),
)
_STEMS = ("small", "large")
_ACTIVATIONS = ("silu", "relu", "relu6", "hard_swish", "gelu", "mish")


@model("efficientnet", kinds=("feature",))
def efficientnet(
    attention: str | type[nn.Module] | None = None,
    *,
    image_shape: Sequence[int],
    num_classes: int,
    width: float = 0.25,
    depth: float = 0.34,
    stages: int = 7,
    stem: str = "small",
    ratio: float = 0.25,
    activation: str = "silu",
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> EfficientNet:
    """Build an EfficientNet (Tan and Le 2019) with attention in each inverted residual block.

    With ``width=1, depth=1, stem="large"`` it has the sizes of EfficientNet-B0, but for "se", whose
    bottleneck is rounded to a multiple of 8.

    Args:
        attention: A mechanism of kind "feature", one of timm's own (`zoo.timm.TIMM_FEATURES`), a
            class, or None for no gates at all.
        image_shape: Channels, height and width.
        num_classes: Logits.
        width: Factor on the channels of B0, rounded to multiples of 8.
        depth: Factor on the blocks of each stage of B0, rounded up.
        stages: How many of the seven stages to keep.
        stem: "small" keeps the size in the stem and in the second stage (images up to about 64
            pixels: three halvings in all), "large" has the five halvings of B0.
        ratio: Width of a gate's bottleneck over the channels that enter the block, for
            mechanisms with the option `rd_ratio`.
        activation: Activation of the convolutions: silu, relu, relu6, hard_swish, gelu, mish.
        dropout: In front of the classifier.
        drop_path: Rate of stochastic depth in the last block.

    Raises:
        ZooError: A size does not fit, a name or option is unknown, or the maps of a stage are too
            small for the mechanism.
    """
    channels, _, _ = checks.image_shape("image_shape", image_shape)
    checks.whole("num_classes", num_classes)
    checks.whole("stages", stages, 1, len(_STAGES))
    for name, factor in {"width": width, "depth": depth}.items():
        checks.number(name, factor, above=0, high=10)
    checks.number("ratio", ratio, above=0, high=1)
    checks.choice("activation", activation, _ACTIVATIONS)
    checks.choice("stem", stem, _STEMS)
    for name, rate in {"dropout": dropout, "drop_path": drop_path}.items():
        checks.number(name, rate, 0, below=1)
    rounded = partial(round_channels, multiplier=width)
    gate = "" if attention is None else f"_se{ratio}"
    blocks = []
    for i, (kind, repeats, side, stride, expansion, size) in enumerate(_STAGES[:stages]):
        step = 1 if stem == "small" and i == 1 else stride
        blocks.append([f"{kind}_r{repeats}_k{side}_s{step}_e{expansion}_c{size}{gate}"])
    given: Any = None if attention is None else feature(attention)
    made = EfficientNet(
        decode_arch_def(blocks, depth),
        num_classes=num_classes,
        num_features=rounded(1280),
        in_chans=channels,
        stem_size=32,
        round_chs_fn=rounded,
        act_layer=get_act_layer(activation),
        se_layer=given,
        drop_rate=dropout,
        drop_path_rate=drop_path,
    )
    if stem == "small":
        made.conv_stem.stride = (1, 1)
    init_special(made)
    if attention is not None:
        check_maps(made, image_shape)
    return made
