"""Mechanisms of the zoo inside timm's models.

    timm.create_model("vit_tiny_patch16_224", attn_layer=zoo.timm.bind("sliding_window", window=16))
    timm.create_model("resnet18", block_args=dict(attn_layer=zoo.timm.feature("se")))
    timm.create_model("efficientnet_b0", se_layer=zoo.timm.feature("cbam"))
    zoo.swap(model, "differential+rope")        # in place; so is zoo.swap(resnet, "eca")

timm gives an attention layer x (B, N, C) with prefix tokens first and patches row by row, and wants
one tensor back. It does not tell the grid; `swap` does.
"""

from __future__ import annotations

from zoo.timm.features import TIMM_FEATURES, FeatureFactory, feature
from zoo.timm.places import check_maps
from zoo.timm.replace import swap
from zoo.timm.report import Swapped, SwappedLayer
from zoo.timm.tokens import TokenAttention, bind, init_special
from zoo.timm.windows import WindowAttention

__all__ = [
    "TIMM_FEATURES",
    "FeatureFactory",
    "Swapped",
    "SwappedLayer",
    "TokenAttention",
    "WindowAttention",
    "bind",
    "check_maps",
    "feature",
    "init_special",
    "swap",
]
