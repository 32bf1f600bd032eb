"""No attention on feature maps: the plain trunk, which every other module is compared with.

    y = x

He et al., "Deep Residual Learning for Image Recognition" (2015), the network without gates. It has
no parameters and costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.registry import Paper, Taxonomy, Traits, register


@register(
    "identity",
    kind="feature",
    paper=Paper("Deep Residual Learning for Image Recognition", 2015, "1512.03385"),
    taxonomy=Taxonomy(
        sequences="none",
        levels="single",
        positions="none",
        representations="single",
        alignment="none",
        distribution="none",
        complexity="linear",
        modality=("image",),
    ),
    traits=Traits(cost="0"),
)
class Identity(nn.Module):
    """Leaves a feature map as it is: the trunk without attention.

    Args:
        channels: Channels C, of any number.
        device: Unused, there are no parameters.
        dtype: Unused, there are no parameters.
    """

    kind = "feature"

    def __init__(
        self,
        channels: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Return the map (B, C, H, W) itself."""
        return x
