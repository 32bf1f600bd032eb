"""Vision models on timm: a ViT over any token mixer, ResNets over any feature-map mechanism.

The sizes are for small images and short runs. Timm's models are used as they are, so everything
that timm offers for them (feature extraction, parameter groups) works here too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from zoo import checks
from zoo.errors import ZooError
from zoo.host.spec import PartSpec, layout, parse, without
from zoo.models import model
from zoo.parts import Position, build
from zoo.timm import check_maps, feature, init_special, swap

_POOLS = ("avg", "avgmax", "max", "token")
_STEMS = ("small", "large")


@model("vit")
def vit(
    attention: str | Mapping[str, Any] = "mha",
    *,
    image_shape: Sequence[int],
    num_classes: int,
    patch: int = 4,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    mlp_ratio: float = 4.0,
    layers: Mapping[str, Any] | None = None,
    pos: str = "learned",
    pool: str = "avg",
    class_token: bool = False,
    registers: int = 0,
    bias: bool = True,
    qk_norm: bool = False,
    causal: bool = False,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float = 0.0,
) -> VisionTransformer:
    """Build a Vision Transformer (Dosovitskiy et al. 2020): images (B, C, H, W) to logits.

    Args:
        attention: Specification of the layers, or a mapping as in `zoo.host.spec.layout`. Parts on
            a grid are told the grid of patches; a part that embeds positions (sinusoidal) is added
            once, below the first layer, in place of the table of `pos`.
        image_shape: Channels, height and width.
        num_classes: Logits.
        patch: Side of a patch in pixels; must divide height and width.
        dim: Channels of a token.
        depth: Layers.
        heads: Heads of each layer; must divide `dim`.
        mlp_ratio: Width of the MLP over `dim`.
        layers: Layout of layers: first, last, every, other.
        pos: "learned" adds a table to the embeddings unless the spec has a part that embeds
            positions, "none" leaves positions to the spec.
        pool: What the classifier sees: avg, avgmax or max over patches, or token.
        class_token: Put a class token in front.
        registers: Further tokens in front.
        bias: Biases in attention and MLP.
        qk_norm: LayerNorm over each head of q and k.
        causal: Patch i sees patches 0..i in reading order, for mechanisms that are causal only.
        dropout: On embeddings and residual branches.
        attention_dropout: On attention weights.
        drop_path: Rate of stochastic depth in the last layer.

    Raises:
        ZooError: A size does not fit, or a name or option is unknown.
        CompatibilityError: Parts that cannot work together.
    """
    channels, height, width = checks.image_shape("image_shape", image_shape)
    sizes = {"num_classes": num_classes, "patch": patch, "dim": dim, "depth": depth}
    for name, size in {**sizes, "heads": heads}.items():
        checks.whole(name, size)
    checks.whole("registers", registers, 0)
    if height % patch or width % patch:
        raise ZooError(f"patch={patch} must divide height {height} and width {width} of the image")
    if dim % heads:
        raise ZooError(f"heads={heads} must divide dim={dim}")
    checks.number("mlp_ratio", mlp_ratio, above=0)
    rates = {"dropout": dropout, "attention_dropout": attention_dropout, "drop_path": drop_path}
    for name, rate in rates.items():
        checks.number(name, rate, 0, below=1)
    checks.choice("pos", pos, ("learned", "none"))
    checks.choice("pool", pool, _POOLS)
    if pool == "token" and not class_token:
        raise ZooError("pool='token' needs class_token=True")
    specs, embedding = _take_embedding(layout(attention, depth, layers))
    table = pos == "learned" and embedding is None
    model = VisionTransformer(
        img_size=(height, width),
        patch_size=patch,
        in_chans=channels,
        num_classes=num_classes,
        global_pool=pool,  # type: ignore[arg-type]
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        qkv_bias=bias,
        proj_bias=bias,
        qk_norm=qk_norm,
        class_token=class_token,
        reg_tokens=registers,
        pos_embed="learn" if table else "none",
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        attn_drop_rate=attention_dropout,
        drop_path_rate=drop_path,
    )
    swap(model, specs, copy=False, causal=causal)
    if embedding is not None:
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        model.norm_pre = EmbedPositions(embedding, dim, tokens)
    return model


class EmbedPositions(nn.Module):
    """Adds the positions of a part to the tokens, once, in front of the first block.

    Args:
        part: The part that embeds.
        dim: Channels.
        tokens: Tokens N, prefix included.
    """

    def __init__(self, part: PartSpec, dim: int, tokens: int) -> None:
        super().__init__()
        facts = {"dim": dim, "max_len": tokens, "causal": False}
        self.part: Position = build(part.entry.cls, facts, part.options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        return self.part.embed(x, torch.arange(x.shape[1], device=x.device))


def _take_embedding(specs: list[str]) -> tuple[list[str], PartSpec | None]:
    """Take the position that embeds out of the layers, which have to agree on it."""
    rest: list[str] = []
    found: dict[str, PartSpec] = {}
    for spec in specs:
        embeds = [
            part
            for part in parse(spec)
            if issubclass(part.entry.cls, Position) and part.entry.cls.embeds
        ]
        found.update((str(part), part) for part in embeds)
        rest.append(without(spec, "position")[0] if embeds else spec)
    if len(found) > 1:
        names = " and ".join(repr(name) for name in found)
        raise ZooError(f"layers disagree on the positions of the embedding: {names}")
    return rest, next(iter(found.values()), None)


@model("resnet", kinds=("feature",))
def resnet(
    attention: str | type[nn.Module] | None = None,
    *,
    image_shape: Sequence[int],
    num_classes: int,
    variant: str = "resnet18",
    width: int = 64,
    blocks: Sequence[int] | None = None,
    stem: str = "small",
    zero_init_last: bool = True,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> ResNet:
    """Build a ResNet (He et al. 2015) with attention at the end of each residual branch.

    ResNeXt (Xie et al. 2016) and Res2Net (Gao et al. 2019) are variants of it.

    Args:
        attention: A mechanism of kind "feature", one of timm's own (se, eca, cbam, ...; see
            `zoo.timm.TIMM_FEATURES`), a class, or None for the plain network.
        image_shape: Channels, height and width.
        num_classes: Logits.
        variant: Plain network of timm, e.g. resnet10t, resnet14t, resnet18, resnet50,
            resnext50_32x4d, res2net50_26w_4s.
        width: Channels of the stem and the first stage; each later stage has twice as many. For
            8 x 8 digits 16 are plenty. Even; a branch of a ResNeXt or Res2Net of base width w has
            ``width * w / 64`` channels, rounded down, and needs one.
        blocks: Residual blocks of each of the four stages; None for those of the variant.
        stem: "small" is a 3 x 3 convolution that keeps the size (images up to about 64 pixels),
            "large" a 7 x 7 convolution of stride 2 and a max pooling.
        zero_init_last: Start every residual branch at zero (the attention sees zeros at first).
        dropout: In front of the classifier.
        drop_path: Rate of stochastic depth in the last block.

    Raises:
        ZooError: A size does not fit, a name or option is unknown, or the maps of a stage are too
            small for the mechanism.
    """
    channels, _, _ = checks.image_shape("image_shape", image_shape)
    checks.whole("num_classes", num_classes)
    checks.multiple("width", width, 2)
    for option, value in {"dropout": dropout, "drop_path": drop_path}.items():
        checks.number(option, value, 0, below=1)
    known = _variants()
    checks.choice("variant of a ResNet", variant, known)
    base = _base_width(variant)
    if width * base < 64:
        raise ZooError(
            f"width={width} leaves a branch of {variant!r} without channels; allowed: even numbers "
            f"from {-(-64 // base)} on"
        )
    sizes: dict[str, Any] = {}
    if blocks is not None:
        sizes["layers"] = checks.wholes("blocks", blocks, 4, also="one for each stage")
    block_args: dict[str, Any] = {"attn_layer": None if attention is None else feature(attention)}
    if variant.startswith("res2"):
        # timm keeps the scale in block_args too, where this one would otherwise be lost.
        scale = re.search(r"(\d+)s$", variant)
        block_args["scale"] = int(scale[1]) if scale else 4
    checks.choice("stem", stem, _STEMS)
    model: Any = timm.create_model(
        variant,
        in_chans=channels,
        num_classes=num_classes,
        channels=tuple(width * 2**stage for stage in range(4)),
        # Of timm's stems only the deep one follows the width; its convolutions are replaced.
        stem_type="deep",
        stem_width=width // 2,
        drop_rate=dropout,
        drop_path_rate=drop_path,
        zero_init_last=zero_init_last,
        block_args=block_args,
        **sizes,
    )
    side, stride = (3, 1) if stem == "small" else (7, 2)
    conv = nn.Conv2d(channels, width, side, stride, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as timm does
    model.conv1 = conv
    if stem == "small":
        model.maxpool = nn.Identity()
    init_special(model)
    if attention is not None:
        check_maps(model, image_shape)
    return model


def _variants() -> list[str]:
    """Networks of timm that hold a feature module only where they are told to."""
    plain = r"resnet\d+[a-z]?|resnext\d+d?_\d+x\d+d|res2net\d+\w*|res2next\d+"
    return [
        name
        for module in ("resnet", "res2net")
        for name in timm.list_models(module=module)
        if re.fullmatch(plain, name)
    ]


def _base_width(variant: str) -> int:
    """Channels of one branch for 64 of the stage."""
    if variant.startswith("res2next"):
        return 4
    found = re.search(r"x(\d+)d$|_(\d+)w_", variant)
    if found:
        return int(found[1] or found[2])
    return 26 if variant.startswith("res2net") else 64
