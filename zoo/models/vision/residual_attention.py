"""Residual attention networks (Wang et al. 2017), and a small one for recipes.

    stem -> R -> modules -> R/2 -> modules -> R/2 -> modules -> R/2, R, R -> BN, ReLU -> mean -> FC

R is the pre-activation unit of `zoo.feature.residual`, R/2 one of stride 2. Three stages of
attention modules; with (m, m, m) of them and p, t, r = 1, 2, 1 there are 36 m + 20 weighted layers
on the trunk's path, which is what the networks are named after.

The network for images of 224 x 224 follows the published descriptions (7 x 7 convolution of
stride 2, pooling, BatchNorm and ReLU in front of both paths of the first unit). Those for CIFAR
were not published; stem and depths of the masks are those of the well-known PyTorch version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from zoo import checks
from zoo.errors import ZooError
from zoo.feature.residual import AttentionModule
from zoo.models import model
from zoo.models.vision._residual_net import ResidualAttentionNet, TrunkModule
from zoo.timm import feature, init_special

__all__ = [
    "ResidualAttentionNet",
    "TrunkModule",
    "attention56",
    "attention92",
    "attention_cifar",
    "fitting_depths",
    "residual_attention",
]

STEMS = {"small": "cifar", "large": "imagenet"}
# Side of the smallest map of a mask in the paper: 56, 28 and 14 are pooled three, two times, once.
SMALLEST = 7


def attention56(num_classes: int = 1000, **options: Any) -> ResidualAttentionNet:
    """Build Attention-56 for images of 224 x 224: one module in each stage."""
    return ResidualAttentionNet((1, 1, 1), num_classes=num_classes, **options)


def attention92(num_classes: int = 1000, **options: Any) -> ResidualAttentionNet:
    """Build Attention-92 for images of 224 x 224: one, two and three modules in the stages."""
    return ResidualAttentionNet((1, 2, 3), num_classes=num_classes, **options)


def attention_cifar(m: int = 1, num_classes: int = 10, **options: Any) -> ResidualAttentionNet:
    """Build the network of 36 m + 20 layers for images of 32 x 32.

    Args:
        m: Modules in each stage: 1 to 4 for Attention-56, 92, 128 and 164.
        num_classes: Logits.
        options: As `ResidualAttentionNet` takes them.

    Raises:
        ZooError: A value that is not possible.
    """
    options = {"widths": (128, 256, 512, 1024), "stem": "cifar", **options}
    return ResidualAttentionNet((m, m, m), num_classes=num_classes, **options)


def fitting_depths(side: int) -> tuple[int, int, int]:
    """Poolings of the masks of three stages whose first map has a shorter side of so many pixels.

    A mask is pooled as long as 7 pixels are left (the paper's smallest map), or a quarter of the
    first map where that is less: (3, 2, 1) for 56 pixels, (2, 1, 0) for 32, 28, 16 and 8.
    """
    least = max(1, min(SMALLEST, side // 4))
    found = []
    for _ in range(3):
        depth = 0
        while side >> (depth + 1) >= least:
            depth += 1
        found.append(depth)
        side = (side + 1) // 2
    return found[0], found[1], found[2]


@model("residual_attention", kinds=("feature",))
def residual_attention(
    attention: str | type[nn.Module] | None = "residual",
    *,
    image_shape: Sequence[int],
    num_classes: int,
    modules: int | Sequence[int] = 1,
    width: int = 32,
    stem: str = "small",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    checkpointing: bool = False,
) -> ResidualAttentionNet:
    """Build a residual attention network for images of any size.

    Args:
        attention: "residual" with its options makes the modules of the paper, the naive form with
            ``"residual(residual=False)"``; without `depth` the masks are as deep as
            `fitting_depths` says. None or "identity" leaves the masks out: the plain network of
            the same trunk. Any other mechanism of kind "feature" takes the place of the masks.
        image_shape: Channels, height and width.
        num_classes: Logits.
        modules: Attention modules m in each of the three stages, 36 m + 20 layers in all, or three
            numbers.
        width: Channels of the first stage, a multiple of 4; each later stage has twice as many.
        stem: "small" keeps the size, "large" reduces it by 4, as for images of 224 x 224.
        dropout: In front of the classifier.
        drop_path: Stochastic depth of the last unit.
        checkpointing: Compute each module again in the backward pass, to save memory.

    Raises:
        ZooError: A size does not fit, or a name or option is unknown.
    """
    checks.image_shape("image_shape", image_shape)
    checks.whole("num_classes", num_classes)
    checks.multiple("width", width, 4)
    checks.choice("stem", stem, STEMS)
    side = min(image_shape[1:])
    if stem == "large":
        if side < 8:
            raise ZooError(f"stem='large' needs images of at least 8 x 8, not {image_shape!r}")
        side = (side + 3) // 4
    options: dict[str, Any] = {}
    if attention is None:
        options["gate"] = nn.Identity
    else:
        factory = feature(attention)
        if isinstance(factory.make, type) and issubclass(factory.make, AttentionModule):
            options.update(factory.options)
            depth = options.pop("depth", None)
            options["depths"] = fitting_depths(side) if depth is None else (depth,) * 3
            if options.get("extra_adds") and depth == 0:
                raise ZooError("extra_adds=True adds after an interpolation; depth=0 has none")
        else:
            options["gate"] = factory
    net = ResidualAttentionNet(
        (modules,) * 3 if isinstance(modules, int) else modules,
        tuple(width * 2**i for i in range(4)),
        STEMS[stem],
        num_classes=num_classes,
        in_chans=image_shape[0],
        drop_rate=dropout,
        drop_path_rate=drop_path,
        **options,
    )
    net.set_grad_checkpointing(checkpointing)
    init_special(net)
    return net
