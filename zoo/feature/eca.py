"""Efficient channel attention: a gate on each channel from the means of its neighbours.

Wang et al., "ECA-Net" (2019), equations (7) to (12):

    z = mean over H, W of x                    (B, C)
    s = sigmoid(conv1d_k(z))                   one kernel of k weights, no bias
    k = the odd number of at least 3 next to |log2 C + 1| / 2

The module is timm's, as a baseline. Cost: C H W for the means and as much for the product.
"""

from __future__ import annotations

import torch

from zoo import checks
from zoo.feature._timm import TimmFeature
from zoo.registry import Paper, Taxonomy, Traits, register


@register(
    "eca",
    kind="feature",
    paper=Paper(
        "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
        2019,
        "1910.03151",
    ),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="multi_dimensional",
        alignment="convolution",
        distribution="sigmoid",
        complexity="linear",
        modality=("image",),
        trainable_params=True,
    ),
    traits=Traits(cost="channels * N"),
    parameters=(
        "kernel_size or (channels.bit_length() // 2 | 1 if channels.bit_length() > 3 else 3)"
    ),
)
class EfficientChannelAttention(TimmFeature):
    """Efficient channel attention of Wang et al. (2019), timm's module.

    Args:
        channels: Channels C.
        kernel_size: Channels that a gate sees, odd; None takes the paper's number for C.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: The kernel is even or empty.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__("eca", channels, {"device": device, "dtype": dtype})
        kernel_size = checks.optional(checks.odd)("kernel_size", kernel_size)
        if kernel_size is None:
            return
        self.inner.conv = torch.nn.Conv1d(
            1, 1, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype
        )
