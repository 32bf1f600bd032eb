"""A small Swin transformer on timm over any token mixer that can keep its bias and mask.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (2021). Tokens
meet within windows, which every second block shifts by half their side; between stages 2 x 2
tokens merge and the channels double.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models.swin_transformer import SwinTransformer

from zoo import checks
from zoo.errors import ZooError
from zoo.models import model
from zoo.timm import swap


@model("swin")
def swin(
    attention: str | Mapping[str, Any] = "mha",
    *,
    image_shape: Sequence[int],
    num_classes: int,
    patch: int = 2,
    dim: int = 32,
    depths: Sequence[int] = (2, 2),
    heads: int | Sequence[int] = 2,
    window: int | Sequence[int] = 4,
    mlp_ratio: float = 4.0,
    layers: Mapping[str, Any] | None = None,
    bias: bool = True,
    causal: bool = False,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float = 0.0,
) -> SwinTransformer:
    """Build a Swin transformer: images (B, C, H, W) to logits.

    Args:
        attention: Specification of the layers, or a mapping as in `zoo.host.spec.layout`. Parts on
            a grid are told the window. A mixer needs the trait bias and, where windows shift, the
            trait mask="any".
        image_shape: Channels, height and width.
        num_classes: Logits.
        patch: Side of a patch in pixels; must divide height and width.
        dim: Channels of a token in the first stage; each later stage has twice as many.
        depths: Blocks of each stage; the second of two shifts its windows.
        heads: Heads of the first stage, doubled from stage to stage, or those of each stage.
        window: Side of a window, or (height, width), in tokens; a smaller map is one window.
        mlp_ratio: Width of the MLP over the channels.
        layers: Layout of layers: first, last, every, other.
        bias: Biases of q, k and v; the output projection always has one.
        causal: A token sees those before it in its window, for mechanisms that are causal only.
        dropout: On embeddings, residual branches and in front of the classifier.
        attention_dropout: On attention weights.
        drop_path: Rate of stochastic depth in the last block.

    Raises:
        ZooError: A size does not fit, or a name or option is unknown.
        CompatibilityError: Parts that cannot work together, or in windows.
    """
    channels, height, width = checks.image_shape("image_shape", image_shape)
    for name, size in {"num_classes": num_classes, "patch": patch, "dim": dim}.items():
        checks.whole(name, size)
    if height % patch or width % patch:
        raise ZooError(f"patch={patch} must divide height {height} and width {width} of the image")
    checks.wholes("depths", depths, also="the number of blocks of each stage")
    stages = len(depths)
    if isinstance(heads, Sequence):
        counts = list(heads)
    else:
        counts = [checks.whole("heads", heads) * 2**s for s in range(stages)]
    if len(counts) != stages:
        raise checks.wrong("heads", heads, f"one number, or {stages}: one for each stage")
    for stage, count in enumerate(counts):
        checks.whole("heads", count)
        if dim * 2**stage % count:
            raise ZooError(
                f"heads={count} of stage {stage + 1} must divide its {dim * 2**stage} channels"
            )
    sides: int | tuple[int, int]
    if isinstance(window, Sequence):
        rows, columns = checks.wholes("window", window, 2, also="or one for both sides")
        sides = rows, columns
    else:
        sides = checks.whole("window", window, also="or (height, width)")
    checks.number("mlp_ratio", mlp_ratio, above=0)
    rates = {"dropout": dropout, "attention_dropout": attention_dropout, "drop_path": drop_path}
    for name, rate in rates.items():
        checks.number(name, rate, 0, below=1)
    made = SwinTransformer(
        img_size=(height, width),
        patch_size=patch,
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=dim,
        depths=tuple(depths),
        num_heads=tuple(counts),
        window_size=sides,
        mlp_ratio=mlp_ratio,
        qkv_bias=bias,
        drop_rate=dropout,
        proj_drop_rate=dropout,
        attn_drop_rate=attention_dropout,
        drop_path_rate=drop_path,
    )
    swap(made, attention, layers=layers, copy=False, causal=causal)
    return made
