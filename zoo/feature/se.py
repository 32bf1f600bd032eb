"""Squeeze and excitation: a gate on each channel from the means of all channels.

Hu et al., "Squeeze-and-Excitation Networks" (2017), equations (2) to (4):

    z = mean over H, W of x                    (B, C)
    s = sigmoid(W_2 relu(W_1 z))               W_1: C -> R, W_2: R -> C, both with a bias
    y_bchw = s_bc x_bchw

R is `rd_ratio` C rounded to a multiple of 8, at least 8, as timm does; the paper has C / 16. The
module is timm's, as a baseline. Cost: C H W for the means and as much for the product.
"""

from __future__ import annotations

import torch

from zoo.feature._timm import TimmFeature, check_ratio
from zoo.registry import Paper, Taxonomy, Traits, register


@register(
    "se",
    kind="feature",
    paper=Paper("Squeeze-and-Excitation Networks", 2017, "1709.01507"),
    taxonomy=Taxonomy(
        sequences="self",
        levels="single",
        positions="global",
        representations="multi_dimensional",
        alignment="feature",
        distribution="sigmoid",
        complexity="linear",
        modality=("image",),
        trainable_params=True,
    ),
    traits=Traits(cost="channels * N"),
    parameters="channels + (2 * channels + 1) * ((channels * rd_ratio + 4) // 8 * 8 or 8)",
)
class SqueezeExcitation(TimmFeature):
    """Squeeze and excitation of Hu et al. (2017), timm's module.

    Args:
        channels: Channels C.
        rd_ratio: Width of the bottleneck over C, in (0, 1].
        device: Where parameters are made.
        dtype: Their type.

    Raises:
        ZooError: The ratio or the number of channels is out of range.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_ratio(rd_ratio)
        options = {"rd_ratio": rd_ratio, "device": device, "dtype": dtype}
        super().__init__("se", channels, options)
