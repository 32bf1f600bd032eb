"""CBAM: a gate on each channel, then one on each position, from means and maxima.

Woo et al., "CBAM: Convolutional Block Attention Module" (2018), equations (2) and (3):

    s = sigmoid(M(mean over H, W of x) + M(max over H, W of x))      M: C -> R -> C with a ReLU
    x = s x
    y = sigmoid(BN(conv_k([mean over C of x, max over C of x]))) x

The module is timm's, as a baseline; it pools the mean first, where the triplet module pools the
maximum first. Cost: four passes over C H W, and 2 k^2 H W for the convolution.
"""

from __future__ import annotations

import torch

from zoo import checks
from zoo.feature._timm import TimmFeature, check_ratio
from zoo.registry import Paper, Taxonomy, Traits, register


@register(
    "cbam",
    kind="feature",
    paper=Paper("CBAM: Convolutional Block Attention Module", 2018, "1807.06521"),
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
    parameters="2 * channels * ((channels * rd_ratio + 0.5) // 1 or 1) + 2 * kernel_size**2 + 2",
)
class CBAM(TimmFeature):
    """Convolutional block attention of Woo et al. (2018), timm's module.

    Args:
        channels: Channels C.
        rd_ratio: Width of the bottleneck over C, in (0, 1].
        kernel_size: Side of the convolution over positions, odd.
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: An option or the number of channels is out of range.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        kernel_size: int = 7,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_ratio(rd_ratio)
        kernel_size = checks.odd("kernel_size", kernel_size)
        options = {"rd_ratio": rd_ratio, "spatial_kernel_size": kernel_size}
        super().__init__("cbam", channels, {**options, "device": device, "dtype": dtype})
